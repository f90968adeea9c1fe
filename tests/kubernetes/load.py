"""Clients that request pictures while pods are disturbed, and compare every picture with an undisturbed one."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import safelight

from tests.conftest import eventually

PROMPT = "a glowing red potion on a dark background"
SEEDS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Access:
    """What a client needs: the certificate authority of the server, and an API key."""

    certificate: bytes
    api_key: str

    def client(self, target: str) -> safelight.Client:
        """A client of the service at HOST:PORT, with long patience, since a pod may start slowly on a busy machine."""
        credentials = grpc.ssl_channel_credentials(self.certificate)
        return safelight.Client(
            target, api_key=self.api_key, credentials=credentials, server_name="safelight", patience_s=120.0
        )


@dataclass
class Load:
    """What clients have received.

    Attributes:
        expected: digest of the undisturbed picture, by seed.
        pictures: number of pictures that were equal.
        previews: number of previews.
        faults: descriptions of failures and differences.
    """

    expected: dict[int, str]
    pictures: int = 0
    previews: int = 0
    faults: list[str] = field(default_factory=list)
    by_seed: Counter[int] = field(default_factory=Counter)

    async def watch(self, client: safelight.Client, seed: int, ending: asyncio.Event) -> None:
        """Develops the picture of a seed again and again."""
        while not ending.is_set():
            try:
                digest, previews = await develop(client, seed)
            except safelight.GenerationError as error:
                self.faults.append(f"seed {seed}: {error.code} {error.reason} {error}")
                continue
            self.previews += previews
            if digest == self.expected[seed]:
                self.pictures += 1
                self.by_seed[seed] += 1
            else:
                self.faults.append(f"seed {seed}: another picture")


async def develop(client: safelight.Client, seed: int) -> tuple[str, int]:
    """Develops a picture without the cache; returns the digest of its pixels and the number of previews."""
    digest, previews = "", 0
    async for event in client.generate(PROMPT, seed=seed, cache="bypass", media_type="application/x-raw-rgba8"):
        if isinstance(event, safelight.Preview):
            previews += 1
        elif isinstance(event, safelight.Picture):
            digest = hashlib.sha256(event.data).hexdigest()
    return digest, previews


@asynccontextmanager
async def under_load(access: Access, target: str, expected: dict[int, str]) -> AsyncIterator[Load]:
    """Runs clients during the block, each with a connection of its own; each finishes its last picture."""
    load, ending = Load(expected), asyncio.Event()
    clients = [access.client(target) for _ in SEEDS]
    async with asyncio.TaskGroup() as group:
        for client, seed in zip(clients, SEEDS, strict=True):
            group.create_task(load.watch(client, seed, ending))
        try:
            await eventually(lambda: set(load.by_seed) == set(SEEDS) or bool(load.faults), 200.0)
            yield load
        finally:
            ending.set()
    for client in clients:
        await client.close()
