"""Keeps the signing keys of an OpenID provider: reads them over HTTP, and again while the server runs.

The provider's discovery document names the address of its keys (OpenID Connect Discovery 1.0), which are a JSON Web Key
Set (RFC 7517). Only `follow` reads, so that the provider gets at most one reading in `PAUSE_S`, however many tokens
name keys that are not there. Invariants: a call waits for the provider only for a key that is not known, and only while
the provider answers; keys that could not be read again for `EXPIRE_S` are not used. `tokens.py` is its user.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx2
import structlog
from cryptography.exceptions import UnsupportedAlgorithm
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, JWKRegistry, Key, KeySet, OKPKey, RSAKey

from safelight_server.domain.errors import UnauthenticatedError, UnavailableError
from safelight_server.settings import is_loopback

log = structlog.get_logger(__name__)

DISCOVERY_PATH = "/.well-known/openid-configuration"
REFRESH_S = 300.0
"""How often the keys are read again, and so for how long a key that the provider has withdrawn is still used."""
PAUSE_S = 10.0
"""Least time between two readings. A token of a key that is newer than the last reading waits for so long at most."""
EXPIRE_S = 86_400.0
"""For how long keys are used that cannot be read again. Without a bound, an outage could keep a stolen key in use."""
TIMEOUT_S = 5.0
"""How long the discovery document and the keys may take together."""
MAX_BYTES = 1 << 20
"""Bytes of the largest document that is read."""
ALGORITHMS = ("RS256", "PS256", "ES256", "EdDSA", "Ed25519")
"""Signatures with a private key that only the provider has. None of HS*: whoever may check those can make them."""
CURVES = ("P-256", "Ed25519", "Ed448")
"""Curves of the keys that these algorithms take, beside RSA."""
MIN_MODULUS_CHARACTERS = 342
"""Length of the modulus of an RSA key of 2048 bits in base64url; RFC 7518 allows no shorter keys."""

PublicKey = RSAKey | ECKey | OKPKey


class ProviderError(Exception):
    """The provider's documents cannot be used; the message says why."""


class OpenIdProvider:
    """The signing keys of a provider.

    Args:
        issuer: its URL, exactly as in the claim `iss` of its tokens.
        clock: seconds that never go back.

    Attributes:
        version: changes whenever the keys change.
    """

    def __init__(self, issuer: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.issuer = issuer
        self.version = 0
        self._clock = clock
        self._keys: Mapping[str, PublicKey] = {}
        self._read_at = -math.inf
        self._next_at = -math.inf
        self._num_begun = 0
        self._fault = ""
        self._wanted = asyncio.Event()
        self._fresh = asyncio.Event()  # set in the pause after a reading

    @property
    def is_current(self) -> bool:
        """Whether the keys were read within `EXPIRE_S`."""
        return self._clock() <= self._read_at + EXPIRE_S

    async def follow(self) -> None:
        """Reads the keys, and again every `REFRESH_S` or when a call wants one that is not there. Runs until cancelled.

        While the provider fails, it is asked again after each pause.
        """
        while True:
            await self._read()
            self._wanted.clear()
            self._next_at = self._clock() + PAUSE_S
            self._fresh.set()
            await asyncio.sleep(PAUSE_S)
            self._fresh.clear()
            if not self._fault:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(REFRESH_S - PAUSE_S):
                        await self._wanted.wait()

    async def key(self, kid: str | None) -> PublicKey:
        """Returns a key by its id; None: the only one.

        Raises:
            UnauthenticatedError: the provider has no such key, or several where a token must name one.
            UnavailableError: the provider's keys cannot be read now.
        """
        if (key := self._find(kid)) is not None:
            return key
        if not self._fault and not self._fresh.is_set():
            num_begun = self._num_begun
            self._wanted.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TIMEOUT_S + 1.0):
                    await self._fresh.wait()
            if (key := self._find(kid)) is not None:
                return key
            # A reading that had begun before the call may have missed a key that the token is the first to name.
            if self._fresh.is_set() and not self._fault and self._num_begun > num_begun:
                raise UnauthenticatedError(
                    f"the token is signed by a key that is not among those of {self.issuer}", reason="TOKEN_INVALID"
                )
        retry_s = max(1.0, self._next_at - self._clock())
        if self._fault or not self.is_current:
            raise UnavailableError(
                f"the keys of {self.issuer} cannot be read now, so the token cannot be checked; retry",
                reason="IDENTITY_PROVIDER_UNAVAILABLE",
                retry_after_s=retry_s,
            )
        raise UnavailableError(
            f"the token's key was not among those of {self.issuer} when they were last read; they are read again soon",
            reason="TOKEN_KEY_UNKNOWN",
            retry_after_s=retry_s,
        )

    def _find(self, kid: str | None) -> PublicKey | None:
        if not self.is_current:
            return None
        if kid is not None:
            return self._keys.get(kid)
        if len(self._keys) > 1:  # OpenID Connect Core 1.0, section 10.1: a token must say then which one
            raise UnauthenticatedError(
                f"the token names no key (kid), and {self.issuer} has several", reason="TOKEN_INVALID"
            )
        return next(iter(self._keys.values()), None)

    async def _read(self) -> None:
        """Reads the keys. If that fails, the earlier ones stay in use, and the failure is logged once."""
        self._num_begun += 1
        try:
            async with asyncio.timeout(TIMEOUT_S), await asyncio.to_thread(self._client) as http:
                keys = await self._fetch(http)
            changed = _dumped(keys) != _dumped(self._keys)
        except Exception as error:  # noqa: BLE001  # whatever it is, calls must not wait, and it must be tried again
            fault = str(error) if isinstance(error, ProviderError) else repr(error)
            if fault != self._fault:
                log.error("openid_keys_not_read", issuer=self.issuer, error=fault)
            self._fault = fault
            return
        if changed or self._fault or self._read_at == -math.inf:
            log.log(logging.INFO if keys else logging.ERROR, "openid_keys_read", issuer=self.issuer, keys=len(keys))
        if changed:
            self.version += 1
        self._keys, self._read_at, self._fault = keys, self._clock(), ""

    def _client(self) -> httpx2.AsyncClient:
        """A client for one reading, by the variables of the environment, such as `SSL_CERT_FILE`. Reads files."""
        # no proxy to a provider on this machine
        trust_env = not is_loopback(urlsplit(self.issuer).hostname or "")
        return httpx2.AsyncClient(timeout=TIMEOUT_S, trust_env=trust_env)

    async def _fetch(self, http: httpx2.AsyncClient) -> Mapping[str, PublicKey]:
        discovered = await _document(http, self.issuer.rstrip("/") + DISCOVERY_PATH)
        if discovered.get("issuer") != self.issuer:
            raise ProviderError(f"the discovery document is of issuer {str(discovered.get('issuer'))[:200]!r}")
        url = discovered.get("jwks_uri")
        if not isinstance(url, str) or not url.startswith(("https://", f"{urlsplit(self.issuer).scheme}://")):
            raise ProviderError("the discovery document has no jwks_uri with https")
        entries = (await _document(http, url)).get("keys")
        if not isinstance(entries, list):
            raise ProviderError(f"{url} is no JSON Web Key Set")
        # None that can be used is no fault: it is how a provider withdraws its last key.
        return await asyncio.to_thread(_keys, entries)


async def _document(http: httpx2.AsyncClient, url: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ProviderError: it is larger than `MAX_BYTES`, or is no JSON object.
    """
    data = bytearray()
    async with http.stream("GET", url, headers={"accept": "application/json"}) as response:
        response.raise_for_status()
        async for piece in response.aiter_bytes():
            data += piece
            if len(data) > MAX_BYTES:
                raise ProviderError(f"{url} has more than {MAX_BYTES} bytes")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ProviderError(f"{url} is no JSON object")
    return content


def _keys(entries: list[Any]) -> Mapping[str, PublicKey]:
    """The usable public keys of a key set by their ids. Others are left out, as RFC 7517 (section 5) asks."""
    found: list[Key] = []
    for entry in entries:
        if not isinstance(entry, dict) or entry.get("use", "sig") != "sig" or _is_short(entry):
            continue
        with contextlib.suppress(JoseError, UnsupportedAlgorithm, ValueError, TypeError, KeyError):
            if _fits(key := JWKRegistry.import_key(entry)):
                found.append(key)
    return {str(key.kid): key for key in KeySet(found) if isinstance(key, PublicKey)}  # a KeySet gives ids to its keys


def _fits(key: Key) -> bool:
    """Whether signatures by one of `ALGORITHMS` can be checked with the key."""
    if key.alg is not None and key.alg not in ALGORITHMS:
        return False
    return isinstance(key, RSAKey) or (isinstance(key, ECKey | OKPKey) and key.curve_name in CURVES)


def _is_short(entry: dict[str, Any]) -> bool:
    return entry.get("kty") == "RSA" and len(str(entry.get("n"))) < MIN_MODULUS_CHARACTERS


def _dumped(keys: Mapping[str, PublicKey]) -> dict[str, object]:
    return {kid: key.as_dict(private=False) for kid, key in keys.items()}
