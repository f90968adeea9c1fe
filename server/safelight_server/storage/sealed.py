"""The stored format of cache entries: AES-256-GCM under the operator's key, with a header in plain text.

    header, in plain text, 48 bytes:
        magic 4 · key id 8 · expires_at float64 · revision tag 8 · generation tag 8 · nonce 12
    then, encrypted: length of the metadata uint32 · metadata JSON · data
    then the authentication tag, 16 bytes

The tag also authenticates the entry's key and header, so that a value can be read only under its own key and its
expiry cannot be changed. A value whose tag does not match is corrupt; there is no other checksum. Numbers are
little-endian.

One encryption key may seal 2^32 values under random nonces (NIST SP 800-38D, 8.3). Rotate it before.
"""

from __future__ import annotations

import json
import math
import secrets
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from safelight_server.storage.base import HEADER_BYTES
from safelight_server.storage.keyring import Keyring

MAGIC = b"SLC1"
NO_TAG = bytes(8)
_HEADER = struct.Struct("<4s8sd8s8s12s")
_LENGTH = struct.Struct("<I")
_NONCE_BYTES = 12


class CorruptError(Exception):
    """The value is not one that was stored under this key."""


class UnreadableError(Exception):
    """The value was encrypted with a key that the key file does not have (any more)."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A cache entry in plain text.

    Attributes:
        data: the bytes.
        metadata: short facts about the bytes, encrypted with them.
        revision: tag of the model revision it was computed with (`Keyring.tag`), for purges.
        generation: tag of the generation that computed it, for purges.
    """

    data: bytes
    metadata: Mapping[str, str] = field(default_factory=dict)
    revision: bytes = NO_TAG
    generation: bytes = NO_TAG


@dataclass(frozen=True, slots=True)
class Header:
    """The part of a value that can be read without a key. It is authentic only once `open` has succeeded."""

    key_id: str
    expires_at: float
    revision: bytes
    generation: bytes
    nonce: bytes


class Sealer:
    """Encrypts and decrypts cache entries.

    Args:
        now: the clock of all expiries, in Unix seconds; the same for all who read and write the entries.
    """

    def __init__(self, keyring: Keyring, now: Callable[[], float] = time.time) -> None:
        self.now = now
        self._keyring = keyring
        self._ciphers: dict[str, AESGCM] = {}

    def seal(self, key: str, entry: Entry, expires_at: float) -> bytes:
        """Encrypts an entry for storage under `key`, to be served until `expires_at` (Unix seconds)."""
        key_id = self._keyring.newest
        nonce = secrets.token_bytes(_NONCE_BYTES)
        tags = (entry.revision, entry.generation)
        header = _HEADER.pack(MAGIC, key_id.encode().ljust(8, b"\0"), expires_at, *tags, nonce)
        metadata = json.dumps(dict(entry.metadata), separators=(",", ":")).encode()
        plain = b"".join((_LENGTH.pack(len(metadata)), metadata, entry.data))
        cipher = self._cipher(key_id)
        if cipher is None:
            raise RuntimeError("a keyring without its newest key")
        return header + cipher.encrypt(nonce, plain, header + key.encode())

    def open(self, key: str, value: bytes) -> tuple[Entry, float]:
        """Decrypts a value. Returns the entry and its expiry (Unix seconds).

        Raises:
            CorruptError: the value was changed, truncated, or stored under another key.
            UnreadableError: the key file does not have its encryption key.
        """
        header = parse_header(value)
        if header is None:
            raise CorruptError("no header")
        cipher = self._cipher(header.key_id)
        if cipher is None:
            raise UnreadableError(header.key_id)
        try:
            plain = cipher.decrypt(header.nonce, value[HEADER_BYTES:], value[:HEADER_BYTES] + key.encode())
        except InvalidTag:
            raise CorruptError("it does not verify") from None
        (length,) = _LENGTH.unpack_from(plain)
        metadata = json.loads(plain[_LENGTH.size : _LENGTH.size + length])
        entry = Entry(plain[_LENGTH.size + length :], metadata, header.revision, header.generation)
        return entry, header.expires_at

    def _cipher(self, key_id: str) -> AESGCM | None:
        cipher = self._ciphers.get(key_id)
        if cipher is None:
            key = self._keyring.key(key_id)
            if key is None:
                return None
            cipher = self._ciphers[key_id] = AESGCM(key)
        return cipher


def parse_header(value: bytes) -> Header | None:
    """Parses the header from a value or from its first `HEADER_BYTES`; None if there is no valid header."""
    if len(value) < HEADER_BYTES:
        return None
    magic, key_id, expires_at, revision, generation, nonce = _HEADER.unpack_from(value)
    if magic != MAGIC or not math.isfinite(expires_at):
        return None
    try:
        return Header(key_id.rstrip(b"\0").decode("ascii"), expires_at, revision, generation, nonce)
    except UnicodeDecodeError:
        return None
