"""The activator holds calls until there is a replica, then passes them to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry
from safelight import Client, GenerationError
from safelight_server.activator.activator import Activator, connector
from safelight_server.activator.fleet import Fleet
from safelight_server.api.call_limits import CallLimits, KeylessQuota
from safelight_server.api.identity import Identity, new_key
from safelight_server.app.grpc_server import make_server
from safelight_server.settings import Settings
from safelight_server.telemetry import Metrics

from load_tests.ports import free_port
from tests.conftest import eventually, serving_here

HELD = "safelight_held_calls"


class Replicas:
    """Fake DNS answers."""

    def __init__(self) -> None:
        self.addresses: frozenset[str] = frozenset()
        self.is_away = False

    async def resolve(self) -> frozenset[str]:
        if self.is_away:
            raise OSError("DNS is away")
        return self.addresses


class Activation:
    """A listening activator and its state."""

    def __init__(self, address: str, holder: Activator, replicas: Replicas, fleet: Fleet, registry: Any) -> None:
        self.address = address
        self.holder = holder
        self.replicas = replicas
        self.fleet = fleet
        self.held = lambda: registry.get_sample_value(HELD)


@asynccontextmanager
async def activation(
    key_file: Path | None = None, *, max_held: int = 10, hold_s: float = 60.0
) -> AsyncIterator[Activation]:
    replicas, metrics, registry = Replicas(), Metrics(), CollectorRegistry()
    fleet = Fleet(replicas.resolve, look_every_s=0.01)
    holder = Activator(
        fleet, Identity(key_file), connector(None), max_held=max_held, hold_s=hold_s, connect_s=0.2, registry=registry
    )
    limits = CallLimits(10.0, (), KeylessQuota(1, 1), metrics)
    server = make_server(Settings(), limits, holder.handlers())
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    following = asyncio.create_task(fleet.follow())
    try:
        yield Activation(f"127.0.0.1:{port}", holder, replicas, fleet, registry)
    finally:
        await server.stop(None)
        following.cancel()


async def test_a_call_is_held_until_there_is_a_replica():
    async with activation() as here, Client(here.address) as client, serving_here(runtime="simulated") as server:
        asked = asyncio.create_task(client.generate("a red potion", steps=4, seed=1).picture())
        await eventually(lambda: here.held() == 1)
        here.replicas.addresses = frozenset({server.address})
        through = await asked
        assert here.held() == 0
        async with Client(server.address) as directly:
            assert (await directly.generate("a red potion", steps=4, seed=1).picture()).data == through.data


async def test_events_come_as_they_are_sent_and_errors_with_their_details():
    async with activation() as here, Client(here.address) as client, serving_here(runtime="simulated") as server:
        here.replicas.addresses = frozenset({server.address})
        events = [type(event).__name__ async for event in client.generate("a key", steps=8, seed=2)]
        assert {"Accepted", "Preview", "Picture", "Finished"} <= set(events)
        assert [model.name for model in await client.models()] == ["models/simulated"]
        with pytest.raises(GenerationError) as refused:
            await client.generate("a key", steps=-1).picture()
        assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")


async def test_a_replica_that_is_gone_is_not_asked():
    """DNS may still name it."""
    async with activation() as here, Client(here.address) as client, serving_here(runtime="simulated") as server:
        here.replicas.addresses = frozenset({f"127.0.0.1:{free_port()}"})
        await eventually(lambda: here.fleet.some_address() is not None)
        asked = asyncio.create_task(client.generate("a red potion", steps=4, seed=1).picture())
        await eventually(lambda: here.held() == 1 or asked.done())
        here.replicas.addresses = frozenset({server.address})
        assert (await asked).data


async def test_who_has_no_key_is_not_held(tmp_path):
    key, entry = new_key("me", "studio")
    (tmp_path / "keys.json").write_text(f'{{"keys": [{entry}]}}')
    async with activation(tmp_path / "keys.json") as here:
        async with Client(here.address, api_key="another") as stranger:
            asked = asyncio.create_task(stranger.generate("a key").picture())
            await eventually(lambda: asked.done() or here.held() > 0)
            assert here.held() == 0
            with pytest.raises(GenerationError) as refused:
                await asked
            assert refused.value.code is grpc.StatusCode.UNAUTHENTICATED
        async with Client(here.address, api_key=key) as client:
            asked = asyncio.create_task(client.generate("a key").picture())
            await eventually(lambda: here.held() == 1)
            asked.cancel()
            await eventually(lambda: here.held() == 0)


@asynccontextmanager
async def call(address: str) -> AsyncIterator[Any]:
    """One call of ListModels, as bytes, so that no client retries."""
    async with grpc.aio.insecure_channel(address) as channel:
        yield channel.unary_unary("/safelight.v1.ModelService/ListModels")


async def test_no_more_calls_are_held_than_may_be():
    async with activation(max_held=1) as here, call(here.address) as list_models:
        first = list_models(b"")
        await eventually(lambda: here.held() == 1)
        with pytest.raises(grpc.aio.AioRpcError, match="1 calls wait") as refused:
            await list_models(b"", timeout=5.0)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        first.cancel()


async def test_a_call_is_not_held_for_ever():
    async with activation(hold_s=0.01) as here, call(here.address) as list_models:
        with pytest.raises(grpc.aio.AioRpcError, match="no replica has started") as refused:
            await list_models(b"", timeout=5.0)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_calls_that_are_held_end_when_the_activator_does():
    async with activation() as here, call(here.address) as list_models:
        held = list_models(b"")
        await eventually(lambda: here.held() == 1)
        here.holder.drain()
        with pytest.raises(grpc.aio.AioRpcError, match="draining"):
            await held


async def test_replicas_stay_known_while_dns_is_away():
    replicas = Replicas()
    fleet = Fleet(replicas.resolve, look_every_s=0.0)
    following = asyncio.create_task(fleet.follow())
    replicas.addresses = frozenset({"10.0.0.1:8421"})
    await eventually(lambda: fleet.some_address() == "10.0.0.1:8421")
    replicas.is_away = True
    for _ in range(10):
        await asyncio.sleep(0)
    assert fleet.addresses
    replicas.is_away, replicas.addresses = False, frozenset()
    await eventually(lambda: not fleet.addresses)
    following.cancel()
