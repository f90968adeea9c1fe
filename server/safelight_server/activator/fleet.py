"""The replicas that take calls now, as DNS names them: a headless service of Kubernetes has the ready pods alone."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import structlog

log = structlog.get_logger(__name__)

LOOK_EVERY_S = 1.0
NO_SUCH_NAME = (socket.EAI_NONAME, socket.EAI_NODATA)
"""A name without an address. Any other failure says nothing of the replicas."""

Resolve = Callable[[], Awaitable[frozenset[str]]]


def by_dns(host: str, port: int) -> Resolve:
    """Looks up the addresses of a name.

    Returns:
        A function that returns them as HOST:PORT, none where the name has none. It raises OSError where DNS is away.
    """

    async def resolve() -> frozenset[str]:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            if error.errno in NO_SUCH_NAME:
                return frozenset()
            raise
        return frozenset(f"[{to[0]}]:{port}" if family == socket.AF_INET6 else f"{to[0]}:{port}"
                         for family, _, _, _, to in found)  # fmt: skip

    return resolve


class Fleet:
    """Knows the addresses of the replicas.

    Args:
        resolve: looks the addresses up.
        look_every_s: pause between two looks.
    """

    def __init__(self, resolve: Resolve, look_every_s: float = LOOK_EVERY_S) -> None:
        self._resolve = resolve
        self._look_every_s = look_every_s
        self._addresses: frozenset[str] = frozenset()

    @property
    def addresses(self) -> frozenset[str]:
        """HOST:PORT of the replicas at the last look."""
        return self._addresses

    async def follow(self) -> None:
        """Looks up the addresses until it is cancelled. While DNS is away it keeps those that it has."""
        failing = False
        while True:
            try:
                found = await self._resolve()
            except OSError as error:
                if not failing:
                    log.warning("replicas_unknown", error=str(error))
                failing = True
            else:
                failing = False
                if found != self._addresses:
                    log.info("replicas", addresses=sorted(found))
                    self._addresses = found
            await asyncio.sleep(self._look_every_s)
