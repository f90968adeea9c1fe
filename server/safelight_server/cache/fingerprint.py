"""Fingerprints: which outputs are the same picture, or comparable; and index keys, which are HMACs of fingerprints.

A fingerprint is canonical JSON in UTF-8 (sorted keys, no spaces, ASCII, shortest float that reads back the same, -0.0
as 0.0) with a version. It is computed from a resolved `Spec`, so the order of fields and explicit defaults make no
difference. Token ids stand for the texts, so differences that the model does not see make none either. The model's name
and revision are left out, because the pipeline digest decides the pixels.

Invariants: outputs with equal fingerprints have equal bits. Index keys are HMAC-SHA256 under a secret of the tenant or
pool, so two tenants have different keys for the same picture, and a key cannot be used to confirm a guessed prompt.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

from safelight_server.domain.request import Spec

VERSION = 3
"""Increased whenever the format or content changes, so that old entries are no longer found."""

STAND_INS = frozenset({"model", "revision", "prompt", "negative_prompt"})
"""Fields of a spec that a fingerprint leaves out, since the pipeline's digest and the token ids stand for them. All
other fields are in it, so that a new field cannot be forgotten."""


class IndexKind(enum.StrEnum):
    """What an index key finds. Keys of different kinds never collide."""

    EXACT = "exact"
    COMPATIBLE = "compatible"
    EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True)
class SharingScope:
    """Who shares cached entries: one tenant, or all tenants of a pool that the operator configured."""

    name: str
    pooled: bool = False


def tenant_key(operator_key: bytes, scope: SharingScope) -> bytes:
    """Derives the secret of a tenant or pool, 32 bytes. A pool and a tenant of the same name have different secrets.

    Raises:
        ValueError: the operator's key is shorter than 16 bytes.
    """
    if len(operator_key) < 16:
        raise ValueError("the operator key must have at least 16 bytes")
    return _mac(operator_key, "pool" if scope.pooled else "tenant", scope.name.encode())


def index_key(key: bytes, kind: IndexKind, canonical: bytes) -> str:
    """Returns the index key of a fingerprint: 64 hexadecimal digits."""
    return _mac(key, kind, canonical).hex()


def derived_seed(key: bytes, what: str) -> int:
    """Derives a secret 64-bit seed, different for each tenant."""
    return int.from_bytes(_mac(key, "seed", what.encode())[:8], "big")


def comparable(pipeline_digest: str, numerics_id: str, spec: Spec) -> Mapping[str, object]:
    """Returns what outputs have in common that differ at most in prompt and seed; their fingerprints are made of it."""
    fields = {name: _plain(getattr(spec, name)) for name in _DECIDING}
    return {"pipeline": pipeline_digest, "numerics": numerics_id, "spec": fields}


def exact(common: Mapping[str, object], token_ids: Sequence[int], seed: int) -> bytes:
    """Returns the fingerprint of one output: everything that decides its bits.

    Args:
        common: its `comparable`.
    """
    return _canonical({**common, "tokens": list(token_ids), "seed": seed})


def compatible(common: Mapping[str, object]) -> bytes:
    """Returns the fingerprint of a `comparable`, which has no prompt and no seed.

    Outputs may share pictures as SIMILAR, and start from each other's latents, only if these are equal.
    """
    return _canonical(common)


def image_prompt(encoder_digest: str, numerics_id: str, image_digest: str) -> bytes:
    """Returns the fingerprint of an image encoder's output for a picture's file."""
    return _canonical({"encoder": encoder_digest, "numerics": numerics_id, "image": image_digest})


def embedding(
    encoder_digest: str, numerics_id: str, token_ids: Sequence[int], adapters: Sequence[tuple[str, float]] = ()
) -> bytes:
    """Returns the fingerprint of a text encoder's output, for prompts and negative prompts alike.

    Args:
        adapters: digest and factor of each adapter that changes the text encoder, in their order.
    """
    changes = {"adapters": _plain(tuple(adapters))} if adapters else {}
    return _canonical({"encoder": encoder_digest, "numerics": numerics_id, "tokens": list(token_ids), **changes})


_DECIDING = {field.name for field in dataclasses.fields(Spec)} - STAND_INS - {"seeds", "token_ids"}
_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode
_PLAIN = frozenset({int, str, NoneType})
"""Types whose equal values have equal JSON. Most values have one of them, such as all token ids."""


def _plain(value: object) -> object:
    """A value in a form in which equal numbers have equal JSON: 3 and 3.0, 0.0 and -0.0."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, tuple):
        return [item if type(item) in _PLAIN else _plain(item) for item in value]
    if dataclasses.is_dataclass(value):
        return [_plain(getattr(value, name)) for name in _field_names(value.__class__)]
    return value


@functools.cache
def _field_names(kind: type[Any]) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


def _canonical(content: Mapping[str, object]) -> bytes:
    return _encode({**content, "version": VERSION}).encode()


def _mac(key: bytes, purpose: str, content: bytes) -> bytes:
    return hmac.digest(key, purpose.encode() + b"\0" + content, hashlib.sha256)
