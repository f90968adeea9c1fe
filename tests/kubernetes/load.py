"""Watching clients that go on while something happens to the pods, and compare every picture with an undisturbed one."""

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
    """What a client needs: who signed the server's certificate, and a key."""

    certificate: bytes
    api_key: str

    def client(self, target: str) -> safelight.Client:
        """A client of the service at HOST:PORT; patient, because a pod may take a while to start on a busy machine."""
        credentials = grpc.ssl_channel_credentials(self.certificate)
        return safelight.Client(
            target, api_key=self.api_key, credentials=credentials, server_name="safelight", patience_s=120.0
        )


@dataclass
class Load:
    """What clients have seen.

    Attributes:
        expected: digest of the undisturbed picture by seed.
        pictures: number of pictures that were equal.
        previews: number of previews.
        faults: what failed or differed, in words.
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
    """Develops a picture anew; the digest of its pixels, and how many previews came."""
    digest, previews = "", 0
    async for event in client.generate(PROMPT, seed=seed, cache="bypass", media_type="application/x-raw-rgba8"):
        if isinstance(event, safelight.Preview):
            previews += 1
        elif isinstance(event, safelight.Picture):
            digest = hashlib.sha256(event.data).hexdigest()
    return digest, previews


@asynccontextmanager
async def under_load(access: Access, target: str, expected: dict[int, str]) -> AsyncIterator[Load]:
    """Clients watch pictures develop while the block runs; each has a connection of its own and finishes its last one."""
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
