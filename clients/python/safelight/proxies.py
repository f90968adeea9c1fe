"""Which connections go through the HTTP proxy of the environment: none to this machine.

gRPC reads `grpc_proxy`, `https_proxy` and `http_proxy`, in this order, and the
exceptions in `no_grpc_proxy` and `no_proxy`; see "Environment Variables" in
gRPC's core documentation. It makes no exception for loopback addresses, so that
a workstation with a proxy could not reach a server on itself.
"""

from __future__ import annotations

import ipaddress
import os
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]  # typeshed lacks it on Linux

VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
EXCEPTIONS = ("no_grpc_proxy", "no_proxy")
NO_PROXY: tuple[str, int] = ("grpc.enable_http_proxy", 0)
"""The channel option with which gRPC ignores the proxy of the environment."""


def is_local(target: str) -> bool:
    """Whether a gRPC target is on this machine: a unix socket, `localhost` or a loopback address."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    host = _host(target)
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def channel_options(target: str) -> list[tuple[str, int]]:
    """The options that a channel to `target` needs, so that no proxy stands between this machine and itself."""
    return [NO_PROXY] if is_local(target) else []


def proxy_of(target: str) -> str:
    """The environment variable whose proxy gRPC uses for `target`, as "NAME=VALUE"; empty where it uses none.

    A user and a password in the value are left out.
    """
    if is_local(target):
        return ""
    name = _first_set(VARIABLES)
    exceptions = os.environ.get(_first_set(EXCEPTIONS), "")
    if not name or proxy_bypass_environment(_host(target), {"no": exceptions}):
        return ""
    scheme, separator, rest = os.environ[name].rpartition("://")
    return f"{name}={scheme}{separator}{rest.rpartition('@')[2]}"


def _first_set(names: tuple[str, ...]) -> str:
    return next((name for name in names if os.environ.get(name)), "")


def _host(target: str) -> str:
    """The host of "host:port", "[v6]:port", "ipv4:host:port" and "dns:///host:port"."""
    for scheme in ("dns:///", "dns:", "ipv4:", "ipv6:"):
        target = target.removeprefix(scheme)
    if target.startswith("["):
        return target[1:].partition("]")[0]
    return target if target.count(":") > 1 else target.partition(":")[0]
