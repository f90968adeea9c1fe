"""Many generations on two replicas that are killed meanwhile: none is lost or billed twice, all are bit-identical.

`SAFELIGHT_STORM` sets their number (default 120; a full run has a thousand).
"""

from __future__ import annotations

import asyncio
import os
import random
import uuid
from pathlib import Path

import pytest
from safelight.v1 import generation_pb2 as pb

from tests.redis.test_replicas import BYPASS, request
from tests.support.redis_server import RedisServer
from tests.support.replicas import Resuming, billed_by_seed, collect, picture, replicas

NUM = int(os.environ.get("SAFELIGHT_STORM", "120"))
NUM_KILLS = max(2, NUM // 100)
STEPS = 20
AT_ONCE = 40
SEEDS = max(1, NUM * 3 // 4)
"""Fewer than generations, so that some share executions."""


NONE = pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE)


def message(seed: int) -> pb.GenerateRequest:
    return request(seed, STEPS, request_id=str(uuid.uuid4()))


@pytest.mark.timeout(900)
async def test_none_lost_none_doubled_all_bit_identical(redis_server: RedisServer, tmp_path: Path) -> None:
    limits = {"max_waiting_outputs": 10_000, "max_waiting_per_caller": 10_000, "simulated_base_ms": 10}
    async with replicas(redis_server.url, tmp_path, **limits) as both:
        room = asyncio.Semaphore(AT_ONCE)
        done = 0

        async def one(client: Resuming) -> None:
            nonlocal done
            async with room:
                await client.run()
                done += 1

        clients = [Resuming(both, number, message(number % SEEDS)) for number in range(NUM)]
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
    assert set((await billed_by_seed(redis_server.url, tmp_path, clients)).values()) == {1}, (
        "each picture is billed once, to one of those who asked for it"
    )
