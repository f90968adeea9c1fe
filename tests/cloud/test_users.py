"""The user pool of deploy/terraform in moto, and the server's check of access tokens that moto signs as Cognito does.

moto has no client credentials. So the token is that of a user who signs in, of a pool of the test's own.
"""

from __future__ import annotations

import asyncio
import hashlib

import pytest
import yaml
from safelight_server.api import openid
from safelight_server.api.openid import OpenIdProvider
from safelight_server.api.tokens import AccessTokens, ClaimValue, TokenRules
from safelight_server.domain.errors import SafelightError, TokenNotAllowedError
from safelight_server.settings import load


@pytest.fixture
def pool(fleet) -> str:
    """The id of the fleet's user pool."""
    return fleet.succeed("output", "-raw", "user_pool_id").strip()


def test_applications_have_their_scopes_and_secrets_and_nobody_signs_up(fleet, client, pool):
    cognito = client("cognito-idp")
    found = cognito.describe_user_pool(UserPoolId=pool)["UserPool"]
    assert found["AdminCreateUserConfig"]["AllowAdminCreateUserOnly"]
    assert found["Policies"]["PasswordPolicy"]["MinimumLength"] == 16
    [server] = cognito.list_resource_servers(UserPoolId=pool, MaxResults=10)["ResourceServers"]
    assert (server["Identifier"], {scope["ScopeName"] for scope in server["Scopes"]}) == (
        "safelight",
        {"generate", "admin"},
    )
    clients = {}
    for each in cognito.list_user_pool_clients(UserPoolId=pool, MaxResults=10)["UserPoolClients"]:
        known = cognito.describe_user_pool_client(UserPoolId=pool, ClientId=each["ClientId"])["UserPoolClient"]
        clients[known["ClientName"]] = known
    assert {name: set(each["AllowedOAuthScopes"]) for name, each in clients.items()} == {
        "studio": {"safelight/generate"},
        "operators": {"safelight/generate", "safelight/admin"},
    }
    for each in clients.values():
        assert (each["AllowedOAuthFlows"], bool(each["ClientSecret"])) == (["client_credentials"], True)
    domain = cognito.describe_user_pool_domain(Domain="safelight-123456789012")["DomainDescription"]
    assert domain["UserPoolId"] == pool
    assert fleet.succeed("output", "-raw", "token_url").startswith("https://safelight-123456789012.auth.us-east-1.")


def test_the_server_takes_the_settings_of_the_chart(fleet, pool):
    settings = yaml.safe_load(fleet.succeed("output", "-raw", "helm_values"))["settings"]
    given = {name: value for name, value in settings.items() if name.startswith("oidc_")}
    loaded = load(**given)
    assert loaded.oidc_issuer == f"https://cognito-idp.us-east-1.amazonaws.com/{pool}"
    assert (loaded.oidc_required, loaded.oidc_admin) == ("scope=safelight/generate", "scope=safelight/admin")


async def test_the_server_checks_a_token_that_cognito_has_signed(client, endpoint, monkeypatch):
    cognito = client("cognito-idp")
    pool = cognito.create_user_pool(PoolName="people")["UserPool"]["Id"]
    application = cognito.create_user_pool_client(
        UserPoolId=pool, ClientName="people", ExplicitAuthFlows=["ALLOW_ADMIN_USER_PASSWORD_AUTH"]
    )["UserPoolClient"]["ClientId"]
    cognito.admin_create_user(UserPoolId=pool, Username="ann")
    cognito.admin_set_user_password(UserPoolId=pool, Username="ann", Password="Correct-horse-1-battery", Permanent=True)
    signed_in = cognito.admin_initiate_auth(
        UserPoolId=pool,
        ClientId=application,
        AuthFlow="ADMIN_USER_PASSWORD_AUTH",
        AuthParameters={"USERNAME": "ann", "PASSWORD": "Correct-horse-1-battery"},
    )["AuthenticationResult"]
    issuer = f"https://cognito-idp.us-east-1.amazonaws.com/{pool}"
    document = openid._document

    async def from_moto(http, url):
        """moto has the pool's keys at its own address."""
        if url.endswith(openid.DISCOVERY_PATH):
            return {"issuer": issuer, "jwks_uri": f"{issuer}/.well-known/jwks.json"}
        headers = {"authorization": "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/cognito-idp/aws4_request"}
        http.headers.update(headers)  # by which moto finds the service
        return await document(http, url.replace("https://cognito-idp.us-east-1.amazonaws.com", endpoint))

    monkeypatch.setattr(openid, "_document", from_moto)
    monkeypatch.setattr(openid, "TIMEOUT_S", 30.0)

    async def caller(rules: TokenRules, token: str):
        tokens = AccessTokens(OpenIdProvider(issuer), rules)
        following = asyncio.create_task(tokens.provider.follow())
        try:
            return await tokens.caller(token, hashlib.sha256(token.encode()).digest())
        finally:
            following.cancel()
            await asyncio.wait([following])

    access = signed_in["AccessToken"]
    found = await caller(TokenRules(frozenset({application})), access)
    assert found.tenant == application
    with pytest.raises(TokenNotAllowedError):
        await caller(TokenRules(frozenset(), ClaimValue.parse("scope=safelight/generate")), access)
    with pytest.raises(SafelightError, match="no access token"):
        await caller(TokenRules(frozenset({application})), signed_in["IdToken"])
