"""Replicas that differ: one with another model does not take over; one with other numerics reports that."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from safelight import Client, Picture
from safelight.v1 import generation_pb2 as pb
from safelight_server.domain.component import Component
from safelight_server.domain.errors import NotFoundError
from safelight_server.generations.generation import Generation
from safelight_server.generations.ownership import rules
from safelight_server.generations.ownership.mirrors import Mirrors
from safelight_server.generations.planner import OutputPlan

from tests.conftest import eventually
from tests.integration.test_generate import reason_of
from tests.redis.test_ownership import STEPS, Server, servers, suspend, undisturbed
from tests.redis.test_replicas import BYPASS, DETACH, request
from tests.support.coordination import until
from tests.support.redis_server import RedisServer
from tests.support.replicas import collect, picture, sequences, until_step

DIFFERENCES = ("weights", "no model")


def make_other(server: Server, difference: str) -> None:
    """Changes a server as if another release were deployed there."""
    catalog = server.running.generations._catalog
    get = catalog.get

    def missing(_name: str) -> None:
        raise NotFoundError("no such model")

    match difference:
        case "weights":
            catalog.get = lambda name: replace(get(name), digest="others")
        case "no model":
            catalog.get = missing


def with_other_numerics(server: Server) -> None:
    """Changes a server as if it ran on another CPU."""
    server.running.runtime.numerics_id = lambda _model: "others"


def mirrors(server: Server) -> Mirrors:
    found: Mirrors = server.running.generations.ownership.mirrors
    return found


@pytest.mark.parametrize("difference", DIFFERENCES)
async def test_what_nobody_owns_is_taken_over_by_one_of_its_kind(
    redis_server: RedisServer, tmp_path: Path, difference: str
) -> None:
    async with servers(redis_server.url, tmp_path, count=3) as (one, other, third):
        expected = await undisturbed(third, 1)
        make_other(other, difference)
        mirrors(third).retire()
        call = one.stub.Generate(request(1, STEPS, disconnect=DETACH, cache=BYPASS))
        name = (await until_step(call, 4))[0].generation
        call.cancel()
        await one.running.drain(0.0)
        await until(other.coordinator.unowned)
        at = mirrors(other)._context.name(name.partition("/")[2])
        mirror = await mirrors(other)._mirror(at)
        assert mirror is not None
        assert not await mirrors(other)._adopt(mirror)
        await mirrors(other)._rescue(at)
        assert not len(mirrors(other))
        assert await other.coordinator.unowned() == [at]
        watch = pb.WatchGenerationRequest(name=name, after_sequence=1)
        assert picture(await collect(third.stub.WatchGeneration(watch))) == expected


@pytest.mark.parametrize("difference", DIFFERENCES)
async def test_a_stream_is_sent_to_where_it_goes_on(redis_server: RedisServer, tmp_path: Path, difference: str) -> None:
    async with servers(redis_server.url, tmp_path) as (one, other):
        make_other(other, difference)
        call = one.stub.Generate(request(2, STEPS))
        name = (await until_step(call, 4))[0].generation
        await suspend(one, call)
        watch = pb.WatchGenerationRequest(name=name, after_sequence=1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(other.stub.WatchGeneration(watch))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert reason_of(caught.value) == "OTHER_MODEL"
        assert not len(mirrors(other))
        assert sequences(await collect(one.stub.WatchGeneration(watch))) == [2, 3]


async def test_a_request_id_leads_the_client_to_a_replica_of_its_kind(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with servers(redis_server.url, tmp_path) as (one, other):
        make_other(other, "weights")
        message = request(3, STEPS, request_id="6f1c0a52-9b3e-4d0f-8a55-2f0c7d1e9b64", disconnect=DETACH)
        call = one.stub.Generate(message)
        await until_step(call, 4)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(other.stub.Generate(message))
        assert reason_of(caught.value) == "OTHER_MODEL"
        assert not len(mirrors(other))
        async with Client(f"{other.running.address},{one.running.address}") as client:
            events = [event async for event in client.develop(message)]
        assert any(isinstance(event, Picture) for event in events)
        call.cancel()


async def test_it_is_shown_by_one_with_other_numerics_which_computes_nothing(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with servers(redis_server.url, tmp_path) as (one, other):
        with_other_numerics(other)
        runtime = other.running.runtime
        compute, run = runtime.run, list[Component]()
        runtime.run = lambda instance, model, component, inputs: (  # type: ignore[method-assign]
            run.append(component) or compute(instance, model, component, inputs)
        )
        call = one.stub.Generate(request(6, STEPS))
        name = (await until_step(call, 2))[0].generation
        shown = await collect(other.stub.WatchGeneration(pb.WatchGenerationRequest(name=name, after_sequence=1)))
        assert picture(shown) == picture(await collect(call))
        assert shown[-1].finished.cache_results[0].numerics_id == ""
        assert Component.DENOISER not in run
        assert not await mirrors(other)._context.coordinator.unowned()


async def test_one_with_other_numerics_goes_on_with_it_and_says_so(redis_server: RedisServer, tmp_path: Path) -> None:
    async with servers(redis_server.url, tmp_path) as (one, other):
        with_other_numerics(other)
        call = one.stub.Generate(request(7, STEPS))
        name = (await until_step(call, 2))[0].generation
        await suspend(one, call)
        shown = await collect(other.stub.WatchGeneration(pb.WatchGenerationRequest(name=name, after_sequence=1)))
        assert picture(shown)
        assert [result.numerics_id for result in shown[-1].finished.cache_results] == ["others"]


async def test_what_nobody_owns_is_left_to_those_with_its_numerics_for_a_while(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with servers(redis_server.url, tmp_path) as (one, other):
        with_other_numerics(other)
        mirrors(other).retire()
        call = one.stub.Generate(request(8, STEPS, disconnect=DETACH, cache=BYPASS))
        name = (await until_step(call, 2))[0].generation
        call.cancel()
        await one.running.drain(0.0)
        await until(other.coordinator.unowned)
        at = mirrors(other)._context.name(name.partition("/")[2])
        await mirrors(other)._rescue(at)
        assert not len(mirrors(other)), "one of its kind may come"
        monkeypatch.setattr(rules, "OTHERS_FIRST_LEASES", 0)
        await mirrors(other)._rescue(at)
        await eventually(lambda: other.running.generations.ownership.owners._own or other.running.generations._finished)
        shown = await collect(other.stub.WatchGeneration(pb.WatchGenerationRequest(name=name, after_sequence=1)))
        assert shown[-1].finished.cache_results[0].numerics_id == "others"


async def test_it_can_be_cancelled_at_any_replica(redis_server: RedisServer, tmp_path: Path) -> None:
    async with servers(redis_server.url, tmp_path) as (one, other):
        make_other(other, "no model")
        call = one.stub.Generate(request(4, 1000))
        name = (await until_step(call, 2))[0].generation
        cancelled = await other.stub.CancelGeneration(pb.CancelGenerationRequest(name=name))
        assert cancelled.generation.state == pb.Generation.STATE_CANCELLED
        with pytest.raises(grpc.aio.AioRpcError):
            await collect(call)


async def test_who_fails_to_go_on_with_it_leaves_it_to_others(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with servers(redis_server.url, tmp_path) as (one, other):
        planner = other.running.generations._planner
        call = one.stub.Generate(request(5, STEPS))
        name = (await until_step(call, 4))[0].generation
        await suspend(one, call)
        enter = planner.enter

        failed = list[Generation]()

        def fails(generation: Generation, plans: Sequence[OutputPlan]) -> None:
            if not generation.owned or failed:
                enter(generation, plans)
                return
            failed.append(generation)
            raise RuntimeError("a bug")

        monkeypatch.setattr(planner, "enter", fails)
        watch = pb.WatchGenerationRequest(name=name, after_sequence=1)
        watching = asyncio.create_task(collect(other.stub.WatchGeneration(watch)))
        await eventually(lambda: bool(failed))
        await eventually(lambda: not other.running.generations.ownership.owners.owns(failed[0]))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watching
        assert reason_of(caught.value) == "MOVED"
        assert sequences(await collect(one.stub.WatchGeneration(watch))) == [2, 3]
