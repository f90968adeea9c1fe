"""Uploaded pictures with several replicas: used at another replica, or expired when it takes over."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import images_pb2, images_pb2_grpc
from safelight_server.cache.images import Images

from tests.integration.test_generate import reason_of
from tests.integration.test_images import MASK, PHOTO, name_of, upload
from tests.redis.test_ownership import STEPS, Server, servers
from tests.redis.test_ownership_starts import let_go
from tests.redis.test_replicas import BYPASS, request
from tests.support.redis_server import RedisServer
from tests.support.replicas import collect, picture


def images(server: Server) -> Images:
    found: Images = server.running.generations._planner._images._images
    return found


def painted(seed: int) -> pb.GenerateRequest:
    message = request(seed, STEPS, cache=BYPASS)
    message.spec.init_image, message.spec.mask, message.spec.strength = name_of(PHOTO), name_of(MASK), 0.9
    return message


async def send(server: Server) -> None:
    async with grpc.aio.insecure_channel(server.running.address) as channel:
        for data in (PHOTO, MASK):
            await upload(channel, data)


async def lose(server: Server) -> None:
    """Removes the picture, as if it had expired at every replica."""
    at, digest = images(server), name_of(PHOTO).removeprefix("images/")
    assert await at._tiers.delete(at._key("default", digest))


async def test_a_picture_that_one_replica_has_taken_is_found_by_the_other(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with servers(redis_server.url, tmp_path) as (one, other):
        await send(one)
        async with grpc.aio.insecure_channel(other.running.address) as channel:
            stub = images_pb2_grpc.ImageServiceStub(channel)
            found = await stub.GetImage(images_pb2.GetImageRequest(name=name_of(PHOTO)))
            assert found.image.total_bytes == len(PHOTO)
        here, there = [picture(await collect(server.stub.Generate(painted(1)))) for server in (one, other)]
        assert here == there


async def test_what_is_taken_over_goes_on_with_its_picture_or_says_that_it_is_gone(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with servers(redis_server.url, tmp_path) as (one, other):
        await send(one)
        expected = picture(await collect(one.stub.Generate(painted(2))))
        watch = await let_go(one, painted(2))
        assert picture(await collect(other.stub.WatchGeneration(watch))) == expected


async def test_what_is_taken_over_without_its_picture_fails(redis_server: RedisServer, tmp_path: Path) -> None:
    async with servers(redis_server.url, tmp_path) as (one, other):
        await send(one)
        watch = await let_go(one, painted(3))
        await lose(one)
        for server in (other, one):  # the replica that mirrors it reports the same
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await collect(server.stub.WatchGeneration(watch))
            assert (caught.value.code(), reason_of(caught.value)) == (grpc.StatusCode.NOT_FOUND, "IMAGE_NOT_FOUND")


async def test_an_output_of_one_replica_is_a_picture_to_start_from_at_the_other(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    """It is stored as a picture of the tenant, which a replica that takes over reads."""
    async with servers(redis_server.url, tmp_path) as (one, other):
        first = await collect(one.stub.Generate(request(4, STEPS, cache=BYPASS)))
        message = request(5, STEPS, cache=BYPASS)
        message.spec.init_image = f"{first[0].generation}/outputs/0"
        there = await collect(other.stub.Generate(message))
        assert there[0].accepted.spec.init_image == name_of(picture(first))
        expected = picture(there)
        assert picture(await collect(one.stub.Generate(message))) == expected
        watch = await let_go(other, message)
        assert picture(await collect(one.stub.WatchGeneration(watch))) == expected
