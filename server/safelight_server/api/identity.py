"""Recognizes callers: by API key, by a token of an OpenID provider or, without both, by the name that the caller gives.

The key file is one JSON object, {"keys": [{"sha256": "…", "caller": "…",
"tenant": "…", "admin": false}]}; `safelight keys new` makes entries. It holds
only hashes of keys. A plain SHA-256 is enough, as keys are 256 random bits and
cannot be guessed. `files.WatchedFile` reads the file again when it changes.
Invariant: a call costs one look-up and one comparison, however many keys there are. `tokens.py` checks tokens; what is
a key of the file is never taken for one.
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

from safelight_server.api.tokens import AccessTokens, looks_like_a_token
from safelight_server.domain.caller import NAME, NAME_IN_WORDS, Caller
from safelight_server.domain.errors import FieldViolation, InvalidRequestError, UnauthenticatedError
from safelight_server.files import ConfigFileError, WatchedFile, faulty

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
        key_file: the API keys; None: there are none.
        all_admins: whether callers are administrators on a server with neither keys nor tokens.
        tokens: recognizes tokens; None: they are not accepted.

    Raises:
        ConfigFileError: the file cannot be used.
    """

    def __init__(self, key_file: Path | None, *, all_admins: bool = False, tokens: AccessTokens | None = None) -> None:
        self._all_admins = all_admins
        self._tokens = tokens
        self._file = None if key_file is None else WatchedFile(key_file, lambda data: _parse(key_file, data), "keys")

    @property
    def works(self) -> list[Callable[[], Coroutine[None, None, None]]]:
        """Background work that reads the key file, and the provider's keys, again when they change."""
        works = [] if self._file is None else [self._file.follow]
        return works if self._tokens is None else [*works, self._tokens.provider.follow]

    @property
    def tenants(self) -> frozenset[str]:
        """The tenants of the keys, and those that tokens have named lately."""
        if self._file is None and self._tokens is None:
            return frozenset({DEFAULT_TENANT})
        of_keys = frozenset[str]() if self._file is None else self._file.content.tenants
        return of_keys if self._tokens is None else of_keys | self._tokens.tenants

    async def recognize(self, metadata: Iterable[tuple[str, str | bytes]], peer: str) -> Caller:
        """Returns the caller of a call. Waits only for a provider's key that is not known yet.

        Args:
            metadata: the metadata of the call, keys in lower case.
            peer: the address of the client as gRPC gives it, such as "ipv4:127.0.0.1:40000".

        Raises:
            UnauthenticatedError: callers need a key or a token, and the call has none that is valid.
            TokenNotAllowedError: the token is valid, and its caller may not use this server.
            UnavailableError: the provider's keys cannot be read now.
            InvalidRequestError: the metadata `safelight-caller` is not a valid name.
        """
        values = {key: value for key, value in metadata if isinstance(value, str)}
        if self._file is not None or self._tokens is not None:
            return await self._by_credential(values.get("authorization", ""))
        name = values.get("safelight-caller")
        if name is None:
            return Caller(_address(peer), DEFAULT_TENANT, self._all_admins)
        if not re.fullmatch(NAME, name):
            raise InvalidRequestError([FieldViolation("metadata safelight-caller", f"must be {NAME_IN_WORDS}")])
        return Caller(name, DEFAULT_TENANT, self._all_admins)

    async def _by_credential(self, authorization: str) -> Caller:
        scheme, _, credential = authorization.partition(" ")
        credential = credential.strip()
        digest = hashlib.sha256(credential.encode()).digest()
        is_bearer = scheme.lower() == "bearer"
        caller = None if self._file is None else _find(self._file.content, digest)
        if caller is not None and is_bearer:
            return caller
        if self._tokens is not None and is_bearer and looks_like_a_token(credential):
            return await self._tokens.caller(credential, digest)
        ways = [] if self._file is None else ["KEY' with a key of this server"]
        if self._tokens is not None:
            ways.append(f"TOKEN' with an access token (a JWT) of {self._tokens.provider.issuer}")
        raise UnauthenticatedError(" or ".join(f"send metadata 'authorization: Bearer {way}" for way in ways))


def _find(keys: _KnownKeys, digest: bytes) -> Caller | None:
    """The caller of the key with this SHA-256. The time that this takes reveals nothing about the existing keys.

    An attacker who does not know a key cannot choose its SHA-256, so the time of the look-up itself may vary.
    """
    known, caller = keys.callers.get(digest, _UNKNOWN)
    return caller if hmac.compare_digest(known, digest) else None


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
