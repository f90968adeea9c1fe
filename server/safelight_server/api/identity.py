"""Recognizes callers: by API key or, on a server without a key file, by the name that the caller gives.

The key file is one JSON object, {"keys": [{"sha256": "…", "caller": "…",
"tenant": "…", "admin": false}]}; `safelight keys new` makes entries. It holds
only hashes of keys. A plain SHA-256 is enough, as keys are 256 random bits and
cannot be guessed. `files.WatchedFile` reads the file again when it changes.
Invariant: a call costs one look-up and one comparison, however many keys there are.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError

from safelight_server.domain.caller import Caller
from safelight_server.domain.errors import FieldViolation, InvalidRequestError, UnauthenticatedError
from safelight_server.files import ConfigFileError, WatchedFile, faulty

NAME = r"^[A-Za-z0-9._-]{1,64}$"
NAME_IN_WORDS = "1 to 64 letters, digits, dots, dashes and underscores"
DEFAULT_TENANT = "default"
NO_KEY = hashlib.sha256(b"").hexdigest()


class _Key(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    caller: Annotated[str, Field(pattern=NAME)]
    tenant: Annotated[str, Field(pattern=NAME)]
    admin: StrictBool = False


class _KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    keys: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _KnownKeys:
    """The content of a key file.

    Attributes:
        callers: the SHA-256 of each key with its caller, by that SHA-256.
        tenants: the tenants of all callers.
    """

    callers: Mapping[bytes, tuple[bytes, Caller]]
    tenants: frozenset[str]


_UNKNOWN = bytes(32), None
"""An unknown digest is compared with this, so that it takes as long as a known one."""


class Identity:
    """Recognizes the caller of each call.

    Args:
        key_file: the API keys; None: callers need no key.
        all_admins: whether callers are administrators on a server without a key file.

    Raises:
        ConfigFileError: the file cannot be used.
    """

    def __init__(self, key_file: Path | None, *, all_admins: bool = False) -> None:
        self._all_admins = all_admins
        self._file = None if key_file is None else WatchedFile(key_file, lambda data: _parse(key_file, data), "keys")

    @property
    def works(self) -> list[Callable[[], Coroutine[None, None, None]]]:
        """Background work that reads the key file again when it changes."""
        return [] if self._file is None else [self._file.follow]

    @property
    def tenants(self) -> frozenset[str]:
        """The tenants that callers can belong to."""
        return frozenset({DEFAULT_TENANT}) if self._file is None else self._file.content.tenants

    def recognize(self, metadata: Iterable[tuple[str, str | bytes]], peer: str) -> Caller:
        """Returns the caller of a call.

        Args:
            metadata: the metadata of the call, keys in lower case.
            peer: the address of the client as gRPC gives it, such as "ipv4:127.0.0.1:40000".

        Raises:
            UnauthenticatedError: the server has a key file, and the call has no key or an unknown one.
            InvalidRequestError: the metadata `safelight-caller` is not a valid name.
        """
        values = {key: value for key, value in metadata if isinstance(value, str)}
        if self._file is not None:
            return _find(self._file.content, values.get("authorization", ""))
        name = values.get("safelight-caller")
        if name is None:
            return Caller(_address(peer), DEFAULT_TENANT, self._all_admins)
        if not re.fullmatch(NAME, name):
            raise InvalidRequestError([FieldViolation("metadata safelight-caller", f"must be {NAME_IN_WORDS}")])
        return Caller(name, DEFAULT_TENANT, self._all_admins)


def _find(keys: _KnownKeys, authorization: str) -> Caller:
    """The caller whose key the header has. The time that this takes reveals nothing about the existing keys.

    An attacker who does not know a key cannot choose its SHA-256, so the time of the look-up itself may vary.
    """
    scheme, _, key = authorization.partition(" ")
    digest = hashlib.sha256(key.strip().encode()).digest()
    known, caller = keys.callers.get(digest, _UNKNOWN)
    if not hmac.compare_digest(known, digest) or caller is None or scheme.lower() != "bearer":
        raise UnauthenticatedError("send metadata 'authorization: Bearer KEY' with a key of this server")
    return caller


def new_key(caller: str, tenant: str, *, admin: bool = False) -> tuple[str, str]:
    """Makes a random API key. Returns the key and its entry for the key file, as JSON.

    Raises:
        ConfigFileError: `caller` or `tenant` is not a valid name.
    """
    key = secrets.token_urlsafe(32)
    try:
        entry = _Key(sha256=hashlib.sha256(key.encode()).hexdigest(), caller=caller, tenant=tenant, admin=admin)
    except ValidationError as error:
        fields = " and ".join(str(fault["loc"][0]) for fault in error.errors())
        raise ConfigFileError(f"{fields}: must be {NAME_IN_WORDS}") from None
    return key, entry.model_dump_json(exclude_defaults=True)


def _parse(file: Path, data: bytes) -> _KnownKeys:
    """The keys of a key file. Validates them one by one: one call for all would hold the GIL for long."""
    try:
        entries = _KeyFile.model_validate_json(data).keys
    except ValidationError as error:
        raise faulty(file, _faults(error)) from None
    keys: list[_Key] = []
    faults: list[str] = []
    for at, entry in enumerate(entries):
        try:
            keys.append(_Key.model_validate(entry))
        except ValidationError as error:
            faults += _faults(error, "keys", at)
        else:
            if keys[-1].sha256 == NO_KEY:
                faults.append(f"keys.{at}.sha256: is the hash of no key")
    seen = Counter(key.sha256 for key in keys)
    faults += [f"keys: {digest[:12]}… is there {count} times" for digest, count in seen.items() if count > 1]
    if faults:
        raise faulty(file, faults)
    pairs = ((bytes.fromhex(key.sha256), Caller(key.caller, key.tenant, key.admin)) for key in keys)
    return _KnownKeys({digest: (digest, caller) for digest, caller in pairs}, frozenset(key.tenant for key in keys))


def _faults(error: ValidationError, *where: str | int) -> list[str]:
    return [f"{'.'.join(map(str, (*where, *fault['loc']))) or 'file'}: {fault['msg']}" for fault in error.errors()]


def _address(peer: str) -> str:
    """The host of a peer such as "ipv4:127.0.0.1:5" or "ipv6:%5B::1%5D:5"; other peers unchanged."""
    kind, _, rest = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return peer
    return unquote(rest).rpartition(":")[0].strip("[]") or peer
