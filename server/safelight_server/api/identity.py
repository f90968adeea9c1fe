"""Recognizes callers: by API key or, on a server without a key file, by the name that the caller gives.

The key file is one JSON object, {"keys": [{"sha256": "…", "caller": "…",
"tenant": "…", "admin": false}]}; `safelight keys new` makes entries. It holds
only hashes of keys. A plain SHA-256 is enough, as keys are 256 random bits and
cannot be guessed. When a call comes, at most once a second, the file is checked
for changes and read again. A new file that cannot be used is logged once, and
the keys in force stay. A faulty file is read again when it changes, a file that
could not be read at the next check.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote

import structlog
from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError

from safelight_server.domain.caller import Caller
from safelight_server.domain.errors import FieldViolation, InvalidRequestError, UnauthenticatedError

log = structlog.get_logger(__name__)

NAME = r"^[A-Za-z0-9._-]{1,64}$"
NAME_IN_WORDS = "1 to 64 letters, digits, dots, dashes and underscores"
DEFAULT_TENANT = "default"
LOOK_EVERY_S = 1.0
NO_KEY = hashlib.sha256(b"").hexdigest()


class KeyFileError(Exception):
    """A key file or an entry for it that cannot be used; the message lists all faults."""


class _UnreadableError(KeyFileError):
    """The file could not be read; a later attempt may succeed without a change of the file."""


class _Key(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    caller: Annotated[str, Field(pattern=NAME)]
    tenant: Annotated[str, Field(pattern=NAME)]
    admin: StrictBool = False


class _KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    keys: tuple[_Key, ...]


_Stamp = tuple[int, int, int, int]


class Identity:
    """Recognizes the caller of each call.

    Args:
        key_file: the API keys; None: callers need no key.
        all_admins: whether callers are administrators on a server without a key file.
        clock: monotonic seconds.

    Raises:
        KeyFileError: the file cannot be used.
    """

    def __init__(
        self, key_file: Path | None, clock: Callable[[], float] = time.monotonic, *, all_admins: bool = False
    ) -> None:
        self._all_admins = all_admins
        self._keys = None if key_file is None else _WatchedKeys(key_file, clock)

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
        if self._keys is not None:
            return self._keys.recognize(values.get("authorization", ""))
        name = values.get("safelight-caller")
        if name is None:
            return Caller(_address(peer), DEFAULT_TENANT, self._all_admins)
        if not re.fullmatch(NAME, name):
            raise InvalidRequestError([FieldViolation("metadata safelight-caller", f"must be {NAME_IN_WORDS}")])
        return Caller(name, DEFAULT_TENANT, self._all_admins)


class _WatchedKeys:
    """The keys of a file, read again when it changes; a file that cannot be used changes nothing."""

    def __init__(self, file: Path, clock: Callable[[], float]) -> None:
        self._file = file
        self._clock = clock
        self._stamp = _stamp(file)
        self._keys = _read(file)
        self._looked_at = clock()
        self._unreadable = ""

    def recognize(self, authorization: str) -> Caller:
        self._look()
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        found = None
        for known, caller in self._keys:  # compares with every key, so that the time taken reveals nothing
            found = caller if hmac.compare_digest(known, digest) else found
        if scheme.lower() != "bearer" or found is None:
            raise UnauthenticatedError("send metadata 'authorization: Bearer KEY' with a key of this server")
        return found

    def _look(self) -> None:
        now = self._clock()
        if now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        stamp = _stamp(self._file)
        if stamp == self._stamp:
            self._unreadable = ""
            return
        try:
            self._keys = _read(self._file)
        except _UnreadableError as error:
            if str(error) != self._unreadable:
                self._not_reloaded(error)
            self._unreadable = str(error)
            return
        except KeyFileError as error:
            self._not_reloaded(error)
        else:
            log.info("keys_reloaded", num_keys=len(self._keys))
        self._stamp, self._unreadable = stamp, ""

    def _not_reloaded(self, error: KeyFileError) -> None:
        log.error("keys_not_reloaded", error=str(error), num_keys=len(self._keys))


def new_key(caller: str, tenant: str, *, admin: bool = False) -> tuple[str, str]:
    """Makes a random API key. Returns the key and its entry for the key file, as JSON.

    Raises:
        KeyFileError: `caller` or `tenant` is not a valid name.
    """
    key = secrets.token_urlsafe(32)
    try:
        entry = _Key(sha256=hashlib.sha256(key.encode()).hexdigest(), caller=caller, tenant=tenant, admin=admin)
    except ValidationError as error:
        fields = " and ".join(str(fault["loc"][0]) for fault in error.errors())
        raise KeyFileError(f"{fields}: must be {NAME_IN_WORDS}") from None
    return key, entry.model_dump_json(exclude_defaults=True)


def _stamp(file: Path) -> _Stamp | None:
    """Times, size and inode of a file, which change when it is written or replaced; None if there is no file."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def _read(file: Path) -> list[tuple[bytes, Caller]]:
    try:
        parsed = _KeyFile.model_validate_json(file.read_bytes())
    except OSError as error:
        raise _UnreadableError(f"{file}: {error.strerror}") from None
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
        raise KeyFileError(f"{file}: {found}") from None
    seen = Counter(key.sha256 for key in parsed.keys)
    faults = [f"keys.{at}.sha256: is the hash of no key" for at, key in enumerate(parsed.keys) if key.sha256 == NO_KEY]
    faults += [f"keys: {digest[:12]}… is there {count} times" for digest, count in seen.items() if count > 1]
    if faults:
        raise KeyFileError(f"{file}: {'; '.join(faults)}")
    return [(bytes.fromhex(key.sha256), Caller(key.caller, key.tenant, key.admin)) for key in parsed.keys]


def _address(peer: str) -> str:
    """The host in a peer such as "ipv4:127.0.0.1:5" or "ipv6:%5B::1%5D:5"; other peers as they are."""
    kind, _, rest = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return peer
    return unquote(rest).rpartition(":")[0].strip("[]") or peer
