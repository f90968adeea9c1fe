"""Builds what recognizes callers from the settings, for the server and the activator."""

from __future__ import annotations

import time
from collections.abc import Callable

from safelight_server.api.identity import Identity
from safelight_server.api.openid import OpenIdProvider
from safelight_server.api.tokens import AccessTokens, ClaimValue, TokenRules
from safelight_server.settings import Settings


def build_identity(settings: Settings, *, all_admins: bool = False, wall: Callable[[], float] = time.time) -> Identity:
    """Builds what recognizes callers by keys, by tokens or, where there are neither, by name.

    Args:
        all_admins: whether callers are administrators where there are neither.
        wall: Unix seconds.

    Raises:
        ConfigFileError: the file of the keys cannot be used.
    """
    tokens = None
    if settings.oidc_issuer:
        rules = TokenRules(
            settings.oidc_audiences,
            ClaimValue.parse(settings.oidc_required),
            ClaimValue.parse(settings.oidc_admin),
            settings.oidc_tenant_claim,
        )
        tokens = AccessTokens(OpenIdProvider(settings.oidc_issuer), rules, wall)
    return Identity(settings.api_key_file, all_admins=all_admins, tokens=tokens)
