"""The operator's keys: what seals values, and what names are made with.

A key file has one key a line, `ID BASE64` of 32 bytes, `#` begins a comment. The
line `names` is the key of all names and never changes while its entries are to
be found; of the others the first seals and all open, so that a key is rotated
by putting a new line above it. Without a file there is a random keyring: what is
stored under it is lost with the process, so that only memory is used.
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

KEY_BYTES = 32
KEY_ID = re.compile(r"^[a-z0-9]{1,8}$")
NAMES = "names"
TAG_BYTES = 8
MAX_NAMES = 4096
"""Names that are remembered: an entry's parts are asked for several times."""


class KeyringError(Exception):
    """A key file that cannot be used; the message lists all faults."""


class Keyring:
    """Keys by id.

    Args:
        names: key of names.
        keys: keys of values by id; the first seals.
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
        """Keys of this process only."""
        return cls(secrets.token_bytes(KEY_BYTES), {"random": secrets.token_bytes(KEY_BYTES)}, persistent=False)

    @classmethod
    def load(cls, path: Path) -> Keyring:
        """The keys of a file.

        Raises:
            KeyringError: the file cannot be read or used.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
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
                faults.append(f"line {number}: want an id of 1 to 8 letters and digits and 32 bytes in base64")
            elif words[0] in keys:
                faults.append(f"line {number}: {words[0]} is there twice")
            else:
                keys[words[0]] = key
        names = keys.pop(NAMES, None)
        if not faults and (names is None or not keys):
            faults.append(f"want a line `{NAMES}` and at least one key beside it")
        if faults or names is None:
            raise KeyringError("\n".join(f"{path}: {fault}" for fault in faults))
        return cls(names, keys, persistent=True)

    def key(self, key_id: str) -> bytes | None:
        """A key of values, None where it is not known (any more)."""
        return self._keys.get(key_id)

    def derive(self, purpose: str) -> bytes:
        """A key of 32 bytes for another module's names, the same as long as the line `names` is."""
        return self._mac("derive", purpose)

    def digest(self, *parts: str) -> str:
        """A name for what the parts say: 64 hexadecimal digits."""
        return self._mac("digest", *parts).hex()

    def tenant(self, tenant: str) -> str:
        """The first part of all keys of a tenant."""
        return self._mac("tenant", tenant)[:TAG_BYTES].hex()

    def tag(self, kind: str, name: str) -> bytes:
        """The tag of a model revision or a generation in a value's header, 8 bytes; zeros for an empty name."""
        return self._mac("tag", kind, name)[:TAG_BYTES] if name else bytes(TAG_BYTES)

    def _computed(self, *parts: str) -> bytes:
        message = b"".join(len(part.encode()).to_bytes(4, "big") + part.encode() for part in parts)
        return hmac.digest(self._names, message, hashlib.sha256)


def new_key_file() -> str:
    """The text of a key file with fresh keys."""
    lines = ((name, base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()) for name in (NAMES, "k1"))
    return "".join(f"{name} {key}\n" for name, key in lines)


def write_key_file(path: Path) -> None:
    """Writes a new key file that its owner alone can read.

    Raises:
        FileExistsError: the file is there; its keys are the only ones that open what they have sealed.
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
