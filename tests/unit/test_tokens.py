"""Tokens of an OpenID provider: which are accepted, who their callers are, and what happens when the provider fails.

The provider is real HTTP on loopback, with real signatures (tests/support/openid_provider.py).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from joserfc.jwk import ECKey, Key, OctKey, OKPKey, RSAKey
from safelight_server.api import openid, tokens
from safelight_server.api.identity import Identity
from safelight_server.api.openid import OpenIdProvider
from safelight_server.api.tokens import AccessTokens, ClaimValue, TokenRules
from safelight_server.domain.caller import NAME, Caller
from safelight_server.domain.errors import (
    SafelightError,
    TokenNotAllowedError,
    UnauthenticatedError,
    UnavailableError,
)
from structlog.testing import capture_logs

from tests.conftest import eventually
from tests.support.openid_provider import OpenIdService, openid_service

PEER = "ipv4:127.0.0.1:40000"
RULES = TokenRules(frozenset({"safelight", "an-app"}))


@pytest.fixture
def service() -> Iterator[OpenIdService]:
    with openid_service() as running:
        yield running


@pytest.fixture(scope="module")
def rsa() -> Key:
    return RSAKey.generate_key(2048, {"kid": "rsa"})


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine is no outage, and a pause does not end while a test is in it."""
    monkeypatch.setattr(openid, "TIMEOUT_S", 30.0)
    monkeypatch.setattr(openid, "PAUSE_S", 600.0)


@pytest.fixture
def quick(patient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between two readings are short."""
    monkeypatch.setattr(openid, "PAUSE_S", 0.001)


@contextlib.asynccontextmanager
async def reading(provider: OpenIdProvider) -> AsyncIterator[None]:
    """Reads the provider's keys while the block runs."""
    following = asyncio.create_task(provider.follow())
    try:
        yield
    finally:
        following.cancel()
        await asyncio.wait([following])


@contextlib.asynccontextmanager
async def recognizing(
    service: OpenIdService, rules: TokenRules = RULES, key_file: Path | None = None, wall=time.time
) -> AsyncIterator[Identity]:
    provider = OpenIdProvider(service.issuer)
    async with reading(provider):
        yield Identity(key_file, tokens=AccessTokens(provider, rules, wall))


async def caller_of(identity: Identity, token: str) -> Caller:
    return await identity.recognize([("authorization", f"Bearer {token}")], PEER)


async def refusal(identity: Identity, token: str) -> SafelightError:
    with pytest.raises(SafelightError) as refused:
        await caller_of(identity, token)
    return refused.value


def unsigned(header: object, claims: object) -> str:
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in (header, claims)]
    return ".".join([*parts, ""])


# --- which are accepted ---


@pytest.mark.parametrize("alg", ["RS256", "PS256", "ES256", "EdDSA", "Ed25519"])
async def test_the_signatures_of_providers_are_accepted(service: OpenIdService, rsa: Key, alg: str) -> None:
    kinds = {"ES256": service.key, "EdDSA": OKPKey.generate_key("Ed25519", {"kid": "edwards"})}
    service.use(rsa if alg in ("RS256", "PS256") else kinds.get(alg, kinds["EdDSA"]))
    async with recognizing(service) as identity:
        assert await caller_of(identity, service.token(alg=alg)) == Caller("ann", "studio")


async def test_a_token_without_a_signature_is_refused(service: OpenIdService) -> None:
    claims = {"iss": service.issuer, "sub": "eve", "aud": "safelight", "client_id": "studio", "exp": time.time() + 60}
    async with recognizing(service) as identity:
        assert (await refusal(identity, unsigned({"alg": "none", "kid": "first"}, claims))).reason == "TOKEN_INVALID"


async def test_a_token_signed_with_a_public_key_as_a_secret_is_refused(service: OpenIdService, rsa: Key) -> None:
    service.use(rsa)
    claims = {"iss": service.issuer, "sub": "eve", "aud": "safelight", "client_id": "studio", "exp": time.time() + 60}
    signed = unsigned({"alg": "HS256", "kid": "rsa"}, claims).removesuffix(".")
    signature = hmac.digest(rsa.as_pem(private=False), signed.encode(), "sha256")
    token = f"{signed}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"
    async with recognizing(service) as identity:
        assert "HS256" in (await refusal(identity, token)).message


async def test_a_key_set_with_a_secret_is_of_no_use(service: OpenIdService) -> None:
    secret = OctKey.generate_key(256, {"kid": "secret"})
    service.published.append(secret.as_dict(private=True))
    async with recognizing(service) as identity:
        assert (await refusal(identity, service.token(alg="HS256", key=secret))).reason == "TOKEN_INVALID"
        assert await caller_of(identity, service.token())


async def test_the_signature_is_of_the_providers_key_and_of_these_claims(service: OpenIdService) -> None:
    forger = ECKey.generate_key("P-256", {"kid": "first"})
    async with recognizing(service) as identity:
        forged = service.token(key=forger)
        header, _, signature = service.token().split(".")
        changed = ".".join([header, service.token(sub="eve").split(".")[1], signature])
        for token in (forged, changed):
            assert (await refusal(identity, token)).message == "the token is not valid: its signature is wrong"


@pytest.mark.parametrize(
    ("claims", "fault"),
    [
        ({"iss": "https://elsewhere"}, "it is not of http://127.0.0.1"),
        ({"iss": None}, "it has no claim iss"),
        ({"exp": None}, "it has no claim exp"),
        ({"exp": "soon"}, "its claim exp is malformed"),
        ({"exp": float("inf")}, "its claim exp is malformed"),
        ({"nbf": 9_999_999_999}, "its time has not begun"),
        ({"iat": 9_999_999_999}, "it was issued in the future"),
        ({"aud": "elsewhere"}, "it is for another audience (claim aud)"),
        ({"aud": ["elsewhere", "nowhere"]}, "it is for another audience (claim aud)"),
        ({"aud": []}, "it is for another audience (claim aud)"),
        ({"aud": [], "client_id": "an-app"}, "it is for another audience (claim aud)"),
        ({"aud": {"safelight": 1}}, "its claim aud is malformed"),
        ({"aud": None, "client_id": "another-app"}, "it is for another audience (claim client_id)"),
        ({"token_use": "id"}, "it is no access token"),
        ({"typ": "ID"}, "it is no access token"),
        ({"nonce": "n"}, "it is no access token"),
        ({"at_hash": "h"}, "it is no access token"),
        ({"c_hash": "h"}, "it is no access token"),
        ({"token_use": "access", "typ": "ID"}, "it is no access token"),
        ({"cnf": {"jkt": "x"}}, "it is bound to a key of its client"),
        ({"sub": None, "client_id": None}, "it has neither sub nor client_id"),
    ],
)
async def test_a_token_with_a_wrong_claim_is_refused_and_the_claim_is_named(
    service: OpenIdService, claims: dict[str, object], fault: str
) -> None:
    async with recognizing(service) as identity:
        refused = await refusal(identity, service.token(**claims))
    assert isinstance(refused, UnauthenticatedError)
    assert refused.reason == "TOKEN_INVALID"
    assert refused.message.startswith(f"the token is not valid: {fault}")


@pytest.mark.parametrize("typ", ["logout+jwt", "secevent+jwt"])
async def test_other_tokens_of_the_provider_are_no_credentials(service: OpenIdService, typ: str) -> None:
    async with recognizing(service) as identity:
        assert "no access token" in (await refusal(identity, service.token(header={"typ": typ}))).message
        assert await caller_of(identity, service.token(header={"typ": "at+JWT"}))


async def test_a_token_that_says_it_is_for_access_may_have_a_nonce(service: OpenIdService) -> None:
    """Keycloak before 25 copies the nonce of the login into access tokens."""
    async with recognizing(service) as identity:
        for kind in ({"typ": "Bearer"}, {"token_use": "access"}):
            assert await caller_of(identity, service.token(nonce="n", **kind))


async def test_an_expired_token_is_refused_with_a_reason_of_its_own(service: OpenIdService) -> None:
    now = time.time()
    async with recognizing(service, wall=lambda: now) as identity:
        assert await caller_of(identity, service.token(exp=int(now) - 20)), "clocks may differ by 30 s"
        refused = await refusal(identity, service.token(exp=int(now) - 31))
    assert (refused.reason, refused.status.name) == ("TOKEN_EXPIRED", "UNAUTHENTICATED")


async def test_cognitos_access_tokens_have_a_client_id_and_no_audience(service: OpenIdService) -> None:
    rules = TokenRules(frozenset({"an-app"}), ClaimValue.parse("scope=safelight/generate"))
    cognito = {"aud": None, "client_id": "an-app", "sub": "an-app", "token_use": "access", "version": 2}
    async with recognizing(service, rules) as identity:
        token = service.token(**cognito, scope="other/read safelight/generate")
        assert await caller_of(identity, token) == Caller("an-app", "an-app")
        refused = await refusal(identity, service.token(**cognito, scope="safelight/generate-not other/read"))
    assert isinstance(refused, TokenNotAllowedError)
    assert "'safelight/generate'" in refused.message


@pytest.mark.parametrize("part", range(3))
async def test_a_token_has_no_variants(service: OpenIdService, part: int) -> None:
    async with recognizing(service) as identity:
        assert await caller_of(identity, service.token())
        for more in ("=", "==", " ", "\n", "+", "/", "!", "\u00e9"):
            parts = service.token().split(".")
            parts[part] = parts[part][:8] + more + parts[part][8:]
            assert (await refusal(identity, ".".join(parts))).message == "the token is not valid: it is malformed"


@given(token=st.text(st.characters(codec="utf-8"), max_size=80).map(lambda text: "eyJ" + text))
@example("eyJ.e30.x")
@example("eyJhbGciOiAiRVMyNTYifQ." + base64.b64encode(b"[" * 9000).decode() + ".x")
@example("eyJ" + "x" * 20_000 + "..")
@example(unsigned(["alg"], {}))
@example(unsigned({"alg": "ES256", "kid": 5}, {}))
@example(unsigned({"alg": ["ES256"]}, {}))
@example(unsigned({"alg": "ES256", "typ": 5}, {}))
@example(unsigned({"alg": "ES256", "crit": ["b64"], "b64": False}, {}))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_text_breaks_the_check_of_a_token(token: str) -> None:
    identity = Identity(None, tokens=AccessTokens(OpenIdProvider("https://provider"), RULES))
    with pytest.raises(UnauthenticatedError):
        identity.recognize([("authorization", f"Bearer {token}")], PEER).send(None)


async def test_a_header_that_is_nested_too_deeply_for_one_of_its_readers_is_malformed(service: OpenIdService) -> None:
    """It is read twice, at two depths of the stack. The deepest nesting that each can read lies in this range."""
    limit, seen = sys.getrecursionlimit(), set()
    async with recognizing(service) as identity:
        for depth in range(limit - 150, limit):
            header = f'{{"alg": "ES256", "kid": "first", "x": {"[" * depth + "]" * depth}}}'
            encoded = base64.urlsafe_b64encode(header.encode()).decode().rstrip("=")
            _, claims, signature = service.token().split(".")
            seen.add((await refusal(identity, f"{encoded}.{claims}.{signature}")).message)
    assert seen == {f"the token is not valid: {fault}" for fault in ("it is malformed", "its signature is wrong")}


# --- who the callers are ---


@pytest.mark.parametrize(
    ("tenant_claim", "claims", "tenant"),
    [
        ("", {}, "studio"),
        ("", {"client_id": None, "azp": "portal"}, "portal"),
        ("", {"client_id": None, "appid": "portal"}, "portal"),
        ("", {"client_id": None, "cid": "portal"}, "portal"),
        ("sub", {}, "ann"),
        ("custom:tenant", {"custom:tenant": "lab"}, "lab"),
        ("https://example.com/tenant", {"https://example.com/tenant": "lab"}, "lab"),
        ("organization.name", {"organization": {"name": "lab"}}, "lab"),
        ("organization", {"organization": ["lab"]}, "lab"),
    ],
)
async def test_a_claim_names_the_tenant(service: OpenIdService, tenant_claim: str, claims: dict, tenant: str) -> None:
    async with recognizing(service, TokenRules(RULES.audiences, tenant_claim=tenant_claim)) as identity:
        assert await caller_of(identity, service.token(**claims)) == Caller("ann", tenant)
        assert identity.tenants == {tenant}


@pytest.mark.parametrize("value", [None, 5, [], ["lab", "studio"], {"name": "lab"}, "a/b", "", "x" * 65, "lab\n"])
async def test_a_token_without_a_valid_tenant_is_refused(service: OpenIdService, value: object) -> None:
    """Two tenants must never become one, so that their names are not changed to valid ones."""
    async with recognizing(service, TokenRules(RULES.audiences, tenant_claim="tenant")) as identity:
        refused = await refusal(identity, service.token(tenant=value))
    assert isinstance(refused, TokenNotAllowedError)
    assert "claim tenant" in refused.message


async def test_a_subject_that_is_no_name_becomes_one_of_its_own(service: OpenIdService) -> None:
    async with recognizing(service) as identity:
        names = [
            (await caller_of(identity, service.token(sub=subject))).name
            for subject in ("auth0|5f7c", "auth0-5f7c", "auth0/5f7c", "x" * 64, "x" * 65, "x" * 66, "é", "\ud800")
        ]
    assert names[1] == "auth0-5f7c"
    assert len(set(names)) == len(names)
    assert all(tokens.re.fullmatch(NAME, name) for name in names)


@pytest.mark.parametrize(
    ("admin", "claims", "is_admin"),
    [
        ("", {"scope": "safelight/admin", "groups": ["admins"]}, False),
        ("scope=safelight/admin", {"scope": "safelight/generate safelight/admin"}, True),
        ("scope=safelight/admin", {"scope": "safelight/administer"}, False),
        ("scope=safelight/admin", {"scp": "safelight/admin"}, False),
        ("cognito:groups=admins", {"cognito:groups": ["users", "admins"]}, True),
        ("cognito:groups=admins", {"cognito:groups": "not admins"}, False),
        ("realm_access.roles=admin", {"realm_access": {"roles": ["admin"]}}, True),
        ("realm_access.roles=admin", {"realm_access": ["roles"]}, False),
    ],
)
async def test_a_claim_makes_an_administrator(service: OpenIdService, admin: str, claims: dict, is_admin: bool) -> None:
    rules = TokenRules(RULES.audiences, admin=ClaimValue.parse(admin))
    async with recognizing(service, rules) as identity:
        assert (await caller_of(identity, service.token(**claims))).is_admin is is_admin


# --- keys and tokens on the same header ---


async def test_a_key_stays_a_key_and_a_token_a_token(service: OpenIdService, tmp_path: Path) -> None:
    """Also a key that looks like a token."""
    file = tmp_path / "keys.json"
    odd = "eyJhbGciOiJub25lIn0.e30."
    entries = [
        {"sha256": hashlib.sha256(key.encode()).hexdigest(), "caller": "game", "tenant": "keyed"} for key in ("k", odd)
    ]
    file.write_text(json.dumps({"keys": entries}))
    async with recognizing(service, key_file=file) as identity:
        for key in ("k", odd):
            assert await caller_of(identity, key) == Caller("game", "keyed")
        assert await caller_of(identity, service.token()) == Caller("ann", "studio")
        assert identity.tenants == {"keyed", "studio"}
        refused = await refusal(identity, "unknown")
        assert (refused.reason, service.issuer in refused.message) == ("UNAUTHENTICATED", True)
        for metadata in ([], [("authorization", f"Basic {service.token()}")], [("safelight-caller", "ann")]):
            with pytest.raises(UnauthenticatedError):
                await identity.recognize(metadata, PEER)


# --- what a call costs ---


async def test_a_token_is_checked_once_until_it_expires(
    service: OpenIdService, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    decode, checked = tokens.jwt.decode, []
    monkeypatch.setattr(tokens.jwt, "decode", lambda token, *a, **b: checked.append(token) or decode(token, *a, **b))
    token = service.token(exp=int(now) + 60)
    async with recognizing(service, wall=lambda: now) as identity:
        for _ in range(3):
            assert await caller_of(identity, token)
        assert checked == [token]
        now += 91
        assert (await refusal(identity, token)).reason == "TOKEN_EXPIRED"


async def test_tokens_that_are_remembered_are_bounded(service: OpenIdService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MAX_TOKENS", 3)
    async with recognizing(service) as identity:
        for number in range(8):
            assert await caller_of(identity, service.token(client_id=f"app-{number}"))
        assert identity.tenants == {"app-5", "app-6", "app-7"}


# --- the provider ---


async def test_a_new_key_is_read_when_a_token_names_it_and_a_withdrawn_one_ends(
    service: OpenIdService, quick: None
) -> None:
    async with recognizing(service) as identity:
        old = service.token()
        assert await caller_of(identity, old)
        service.use(ECKey.generate_key("P-256", {"kid": "second"}))
        await eventually_recognized(identity, service.token())
        assert (await refusal(identity, old)).reason in ("TOKEN_INVALID", "TOKEN_KEY_UNKNOWN"), "also if remembered"


async def eventually_recognized(identity: Identity, token: str) -> None:
    """Retries as a client does that is told to."""
    for _ in range(2000):
        try:
            await caller_of(identity, token)
            return
        except UnavailableError as error:
            assert error.retry_after_s
            await asyncio.sleep(0.005)
    raise AssertionError("it was never recognized")


async def test_a_storm_of_unknown_keys_causes_one_reading(service: OpenIdService) -> None:
    async with recognizing(service) as identity:
        assert await caller_of(identity, service.token())
        for number in range(50):
            refused = await refusal(identity, service.token(key=ECKey.generate_key("P-256", {"kid": f"{number}"})))
            assert (refused.status.name, refused.reason) == ("UNAVAILABLE", "TOKEN_KEY_UNKNOWN")
            assert 0 < refused.retry_after_s <= openid.PAUSE_S
            await asyncio.sleep(0)  # lets the reader run
        assert service.num_readings == 1


async def test_callers_that_want_an_unknown_key_together_wait_for_one_reading(
    service: OpenIdService, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = OpenIdProvider(service.issuer)
    identity = Identity(None, tokens=AccessTokens(provider, RULES))
    strange = [service.token(key=ECKey.generate_key("P-256", {"kid": f"{number}"})) for number in range(20)]
    waiting = [asyncio.create_task(refusal(identity, token)) for token in strange]
    known = asyncio.create_task(caller_of(identity, service.token()))
    await asyncio.sleep(0)
    async with reading(provider):
        assert {refused.reason for refused in await asyncio.gather(*waiting)} == {"TOKEN_INVALID"}
        assert await known == Caller("ann", "studio")
    assert service.num_readings == 1


async def test_a_reading_that_had_begun_before_the_call_says_nothing_of_a_newer_key(service: OpenIdService) -> None:
    """The provider may have signed with a new key right after it sent the others. The call can succeed soon."""
    service.answers.clear()
    async with recognizing(service) as identity:
        try:
            await eventually(lambda: service.num_readings == 1)
            known, newer = service.token(), service.token(key=ECKey.generate_key("P-256", {"kid": "newer"}))
            waiting = asyncio.create_task(refusal(identity, newer))
            await asyncio.sleep(0)  # it waits for the reading
        finally:
            service.answers.set()
        refused = await waiting
        assert (refused.status.name, refused.reason) == ("UNAVAILABLE", "TOKEN_KEY_UNKNOWN")
        assert await caller_of(identity, known)


async def test_without_the_provider_a_token_is_not_refused_but_not_known_yet(
    service: OpenIdService, quick: None, tmp_path: Path
) -> None:
    """The call can succeed later, and keys work all the time."""
    service.broken = True
    file = tmp_path / "keys.json"
    entry = {"sha256": hashlib.sha256(b"k").hexdigest(), "caller": "game", "tenant": "keyed"}
    file.write_text(json.dumps({"keys": [entry]}))
    async with recognizing(service, key_file=file) as identity:
        refused = await refusal(identity, service.token())
        assert (refused.status.name, refused.reason) == ("UNAVAILABLE", "IDENTITY_PROVIDER_UNAVAILABLE")
        assert refused.retry_after_s
        assert await caller_of(identity, "k") == Caller("game", "keyed")
        service.broken = False
        await eventually_recognized(identity, service.token())


async def test_an_outage_changes_nothing_for_known_keys_for_a_day(service: OpenIdService, quick: None) -> None:
    now = 1000.0
    provider = OpenIdProvider(service.issuer, lambda: now)
    identity = Identity(None, tokens=AccessTokens(provider, RULES))
    async with reading(provider):
        assert await caller_of(identity, service.token())
        service.broken = True
        unknown = ECKey.generate_key("P-256", {"kid": "unknown"})
        await eventually_reason(identity, service.token(key=unknown), "IDENTITY_PROVIDER_UNAVAILABLE")
        now += openid.EXPIRE_S
        remembered = service.token(sub="bob")
        assert await caller_of(identity, remembered)
        now += 1
        for token in (remembered, service.token(sub="eve")):
            assert (await refusal(identity, token)).reason == "IDENTITY_PROVIDER_UNAVAILABLE"


async def eventually_reason(identity: Identity, token: str, reason: str) -> None:
    for _ in range(2000):
        if (await refusal(identity, token)).reason == reason:
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"it was never refused with {reason}")


@pytest.mark.parametrize(
    "fault",
    [
        lambda service: service.discovered.update(issuer="https://elsewhere"),
        lambda service: service.discovered.pop("jwks_uri"),
        lambda service: service.discovered.update(jwks_uri="file:///etc/passwd"),
        lambda service: service.discovered.update(jwks_uri=service.issuer + "/nowhere"),
        lambda service: setattr(service, "published", None),
        lambda service: setattr(service, "published", {"first": service.published[0]}),
        lambda service: service.discovered.update(padding="x" * openid.MAX_BYTES),
        lambda service: setattr(service, "discovered", b"[]"),
        lambda service: setattr(service, "discovered", b'{"a":' * 100_000),
    ],
)
async def test_what_is_wrong_with_the_provider_is_no_fault_of_the_token(service: OpenIdService, fault) -> None:
    fault(service)
    async with recognizing(service) as identity, asyncio.timeout(20):  # a call waits longer for who does not answer
        assert (await refusal(identity, service.token())).reason == "IDENTITY_PROVIDER_UNAVAILABLE"


@pytest.mark.parametrize(("variable", "value"), [("SSL_CERT_FILE", "/nowhere.pem"), ("HTTPS_PROXY", "ftp://x")])
async def test_an_environment_without_a_way_to_the_provider_is_a_fault_too(
    monkeypatch: pytest.MonkeyPatch, quick: None, variable: str, value: str
) -> None:
    """Calls are refused at once, and it is tried again: the file may come."""
    monkeypatch.setenv(variable, value)
    provider, tries = OpenIdProvider("https://provider.invalid"), []
    make = openid.httpx2.AsyncClient
    monkeypatch.setattr(openid.httpx2, "AsyncClient", lambda **given: tries.append(1) or make(**given))
    async with reading(provider):
        async with asyncio.timeout(20):  # a call waits longer for who does not answer
            with pytest.raises(UnavailableError) as refused:
                await provider.key("first")
        assert refused.value.reason == "IDENTITY_PROVIDER_UNAVAILABLE"
        await eventually(lambda: len(tries) > 1)


@pytest.mark.parametrize(
    "withdraw",
    [
        lambda service: service.published.clear(),
        lambda service: service.published.__setitem__(0, 5),
        lambda service: service.published.__setitem__(0, {"kty": ["EC"]}),
        lambda service: service.published.__setitem__(0, service.published[0] | {"use": "enc"}),
        lambda service: service.published.__setitem__(0, {"kty": "RSA", "kid": "first", "n": "AQAB", "e": "AQAB"}),
    ],
)
async def test_a_provider_that_withdraws_its_last_key_is_no_outage(
    service: OpenIdService, quick: None, monkeypatch: pytest.MonkeyPatch, withdraw
) -> None:
    """A stolen key ends at the next reading, also for tokens that are remembered."""
    monkeypatch.setattr(openid, "REFRESH_S", 0.005)
    monkeypatch.setattr(openid, "log", structlog.get_logger())  # one that no earlier test has made keep its settings
    provider = OpenIdProvider(service.issuer)
    identity = Identity(None, tokens=AccessTokens(provider, RULES))
    async with reading(provider):
        remembered = service.token()
        assert await caller_of(identity, remembered)
        version = provider.version
        with capture_logs() as logged:
            withdraw(service)
            await eventually(lambda: provider.version > version)
            assert [(entry["event"], entry["log_level"], entry["keys"]) for entry in logged] == [
                ("openid_keys_read", "error", 0)
            ]
        for token in (remembered, service.token(sub="eve")):
            assert (await refusal(identity, token)).reason in ("TOKEN_INVALID", "TOKEN_KEY_UNKNOWN")


async def test_a_token_that_names_no_key_is_of_the_only_one_that_can_be_used(service: OpenIdService, rsa: Key) -> None:
    """Keys for other algorithms do not count. Of several it must name one (OpenID Connect Core 1.0, section 10.1)."""
    others = [ECKey.generate_key(curve, {"kid": curve}) for curve in ("P-384", "secp256k1")]
    others += [OKPKey.generate_key("X25519", {"kid": "agreement"}), OctKey.generate_key(256, {"kid": "secret"})]
    service.published += [key.as_dict(private=False) for key in others]
    service.published.append(rsa.as_dict(private=False) | {"alg": "RSA-OAEP"})
    async with recognizing(service) as identity:
        assert await caller_of(identity, service.token(header={"kid": None}))
    service.published.append(ECKey.generate_key("P-256", {"kid": "second"}).as_dict(private=False))
    async with recognizing(service) as identity:
        assert await caller_of(identity, service.token())
        refused = await refusal(identity, service.token(header={"kid": None}))
        assert (refused.reason, "names no key (kid)" in refused.message) == ("TOKEN_INVALID", True)
