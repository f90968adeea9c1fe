"""The operator's keys: encryption keys for stored values, and the HMAC key for their names.

A key file has one key per line: `ID BASE64`, with 32 bytes in base64. `#` begins a comment. The line `names` is the
HMAC key; if it changes, existing entries are no longer found. Of the other keys, the first encrypts new values and all
of them decrypt, so an operator rotates keys by adding a new line above the others. Without a key file the keys are
random and end with the process, so only the memory tier is used.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path

from safelight_server.files import read_regular_file

KEY_BYTES = 32
KEY_ID = re.compile(r"^[a-z0-9]{1,8}$")
NAMES = "names"
TAG_BYTES = 8
MAX_NAMES = 4096
"""Size of the cache of computed HMACs: one request needs the same names several times."""


class KeyringError(Exception):
    """The key file cannot be used; the message lists all faults."""


class Keyring:
    """Encryption keys by id, and HMACs of names.

    Args:
        names: the HMAC key for names.
        keys: encryption keys by id; the first encrypts new values.
        persistent: whether the keys outlive the process.
    """

    def __init__(self, names: bytes, keys: dict[str, bytes], persistent: bool) -> None:
        self.persistent = persistent
        self.newest = next(iter(keys))
        self._names = names
        self._keys = keys
        self._mac = functools.lru_cache(MAX_NAMES)(self._computed)

    @classmethod
    def random(cls) -> Keyring:
        """Creates random keys that end with this process."""
        return cls(secrets.token_bytes(KEY_BYTES), {"random": secrets.token_bytes(KEY_BYTES)}, persistent=False)

    @classmethod
    def load(cls, path: Path) -> Keyring:
        """Reads a key file.

        Raises:
            KeyringError: the file cannot be read or used.
        """
        try:
            lines = read_regular_file(path).decode().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise KeyringError(f"{path}: {error}") from None
        keys: dict[str, bytes] = {}
        faults = []
        for number, line in enumerate(lines, 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            key = _decode(words[1]) if len(words) == 2 else None
            if key is None or not KEY_ID.match(words[0]):
                faults.append(f"line {number}: must have an id of 1 to 8 letters and digits, and 32 bytes in base64")
            elif words[0] in keys:
                faults.append(f"line {number}: {words[0]} is there twice")
            else:
                keys[words[0]] = key
        names = keys.pop(NAMES, None)
        if not faults and (names is None or not keys):
            faults.append(f"must have a line `{NAMES}` and at least one encryption key")
        if faults or names is None:
            raise KeyringError("\n".join(f"{path}: {fault}" for fault in faults))
        return cls(names, keys, persistent=True)

    def key(self, key_id: str) -> bytes | None:
        """Returns an encryption key, or None if the key file does not have it (any more)."""
        return self._keys.get(key_id)

    def derive(self, purpose: str) -> bytes:
        """Derives a key of 32 bytes for another module. It changes only with the line `names`."""
        return self._mac("derive", purpose)

    def digest(self, *parts: str) -> str:
        """Returns the HMAC of the parts as 64 hexadecimal digits."""
        return self._mac("digest", *parts).hex()

    def tenant(self, tenant: str) -> str:
        """Returns the first part of a tenant's store keys: 16 hexadecimal digits."""
        return self._mac("tenant", tenant)[:TAG_BYTES].hex()

    def tag(self, kind: str, name: str) -> bytes:
        """Returns the 8-byte tag of a model revision or generation for a value's header; zeros for an empty name."""
        return self._mac("tag", kind, name)[:TAG_BYTES] if name else bytes(TAG_BYTES)

    def _computed(self, *parts: str) -> bytes:
        message = b"".join(len(part.encode()).to_bytes(4, "big") + part.encode() for part in parts)
        return hmac.digest(self._names, message, hashlib.sha256)


def new_key_file() -> str:
    """Returns the text of a key file with new random keys."""
    lines = ((name, base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()) for name in (NAMES, "k1"))
    return "".join(f"{name} {key}\n" for name, key in lines)


def write_key_file(path: Path) -> None:
    """Writes a new key file that only its owner can read.

    Raises:
        FileExistsError: the file exists. Without its keys the values that they encrypted could not be read.
        OSError: the file cannot be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(new_key_file())


def _decode(text: str) -> bytes | None:
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return key if len(key) == KEY_BYTES else None
