"""Degradations are part of a generation's record, so a replica that takes over develops the same."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from safelight.v1 import generation_pb2 as pb
from safelight_server.scheduler import Priority

from tests.redis.test_ownership import servers
from tests.redis.test_replicas import BYPASS, request
from tests.support.redis_server import RedisServer
from tests.support.replicas import collect, picture, until_step

STEPS, FLOOR = 60, 30
FEWER_STEPS = pb.Degradation(kind=pb.Degradation.KIND_FEWER_STEPS, requested="60", applied="30")


class AlwaysOn:
    """Pressure on every class."""

    def update(self, left_s: object, num_instances: int) -> None:
        """Does nothing, so that the pressure never ends."""

    def on(self, priority: Priority) -> bool:
        return True


async def test_a_replica_that_takes_over_develops_what_was_accepted(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with servers(redis_server.url, tmp_path) as (one, other):
        monkeypatch.setattr(one.running.generations, "_pressure", AlwaysOn())
        call = one.stub.Generate(request(3, STEPS, quality_floor=pb.QualityFloor(min_num_steps=FLOOR)))
        before = await until_step(call, 6)
        assert before[0].accepted.spec.num_inference_steps == FLOOR
        drained = one.running.drain(0.0)
        with pytest.raises(grpc.aio.AioRpcError):
            await collect(call)
        name = before[0].generation
        after = await collect(other.stub.WatchGeneration(pb.WatchGenerationRequest(name=name, after_sequence=1)))
        await drained
        assert list(after[-1].finished.degradations) == [FEWER_STEPS]
        assert 0 < after[-1].finished.usage.num_steps < FLOOR
        got = (await other.stub.GetGeneration(pb.GetGenerationRequest(name=name))).generation
        assert list(got.degradations) == [FEWER_STEPS]
        assert got.spec.num_inference_steps == FLOOR
        alone = await collect(other.stub.Generate(request(3, FLOOR, cache=BYPASS)))
        assert picture(after) == picture(alone) != b""
