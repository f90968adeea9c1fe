"""The end of a spot instance: its replica drains in time, and another one continues all its generations."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.conftest import eventually
from tests.redis.test_replicas import BYPASS, request
from tests.support.metadata_service import metadata_service
from tests.support.redis_server import RedisServer
from tests.support.replicas import Replica, Resuming, billed_by_seed, collect, key_file, picture

STEPS = 240
"""Steps that take more than seven seconds, since the notice is polled every five."""
SEEDS = (1, 2, 3)
STATUS = health_pb2.HealthCheckResponse


async def statuses(replica: Replica) -> list[int]:
    """The statuses of a health watch until its stream ends."""
    seen = []
    watch = health_pb2_grpc.HealthStub(replica.open()).Watch(health_pb2.HealthCheckRequest())
    with pytest.raises(grpc.aio.AioRpcError):
        async for status in watch:
            seen.append(status.status)
    return seen


async def test_nothing_is_lost_when_a_spot_instance_goes(redis_server: RedisServer, tmp_path: Path) -> None:
    with metadata_service() as service:
        keys = key_file(tmp_path)
        spot = {"spot_notice": "aws", "spot_notice_url": service.url, "drain_grace_s": 0.5}
        doomed = Replica(redis_server.url, keys, tmp_path, **spot)
        other = Replica(redis_server.url, keys, tmp_path)
        both = [doomed, other]
        try:
            await asyncio.gather(*(replica.start() for replica in both))
            await eventually(lambda: service.num_asked(HTTPStatus.NOT_FOUND) >= 1)
            health = asyncio.create_task(statuses(doomed))
            clients = [Resuming(both, 1, request(seed, STEPS)) for seed in SEEDS]  # each starts at the first one
            alone = asyncio.create_task(collect(other.stub.Generate(request(SEEDS[0], STEPS, cache=BYPASS))))
            running = [asyncio.create_task(client.run()) for client in clients]
            await eventually(lambda: all(client.sequence for client in clients))
            goes_at = datetime.now(UTC) + timedelta(seconds=120)
            service.notice = f'{{"action": "terminate", "time": "{goes_at:%Y-%m-%dT%H:%M:%SZ}"}}'
            await asyncio.gather(*running)
            assert all(client.num_cut for client in clients)
            assert all(client.sequences == [1, 2, 3] for client in clients)
            assert doomed._process is not None
            assert await asyncio.to_thread(doomed._process.wait) == 0
            assert await health == [STATUS.SERVING, STATUS.NOT_SERVING]
            [told] = doomed.lines("spot_notice")
            assert told["action"] == "terminate"
            assert await billed_by_seed(redis_server.url, tmp_path, clients) == dict.fromkeys(SEEDS, 1)
            assert clients[0].data == picture(await alone) != b""
        finally:
            for replica in both:
                await replica.kill()
