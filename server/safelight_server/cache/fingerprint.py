"""What makes two outputs the same picture, or comparable; and index keys that tell nothing without a secret.

A fingerprint is canonical JSON (sorted keys, no spaces, ASCII, shortest float
that reads back the same, -0.0 as 0.0), UTF-8, with a version. It is taken of a
resolved `Spec`, so field order and spelled-out defaults cannot matter, and
token ids stand for the texts, so neither can a difference that the model does
not see. The model's name and revision are not in it: the pipeline digest is
what decides pixels.

Invariants: outputs with one fingerprint have the same bits;
index keys are HMAC-SHA256 under a key of the tenant or of a pool, so that the
same picture of two tenants has two keys and a key does not confirm a guess.
Neighbours: `validation.spec` makes specs; the stores take keys as plain strings.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass

from safelight_server.domain.request import Spec

VERSION = 1
"""Raised whenever the encoding or its content changes: old entries are then never found."""


class IndexKind(enum.StrEnum):
    """What an index key leads to; keys of two kinds never meet."""

    EXACT = "exact"
    COMPATIBLE = "compatible"
    EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True)
class SharingScope:
    """Who shares what is cached: one tenant, or all tenants of a pool that the operator has marked as shared."""

    name: str
    pooled: bool = False


def tenant_key(operator_key: bytes, scope: SharingScope) -> bytes:
    """The secret of a tenant or pool, 32 bytes; a pool named like a tenant has another.

    Raises:
        ValueError: the operator's key is shorter than 16 bytes.
    """
    if len(operator_key) < 16:
        raise ValueError("the operator key must have at least 16 bytes")
    return _mac(operator_key, "pool" if scope.pooled else "tenant", scope.name.encode())


def index_key(key: bytes, kind: IndexKind, canonical: bytes) -> str:
    """Where something is found: 64 hexadecimal digits."""
    return _mac(key, kind, canonical).hex()


def derived_seed(key: bytes, what: str) -> int:
    """A 64-bit seed that only holders of the key know, for what must differ by tenant."""
    return int.from_bytes(_mac(key, "seed", what.encode())[:8], "big")


def exact(pipeline_digest: str, numerics_id: str, spec: Spec, seed: int) -> bytes:
    """The fingerprint of one output: all that decides its bits."""
    content = _comparable(pipeline_digest, numerics_id, spec) | {"tokens": list(spec.token_ids), "seed": seed}
    return _canonical(content)


def compatible(pipeline_digest: str, numerics_id: str, spec: Spec) -> bytes:
    """What must be equal before prompts are compared: all of the fingerprint but the prompt and the seed.

    Pictures may be served as SIMILAR and latents taken up only within one of these.
    """
    return _canonical(_comparable(pipeline_digest, numerics_id, spec))


def embedding(encoder_digest: str, token_ids: Sequence[int]) -> bytes:
    """The fingerprint of a text encoder's output; prompts and negative prompts alike."""
    return _canonical({"encoder": encoder_digest, "tokens": list(token_ids)})


def _comparable(pipeline_digest: str, numerics_id: str, spec: Spec) -> dict[str, object]:
    sampler = spec.sampler
    return {
        "pipeline": pipeline_digest,
        "numerics": numerics_id,
        "negative_tokens": None if spec.negative_token_ids is None else list(spec.negative_token_ids),
        "size_px": [spec.width_px, spec.height_px],
        "steps": spec.num_inference_steps,
        "guidance_scale": _number(spec.guidance_scale),
        "sampler": [sampler.name, sampler.spacing, sampler.sigma_schedule, _number(sampler.eta)],
    }


def _number(value: float) -> float:
    """3 and 3.0 are one number, and so are 0.0 and -0.0."""
    return float(value) + 0.0


def _canonical(content: dict[str, object]) -> bytes:
    versioned = content | {"version": VERSION}
    return json.dumps(versioned, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _mac(key: bytes, purpose: str, content: bytes) -> bytes:
    return hmac.digest(key, purpose.encode() + b"\0" + content, hashlib.sha256)
