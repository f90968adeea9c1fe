"""Many generations on two replicas that are killed in between: none lost, none billed twice, all bit-identical.

`SAFELIGHT_STORM` says how many (default 120; a thousand for a run in full).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import uuid
from collections import Counter
from pathlib import Path

import grpc
import pytest
from safelight.v1 import generation_pb2 as pb

from tests.redis.test_replicas import BYPASS, request
from tests.support.redis_server import RedisServer
from tests.support.replicas import Replica, bills, collect, picture, replicas

NUM = int(os.environ.get("SAFELIGHT_STORM", "120"))
NUM_KILLS = max(2, NUM // 100)
STEPS = 20
AT_ONCE = 40
SEEDS = max(1, NUM * 3 // 4)
"""Fewer than generations, so that some share executions."""


class Client:
    """Sends a request to any replica and resumes at any replica until it has the picture."""

    def __init__(self, both: list[Replica], number: int) -> None:
        self._both = itertools.cycle(both if number % 2 else both[::-1])
        self.seed = number % SEEDS
        self.message = request(self.seed, STEPS, request_id=str(uuid.uuid4()))
        self.name = ""
        self.durable = False
        self.sequence = 0
        self.data = b""
        self.sequences: list[int] = []

    async def run(self) -> None:
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
            await asyncio.sleep(0.1)

    async def _watch(self, replica: Replica) -> bool:
        if self.name and self.durable:
            offsets = [pb.ArtifactOffset(output_index=0, offset=len(self.data))] if self.data else []
            watch = pb.WatchGenerationRequest(
                name=self.name, after_sequence=self.sequence, artifact_offsets=offsets, preview=NONE
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


NONE = pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE)


@pytest.mark.timeout(900)
async def test_none_lost_none_doubled_all_bit_identical(redis_server: RedisServer, tmp_path: Path) -> None:
    limits = {"max_waiting_standard": 10_000, "max_waiting_per_caller": 10_000, "simulated_base_ms": 10}
    async with replicas(redis_server.url, tmp_path, **limits) as both:
        room = asyncio.Semaphore(AT_ONCE)
        done = 0

        async def one(client: Client) -> None:
            nonlocal done
            async with room:
                await client.run()
                done += 1

        clients = [Client(both, number) for number in range(NUM)]
        running = [asyncio.create_task(one(client)) for client in clients]
        chance = random.Random(5)
        for kill in range(NUM_KILLS):
            while done < NUM * (kill + 1) // (NUM_KILLS + 1):
                await asyncio.sleep(0.01)
                for task in running:
                    if task.done():
                        task.result()
            victim = chance.choice(both)
            await victim.kill()
            await victim.start()
        await asyncio.gather(*running)
        assert all(client.sequences == [1, 2, 3] for client in clients), "every state event once and in order"
        calm = [request(seed, STEPS, cache=BYPASS, preview=NONE) for seed in range(SEEDS)]
        expected: list[bytes] = []
        for start in range(0, SEEDS, AT_ONCE):
            calls = [collect(both[0].stub.Generate(message)) for message in calm[start : start + AT_ONCE]]
            expected += [picture(events) for events in await asyncio.gather(*calls)]
    assert all(client.data == expected[client.seed] for client in clients)
    count = Counter(bill["generation"] for bill in await bills(redis_server.url, tmp_path))
    by_seed = Counter[int]()
    for client in clients:
        by_seed[client.seed] += count[client.name]
    assert set(by_seed.values()) == {1}, "each picture is billed once, to one of those who asked for it"
