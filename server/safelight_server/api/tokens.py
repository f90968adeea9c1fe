"""Recognizes callers by JSON Web Tokens that an OpenID provider has signed.

A token is checked once: its signature, issuer, audience and times (RFC 7519, RFC 8725; access tokens: RFC 9068). Until
it expires, or the provider's keys change, a call with it costs one look-up by its SHA-256. Invariants: only asymmetric
algorithms are accepted, whatever a token's header says; no text of a refusal has more than what the token itself says.
`openid.py` has the provider's keys; `identity.py` knows API keys, and calls this module for what looks like a token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from joserfc import jwt
from joserfc.errors import ClaimError, ExpiredTokenError, JoseError, MissingClaimError, UnsupportedAlgorithmError
from joserfc.jws import JWSRegistry
from joserfc.jwt import JWTClaimsRegistry

from safelight_server.api.openid import ALGORITHMS, OpenIdProvider
from safelight_server.domain.caller import NAME, NAME_IN_WORDS, Caller
from safelight_server.domain.errors import TokenNotAllowedError, UnauthenticatedError

TYPES = ("", "jwt", "at+jwt", "application/at+jwt")
"""Header `typ` of access tokens, in lower case. Other tokens of a provider, such as for a logout, are none."""
LEEWAY_S = 30
"""By how much the clocks of the provider and of this machine may differ."""
MAX_TOKENS = 10_000
"""Tokens that are remembered, about 400 bytes each. One that was forgotten is checked again, which takes 0.1 ms."""
REMEMBER_S = 3600.0
"""Longest time for which a token is not checked again, whatever time it has itself."""
MAX_HEADER_BYTES, MAX_BYTES = 4096, 16_384
"""Of a token's header, and of a token; gRPC takes no metadata beyond the second."""
APPLICATION_CLAIMS = ("client_id", "azp", "appid", "cid")
"""Where providers name the application: RFC 9068 and Cognito, Keycloak and Entra, older Entra, Okta."""

ACCESS = {"token_use": "access", "typ": "Bearer"}
"""How Cognito and Keycloak name the kind of access tokens, among the claims. Other providers do not."""
ID_TOKEN_CLAIMS = frozenset({"nonce", "at_hash", "c_hash"})
"""Claims that only ID tokens have (OpenID Connect Core 1.0, sections 2 and 3.3.2.11)."""


@dataclass(frozen=True, slots=True)
class ClaimValue:
    """A value that a claim has or contains: "scope=safelight/generate", "realm_access.roles=admin"."""

    name: str
    value: str

    @classmethod
    def parse(cls, text: str) -> ClaimValue | None:
        """The claim and value of CLAIM=VALUE; None of an empty text."""
        name, _, value = text.partition("=")
        return cls(name.strip(), value.strip()) if text else None

    def is_in(self, claims: Mapping[str, Any]) -> bool:
        """Whether the claims have the value."""
        return self.value in _texts(claims, self.name)


@dataclass(frozen=True, slots=True)
class TokenRules:
    """Which tokens are accepted, and who their callers are.

    Attributes:
        audiences: one of them must be in `aud`, or in `client_id` of a token without `aud`; empty: any.
        required: what each token needs; None: nothing.
        admin: what the tokens of administrators have; None: there are no administrators.
        tenant_claim: the claim that names the tenant; empty: the application, by `APPLICATION_CLAIMS`.
    """

    audiences: frozenset[str]
    required: ClaimValue | None = None
    admin: ClaimValue | None = None
    tenant_claim: str = ""


@dataclass(frozen=True, slots=True)
class _Entry:
    caller: Caller
    until: float
    version: int


class _Algorithms(JWSRegistry):
    """Allows only `ALGORITHMS`. joserfc's own would warn of EdDSA, a name that providers still use."""

    max_header_length = MAX_HEADER_BYTES

    def get_alg(self, name: str) -> Any:
        if name not in ALGORITHMS:
            raise UnsupportedAlgorithmError
        return self.algorithms[name]


_ALGORITHMS = _Algorithms(strict_check_header=False)


class AccessTokens:
    """Recognizes the callers of tokens.

    Args:
        wall: Unix seconds.
    """

    def __init__(self, provider: OpenIdProvider, rules: TokenRules, wall: Callable[[], float] = time.time) -> None:
        self.provider = provider
        self._rules = rules
        self._wall = wall
        self._entries: dict[bytes, _Entry] = {}
        self._claims = JWTClaimsRegistry(
            now=lambda: int(wall()),
            leeway=LEEWAY_S,
            iss={"essential": True, "value": provider.issuer},
            exp={"essential": True},
        )

    @property
    def tenants(self) -> frozenset[str]:
        """The tenants of the tokens that are remembered."""
        return frozenset(entry.caller.tenant for entry in self._entries.values())

    async def caller(self, token: str, digest: bytes) -> Caller:
        """Returns the caller of a token.

        Args:
            digest: the SHA-256 of the token.

        Raises:
            UnauthenticatedError: the token is not valid; reason TOKEN_EXPIRED or TOKEN_INVALID.
            TokenNotAllowedError: it is valid, and its caller may not use this server.
            UnavailableError: the provider's keys cannot be read now.
        """
        entry = self._entries.get(digest)
        if entry is not None and self._is_valid(entry):
            return entry.caller
        claims = await self._verify(token)
        caller = self._caller(claims)
        self._remember(digest, caller, claims["exp"] + LEEWAY_S)
        return caller

    def _is_valid(self, entry: _Entry) -> bool:
        provider = self.provider
        return entry.version == provider.version and provider.is_current and self._wall() < entry.until

    def _remember(self, digest: bytes, caller: Caller, until: float) -> None:
        self._entries.pop(digest, None)
        if len(self._entries) >= MAX_TOKENS:
            del self._entries[next(iter(self._entries))]
        self._entries[digest] = _Entry(caller, min(until, self._wall() + REMEMBER_S), self.provider.version)

    async def _verify(self, token: str) -> Mapping[str, Any]:
        """The claims of a token whose signature and claims are right."""
        header, unverified = _parts(token)
        if not isinstance(alg := header.get("alg"), str) or alg not in ALGORITHMS:
            raise _invalid(f"its algorithm {alg!r} is not one of {', '.join(ALGORITHMS)}"[:200])
        if str(header.get("typ", "")).lower() not in TYPES or "crit" in header:
            raise _invalid("it is no access token")
        kid = header.get("kid")
        if kid is not None and not isinstance(kid, str):
            raise _invalid("its kid is no text")
        self._check_claims(unverified)  # before its key is looked for, so that tokens of others cause no reading
        key = await self.provider.key(kid)
        try:
            claims = jwt.decode(token, key, registry=_ALGORITHMS).claims
        except RecursionError:  # it reads the parts at a greater depth of the stack than `_parts`
            raise _invalid("it is malformed") from None
        except (JoseError, ValueError):  # the text of a JoseError may quote the token
            raise _invalid("its signature is wrong") from None
        self._check_claims(claims)  # those that were signed
        return claims

    def _check_claims(self, claims: Mapping[str, Any]) -> None:
        try:
            self._claims.validate(dict(claims))
        except ExpiredTokenError:
            raise UnauthenticatedError("the token has expired; get a new one", reason="TOKEN_EXPIRED") from None
        except MissingClaimError as error:
            raise _invalid(f"it has no claim {error.claim}") from None
        except ClaimError as error:
            fault = {
                "iss": f"it is not of {self.provider.issuer}",
                "nbf": "its time has not begun (nbf)",
                "iat": "it was issued in the future (iat)",
            }
            raise _invalid(fault.get(error.claim, f"its claim {error.claim} is malformed")) from None
        audience = "aud" if "aud" in claims else "client_id"  # Cognito's access tokens have no aud
        if self._rules.audiences and self._rules.audiences.isdisjoint(_texts(claims, audience)):
            raise _invalid(f"it is for another audience (claim {audience})")
        if not _is_for_access(claims):
            raise _invalid("it is no access token")
        if "cnf" in claims:
            raise _invalid("it is bound to a key of its client (cnf), which this server does not check")

    def _caller(self, claims: Mapping[str, Any]) -> Caller:
        rules = self._rules
        if rules.required is not None and not rules.required.is_in(claims):
            raise TokenNotAllowedError(f"the token needs {rules.required.value!r} in its claim {rules.required.name}")
        subject = _first(claims, ("sub", *APPLICATION_CLAIMS))
        if not subject:
            raise _invalid("it has neither sub nor client_id")
        names = (rules.tenant_claim,) if rules.tenant_claim else APPLICATION_CLAIMS
        tenant = _first(claims, names)
        if tenant is None:
            raise TokenNotAllowedError(f"the token's claim {names[0]} must be one text: it names the tenant")
        if not re.fullmatch(NAME, tenant):
            raise TokenNotAllowedError(f"the token's claim {names[0]} is no name of a tenant: must be {NAME_IN_WORDS}")
        return Caller(_name(subject), tenant, rules.admin is not None and rules.admin.is_in(claims))


def looks_like_a_token(credential: str) -> bool:
    """Whether a credential has the form of a signed JSON Web Token; API keys of this server have no dots."""
    return credential.startswith("eyJ") and credential.count(".") == 2


def _parts(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The header and the claims of a token, not verified."""
    if len(token) > MAX_BYTES:
        raise _invalid(f"it has more than {MAX_BYTES} bytes")
    # No character beside base64url, which decoders may skip: each variant of one token would be remembered.
    if not re.fullmatch(r"(?:[A-Za-z0-9_-]+\.){2}[A-Za-z0-9_-]*", token):
        raise _invalid("it is malformed")
    found = []
    for part in token.split(".")[:2]:
        try:
            content = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise _invalid("it is malformed")
        found.append(content)
    return found[0], found[1]


def _is_for_access(claims: Mapping[str, Any]) -> bool:
    """Whether nothing says that it is another kind of token, such as an ID token, which tells who has logged in."""
    named = [claims[name] == kind for name, kind in ACCESS.items() if name in claims]
    # What names its kind may have the other claims: Keycloak before 25 copied a login's nonce into access tokens.
    return all(named) if named else ID_TOKEN_CLAIMS.isdisjoint(claims)


def _texts(claims: Mapping[str, Any], name: str) -> list[str]:
    """The texts of a claim: its text, those of its list, or the words of a scope.

    A name with dots is a path where there is no claim of that whole name: Keycloak's "realm_access.roles".
    """
    value: Any = claims.get(name)
    if name not in claims:
        value = claims
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, str):
        return value.split() if name in ("scope", "scp") else [value]
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def _first(claims: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The text of the first of these claims that is there; None if it has not one text."""
    texts = next((found for name in names if (found := _texts(claims, name))), [])
    return texts[0] if len(texts) == 1 else None


def _name(subject: str) -> str:
    """A caller's name for a subject such as "auth0|5f7c": itself if it is a valid name, or else one with its hash."""
    if re.fullmatch(NAME, subject):
        return subject
    readable = re.sub(r"[^A-Za-z0-9._-]", "-", subject)[:47]
    digest = hashlib.sha256(subject.encode(errors="surrogatepass")).hexdigest()
    return f"{readable}-{digest[:16]}"


def _invalid(fault: str) -> UnauthenticatedError:
    return UnauthenticatedError(f"the token is not valid: {fault}", reason="TOKEN_INVALID")
