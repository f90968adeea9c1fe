"""Runs replicas of the server as real processes on one Redis, and clients that move between them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import grpc
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight_server.cluster.bills import BILL
from safelight_server.coordination.redis import RedisCoordinator
from safelight_server.storage.breaker import Breaker
from safelight_server.storage.keyring import Keyring
from safelight_server.storage.redis import RedisConnection
from safelight_server.storage.sealed import Sealer

from load_tests.ports import free_port
from tests.conftest import MODELS
from tests.support.warm_server import ServerProcess

TTL_S = 1.5
"""Lease time in seconds: short, so that a dead replica is soon replaced, yet long enough for two busy cores."""


class Replica:
    """`safelight serve` in a process of its own, with the simulated runtime unless `settings` say otherwise."""

    def __init__(self, redis_url: str, keys: Path, folder: Path, **settings: object) -> None:
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        given = {
            "port": self.port,
            "models_dir": MODELS,
            "runtime": "simulated",
            "simulated_base_ms": 30,
            "num_instances": 1,
            "redis_url": redis_url,
            "redis_timeout_ms": 2000,
            "lease_ttl_s": TTL_S,
            "cache_key_file": keys,
            "checkpoint_every_n_steps": 2,
            "log_format": "json",
        } | settings
        self._environment = {f"SAFELIGHT_{name.upper()}": str(value) for name, value in given.items()}
        self._log = folder / f"replica-{self.port}.log"
        self._process: ServerProcess | None = None
        self.channel: grpc.aio.Channel | None = None

    @property
    def stub(self) -> stubs.GenerationServiceStub:
        """A stub on this replica's channel."""
        return stubs.GenerationServiceStub(self.open())

    def open(self) -> grpc.aio.Channel:
        """This replica's channel."""
        if self.channel is None:
            # Calls begin before it listens, and on a busy machine it starts slowly.
            options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 1000)]
            self.channel = grpc.aio.insecure_channel(self.address, options)
        return self.channel

    async def start(self) -> None:
        """Starts the process and waits until it accepts calls."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SAFELIGHT_")}
        self._process = ServerProcess(environment | self._environment, self._log)
        _ = self.stub
        assert self.channel is not None
        try:
            await asyncio.wait_for(self.channel.channel_ready(), 60)
        except TimeoutError:
            raise AssertionError(self._log.read_text()) from None

    def signal(self, number: int) -> None:
        """Sends a signal to the process."""
        assert self._process is not None
        self._process.send_signal(number)

    @property
    def is_running(self) -> bool:
        """Whether it has been started and not killed since."""
        return self._process is not None

    async def kill(self) -> None:
        """Kills the process with SIGKILL, before anything more happens in it, and closes the channel."""
        if self._process is not None:
            self._process.kill()
            self._process = None
        if self.channel is not None:
            await self.channel.close()
            self.channel = None

    def lines(self, event: str) -> list[dict[str, object]]:
        """The JSON log lines with this event."""
        found = []
        for line in self._log.read_text().splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and entry.get("event") == event:
                    found.append(entry)
        return found


@contextlib.asynccontextmanager
async def replicas(redis_url: str, folder: Path, count: int = 2, **settings: object) -> AsyncIterator[list[Replica]]:
    """Runs `count` replicas with one key file during the block."""
    keys = key_file(folder)
    made = [Replica(redis_url, keys, folder, **settings) for _ in range(count)]
    try:
        await asyncio.gather(*(replica.start() for replica in made))
        yield made
    finally:
        for replica in made:
            await replica.kill()


def key_file(folder: Path) -> Path:
    """The cache key file in `folder`, which all replicas of a test share; made on first use.

    The keys are the same in each run: the hyperplanes of the search for similar prompts come from them, and with some
    hyperplanes a similar prompt is not found.
    """
    keys = folder / "cache.keys"
    if not keys.exists():
        made = {name: base64.b64encode(hashlib.sha256(name.encode()).digest()).decode() for name in ("names", "k1")}
        keys.write_text("".join(f"{name} {key}\n" for name, key in made.items()))
    return keys


async def bills(redis_url: str, folder: Path) -> list[dict[str, object]]:
    """All bills in Redis, decrypted."""
    sealer = Sealer(Keyring.load(key_file(folder)))
    connection = RedisConnection(redis_url, 10.0)
    coordinator = RedisCoordinator(connection, Breaker("redis", 10.0))
    try:
        return [json.loads(sealer.open(BILL, bill.data)[0].data) for bill in await coordinator.bills(limit=100_000)]
    finally:
        await coordinator.close()
        await connection.close()


class Resuming:
    """A client that sends one request, and resumes at the next replica after each broken stream, until it is complete.

    Attributes:
        num_cut: number of streams that broke before the end.
    """

    def __init__(self, both: list[Replica], first: int, message: pb.GenerateRequest) -> None:
        self._both = itertools.cycle(both if first % 2 else both[::-1])
        self.message = message
        self.seed = message.spec.outputs[0].seed
        self.name = ""
        self.durable = False
        self.sequence = 0
        self.data = b""
        self.sequences: list[int] = []
        self.num_cut = 0

    async def run(self) -> None:
        """Runs until it has the picture."""
        while True:
            replica = next(self._both)
            try:
                if await self._watch(replica):
                    return
            except grpc.aio.AioRpcError as error:
                gone = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
                assert error.code() in gone, error
            except (grpc.aio.UsageError, asyncio.CancelledError):  # the channel of a killed replica was closed
                if (task := asyncio.current_task()) is not None and task.cancelling():
                    raise
            self.num_cut += bool(self.sequence)
            await asyncio.sleep(0.1)

    async def _watch(self, replica: Replica) -> bool:
        if self.name and self.durable:
            offsets = [pb.ArtifactOffset(output_index=0, offset=len(self.data))] if self.data else []
            none = pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE)
            watch = pb.WatchGenerationRequest(
                name=self.name, after_sequence=self.sequence, artifact_offsets=offsets, preview=none
            )
            call = replica.stub.WatchGeneration(watch)
        else:
            self.sequence, self.data, self.sequences = 0, b"", []
            call = replica.stub.Generate(self.message)
        async for response in call:
            event = response.event
            self.name = event.generation
            if event.sequence:
                self.sequence = event.sequence
                self.sequences.append(event.sequence)
            if event.WhichOneof("event") == "accepted":
                self.durable = event.accepted.durability == pb.Accepted.DURABILITY_REPLICATED
            self.data += event.artifact_chunk.data
        return True


async def billed_by_seed(redis_url: str, folder: Path, clients: Sequence[Resuming]) -> Counter[int]:
    """Number of bills by seed, over all of these clients."""
    count = Counter(bill["generation"] for bill in await bills(redis_url, folder))
    by_seed = Counter[int]()
    for client in clients:
        by_seed[client.seed] += count[client.name]
    return by_seed


async def collect(call: grpc.aio.UnaryStreamCall) -> list[pb.GenerationEvent]:
    """All events of a stream."""
    return [response.event async for response in call]


async def until_step(call: grpc.aio.UnaryStreamCall, step: int) -> list[pb.GenerationEvent]:
    """All events up to the first progress event of at least this step."""
    events = []
    async for response in call:
        events.append(response.event)
        if response.event.WhichOneof("event") == "progress" and response.event.progress.step >= step:
            return events
    raise AssertionError("it ended before")


def picture(events: list[pb.GenerationEvent], output: int = 0) -> bytes:
    """The bytes of an output's picture, joined from its chunks."""
    chunks = [e.artifact_chunk for e in events if e.WhichOneof("event") == "artifact_chunk"]
    return b"".join(chunk.data for chunk in chunks if chunk.output_index == output)


def sequences(events: list[pb.GenerationEvent]) -> list[int]:
    """Sequence numbers of the events that have one (state events)."""
    return [event.sequence for event in events if event.sequence]
