"""Who asks: a caller of a tenant, by API key, or on loopback by what it says of itself.

The key file holds one JSON object: {"keys": [{"sha256": "…", "caller": "…",
"tenant": "…"}]}, made by `safelight keys new`. It is read again when it
changes; a new file that is not right is logged and the old one stays.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from safelight_server.errors import FieldViolation, InvalidRequestError, UnauthenticatedError

log = structlog.get_logger(__name__)

NAME = r"^[A-Za-z0-9._-]{1,64}$"
DEFAULT_TENANT = "default"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. What one tenant owns does not exist for another."""

    name: str
    tenant: str


class KeyFileError(Exception):
    """A key file that cannot be used; the message lists its faults."""


class _Key(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    caller: Annotated[str, Field(pattern=NAME)]
    tenant: Annotated[str, Field(pattern=NAME)]


class _KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    keys: tuple[_Key, ...]


class Identity:
    """Recognizes callers.

    Args:
        key_file: None: no keys are asked for.
    """

    def __init__(self, key_file: Path | None) -> None:
        self._file = key_file
        self._stamp: tuple[int, int, int] | None = None
        self._keys: list[tuple[bytes, Caller]] = []
        if key_file is not None:
            self._stamp = _stamp(key_file)
            self._keys = _read(key_file)

    def recognize(self, metadata: Iterable[tuple[str, str | bytes]], peer: str) -> Caller:
        """The caller of a call.

        Raises:
            UnauthenticatedError: keys are asked for and there is none, or one that is not known.
            InvalidRequestError: `safelight-caller` is no name.
        """
        values = {key: value for key, value in metadata if isinstance(value, str)}
        if self._file is not None:
            return self._by_key(values.get("authorization", ""))
        name = values.get("safelight-caller")
        if name is None:
            return Caller(_address(peer), DEFAULT_TENANT)
        if not re.fullmatch(NAME, name):
            what = "1 to 64 of letters, digits, dot, dash and underscore"
            raise InvalidRequestError([FieldViolation("metadata safelight-caller", what)])
        return Caller(name, DEFAULT_TENANT)

    def _by_key(self, authorization: str) -> Caller:
        self._refresh()
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        found = [caller for known, caller in self._keys if hmac.compare_digest(known, digest)]
        if scheme.lower() != "bearer" or not found:
            raise UnauthenticatedError("send metadata 'authorization: Bearer KEY' with a key of this server")
        return found[0]

    def _refresh(self) -> None:
        assert self._file is not None
        stamp = _stamp(self._file)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = _read(self._file)
            log.info("keys_reloaded", keys=len(self._keys))
        except KeyFileError as error:
            log.error("keys_not_reloaded", error=str(error))


def new_key(caller: str, tenant: str) -> tuple[str, str]:
    """A fresh key, and its entry for the key file."""
    key = secrets.token_urlsafe(32)
    entry = {"sha256": hashlib.sha256(key.encode()).hexdigest(), "caller": caller, "tenant": tenant}
    return key, json.dumps(_Key.model_validate(entry).model_dump())


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read(file: Path) -> list[tuple[bytes, Caller]]:
    try:
        parsed = _KeyFile.model_validate_json(file.read_text())
    except OSError as error:
        raise KeyFileError(f"{file}: {error.strerror}") from None
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
        raise KeyFileError(f"{file}: {faults}") from None
    return [(bytes.fromhex(key.sha256), Caller(key.caller, key.tenant)) for key in parsed.keys]


def _address(peer: str) -> str:
    """"ipv4:127.0.0.1:5" or "ipv6:%5B::1%5D:5" without the port, "unix:" as it is."""
    kind, _, rest = peer.partition(":")
    return peer if kind == "unix" else rest.rpartition(":")[0].replace("%5B", "").replace("%5D", "") or peer
