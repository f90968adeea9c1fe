"""The real model on two replicas, either of which is killed: no picture is lost, billed twice, or differs by a bit."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

import pytest
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import images_pb2_grpc

from tests.conftest import eventually
from tests.integration.test_images import MASK, PHOTO, name_of, pieces
from tests.support.redis_server import RedisServer
from tests.support.replicas import Replica, Resuming, billed_by_seed, collect, picture, replicas

PROMPTS = ("a red potion on a dark background", "a blue sword on a white background", "a green shield")
SAMPLERS = ("dpmpp_2m", "euler_ancestral")
"""One sampler uses the previous step, one has noise in every step: a replica that takes over must restore both."""
NUM = 9
SEEDS = 6
"""Fewer than generations, so that some share executions."""


def message(seed: int) -> pb.GenerateRequest:
    """Requests have different numbers of steps, so that they end at different times; some have an init image, some a mask."""
    spec = pb.GenerationSpec(prompt=PROMPTS[seed % 3], num_inference_steps=8 + 4 * (seed % SEEDS))
    spec.sampler.name = SAMPLERS[seed % 2]
    spec.outputs.add(seed=seed)
    if seed % 3:
        spec.init_image, spec.strength = name_of(PHOTO), 0.8
    if seed % 3 == 2:
        spec.mask = name_of(MASK)
    return pb.GenerateRequest(spec=spec, preview=pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE))


async def disturbed(both: list[Replica], victim: Replica, seeds: range) -> list[Resuming]:
    """Runs generations on both replicas; one replica is killed when the first picture is finished."""
    clients = []
    for number in range(NUM):
        asked = message(seeds[number % SEEDS])
        asked.request_id = str(uuid.uuid4())
        clients.append(Resuming(both, number, asked))
    running = [asyncio.create_task(client.run()) for client in clients]
    await eventually(lambda: any(task.done() for task in running), 60)
    await victim.kill()
    await asyncio.gather(*running)
    assert any(client.num_cut for client in clients), "it was killed in mid-work"
    return clients


@pytest.mark.timeout(240)
async def test_pictures_are_bit_identical_whichever_replica_is_killed(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with replicas(redis_server.url, tmp_path, runtime="onnx") as both:
        for data in (PHOTO, MASK):
            await images_pb2_grpc.ImageServiceStub(both[0].open()).UploadImage(iter(pieces(data)))
        clients = await disturbed(both, both[0], range(SEEDS))
        await both[0].start()
        clients += await disturbed(both, both[1], range(SEEDS, 2 * SEEDS))
        expected = []
        for seed in range(2 * SEEDS):
            calm = message(seed)
            calm.cache.mode = pb.CachePolicy.MODE_BYPASS
            expected.append(picture(await collect(both[0].stub.Generate(calm))))
    assert all(client.data == expected[client.seed] for client in clients)
    assert len(set(expected)) == 2 * SEEDS
    assert all(client.sequences == [1, 2, 3] for client in clients), "every state event once and in order"
    assert set((await billed_by_seed(redis_server.url, tmp_path, clients)).values()) == {1}
