"""The activator holds calls until there is a replica, then passes them to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2
from safelight import Client, Finished, GenerationError
from safelight.v1 import generation_pb2 as pb
from safelight_server.activator.connector import Connector
from safelight_server.activator.fleet import Fleet
from safelight_server.activator.grpc_calls import KEPT_BYTES, CallRequests
from safelight_server.api.identity import new_key
from safelight_server.files import ConfigFileError

from load_tests.ports import free_port
from tests.conftest import eventually, serving_here
from tests.support.activation import Names, activation, calling, grpc_replica, its_address
from tests.support.certificates import new_pair
from tests.support.pause import steps_paused
from tests.support.relay import Relay


async def test_a_call_is_held_until_there_is_a_replica():
    async with (
        activation() as here,
        Client(here.address) as client,
        serving_here(runtime="simulated", simulated_base_ms=2.0) as server,
    ):
        asked = asyncio.create_task(client.generate("a red potion", steps=4, seed=1).picture())
        await eventually(lambda: here.held() == 1)
        here.names.addresses = frozenset({server.address})
        through = await asked
        assert here.held() == 0
        async with Client(server.address) as directly:
            assert (await directly.generate("a red potion", steps=4, seed=1).picture()).data == through.data


async def test_events_come_as_they_are_sent_and_errors_with_their_details():
    async with (
        activation() as here,
        Client(here.address) as client,
        serving_here(runtime="simulated", simulated_base_ms=2.0) as server,
    ):
        here.names.addresses = frozenset({server.address})
        events = [type(event).__name__ async for event in client.generate("a key", steps=8, seed=2)]
        assert {"Accepted", "Preview", "Picture", "Finished"} <= set(events)
        assert [model.name for model in await client.models()] == ["models/simulated"]
        with pytest.raises(GenerationError) as refused:
            await client.generate("a key", steps=-1).picture()
        assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")


async def test_a_replica_that_is_gone_is_not_asked():
    """DNS may still name it."""
    async with activation() as here, calling(here.address) as list_models, grpc_replica(its_address) as replica:
        gone = f"127.0.0.1:{free_port()}"
        here.names.addresses = frozenset({gone})
        await eventually(lambda: here.replicas.num_open == 1)
        asked = asyncio.ensure_future(list_models(b""))
        await eventually(lambda: here.held() == 1 or asked.done())
        here.names.addresses = frozenset({gone, replica.address})
        assert await asked == replica.address.encode()
        assert here.replicas.ready_addresses == {replica.address}


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


async def test_no_more_calls_are_held_than_may_be():
    async with activation(max_held=1) as here, calling(here.address) as list_models:
        first = list_models(b"")
        await eventually(lambda: here.held() == 1)
        with pytest.raises(grpc.aio.AioRpcError, match="1 calls wait") as refused:
            await list_models(b"", timeout=15.0)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        first.cancel()


async def test_a_call_is_not_held_for_ever():
    async with activation(hold_s=0.01) as here, calling(here.address) as list_models:
        with pytest.raises(grpc.aio.AioRpcError, match="no replica has started") as refused:
            await list_models(b"", timeout=15.0)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_calls_that_are_held_end_when_the_activator_does():
    async with activation() as here, calling(here.address) as list_models:
        held = list_models(b"")
        await eventually(lambda: here.held() == 1)
        here.room.drain()
        for call in (held, list_models(b"")):
            with pytest.raises(grpc.aio.AioRpcError, match="draining"):
                await call


async def test_replicas_stay_known_while_dns_is_away():
    names = Names()
    fleet = Fleet(names.resolve, look_every_s=0.0)
    following = asyncio.create_task(fleet.follow())
    names.addresses = frozenset({"10.0.0.1:8421"})
    await eventually(lambda: fleet.addresses == {"10.0.0.1:8421"})
    names.is_away = True
    for _ in range(10):
        await asyncio.sleep(0)
    assert fleet.addresses
    names.is_away, names.addresses = False, frozenset()
    await eventually(lambda: not fleet.addresses)
    following.cancel()


# --- connections ---


async def test_calls_share_one_connection_to_a_replica():
    async with activation() as here, calling(here.address) as list_models, grpc_replica(its_address) as replica:
        relay = await Relay.start(replica.address)
        await here.has(relay.address)
        await asyncio.gather(*(list_models(b"") for _ in range(20)))
        for _ in range(20):
            await list_models(b"")
        assert (replica.num_calls, relay.num_connections) == (40, 1)
        relay.cut()


async def test_calls_are_spread_evenly():
    async with AsyncExitStack() as ends:
        here = await ends.enter_async_context(activation())
        list_models = await ends.enter_async_context(calling(here.address))
        replicas = [await ends.enter_async_context(grpc_replica(its_address)) for _ in range(3)]
        await here.has(*(replica.address for replica in replicas))
        for _ in range(12):
            await list_models(b"")
        assert [replica.num_calls for replica in replicas] == [4, 4, 4]


async def test_a_busy_replica_gets_no_more_calls_than_others():
    """Calls that go on count, not only those that have begun."""
    asked, finish = [], asyncio.Event()

    async def first_slowly(replica, _context):
        asked.append(replica.address.encode())
        if len(asked) == 1:
            await finish.wait()
        return replica.address.encode()

    async with AsyncExitStack() as ends:
        here = await ends.enter_async_context(activation())
        list_models = await ends.enter_async_context(calling(here.address))
        replicas = [await ends.enter_async_context(grpc_replica(first_slowly)) for _ in range(2)]
        await here.has(*(replica.address for replica in replicas))
        first = asyncio.ensure_future(list_models(b""))
        await eventually(lambda: len(asked) == 1)
        others = [await list_models(b"") for _ in range(3)]
        assert len(set(others)) == 1
        assert asked[0] not in others
        finish.set()
        assert await first == asked[0]


async def test_the_connection_to_a_replica_that_leaves_is_closed_after_its_calls():
    async with (
        activation() as here,
        Client(here.address) as client,
        serving_here(runtime="simulated", simulated_base_ms=2.0) as server,
    ):
        await here.has(server.address)
        with steps_paused(server):
            events = client.generate("a key", steps=100, seed=2)
            await anext(events)
            here.names.addresses = frozenset()
            await eventually(lambda: not here.replicas.ready_addresses)
            assert here.replicas.num_open == 1, "it has a call"
        assert isinstance([event async for event in events][-1], Finished)
        await eventually(lambda: here.replicas.num_open == 0)


async def test_a_replica_that_drains_gets_no_new_calls_and_finishes_its_own():
    """Its health service says so; DNS still has its address."""
    async with AsyncExitStack() as ends:
        here = await ends.enter_async_context(activation())
        client = await ends.enter_async_context(Client(here.address))
        list_models = await ends.enter_async_context(calling(here.address))
        servers = [
            await ends.enter_async_context(serving_here(runtime="simulated", simulated_base_ms=2.0)) for _ in range(2)
        ]
        await here.has(*(server.address for server in servers))
        events = client.generate("a key", steps=600, seed=2)
        await anext(events)
        [busy] = [server for server in servers if server.inspect().live]
        [other] = [server for server in servers if server is not busy]
        with steps_paused(busy):
            draining = busy.drain(30.0)
            await eventually(lambda: here.replicas.ready_addresses == {other.address})
            assert busy.inspect().live == 1
            assert [bool(await list_models(b"")) for _ in range(4)] == [True] * 4
        assert isinstance([event async for event in events][-1], Finished)
        await draining


# --- a second try ---


@pytest.fixture
async def two() -> AsyncIterator[tuple[list[Relay], list[str]]]:
    """Two replicas behind relays. The one that gets the first call loses its connection in it."""
    relays: list[Relay] = []
    asked: list[str] = []

    async def break_the_first(replica, _context):
        asked.append(replica.address)
        if len(asked) == 1:
            relays[[each.address for each in replicas].index(replica.address)].cut()
            await asyncio.Event().wait()
        return replica.address.encode()

    async with grpc_replica(break_the_first) as one, grpc_replica(break_the_first) as other:
        replicas = [one, other]
        relays += [await Relay.start(replica.address) for replica in replicas]
        yield relays, asked
        for relay in relays:
            relay.cut()


async def test_a_call_whose_connection_breaks_is_tried_on_another_replica(two):
    relays, asked = two
    async with activation() as here, calling(here.address) as list_models:
        await here.has(*(relay.address for relay in relays))
        answer = await list_models(b"")
        assert len(asked) == 2
        assert answer == asked[1].encode() != asked[0].encode()


async def test_a_call_that_has_lost_its_only_replica_is_held(two):
    relays, asked = two
    async with activation() as here, calling(here.address) as list_models:
        await here.has(relays[0].address)
        first = asyncio.ensure_future(list_models(b""))
        await eventually(lambda: here.held() == 1 or first.done())
        assert not first.done()
        here.names.addresses = frozenset({relays[1].address})
        assert await first == asked[1].encode()


def refusal(reason: str) -> status_pb2.Status:
    """A refusal as a replica makes it."""
    status = status_pb2.Status(code=code_pb2.UNAVAILABLE, message="not now")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason))
    return status


async def refuse(context: grpc.aio.ServicerContext, reason: str) -> None:
    details = (("grpc-status-details-bin", refusal(reason).SerializeToString()),)
    await context.abort(grpc.StatusCode.UNAVAILABLE, "not now", details)


async def test_a_refusal_is_tried_on_another_replica_once():
    async def always(_replica, context):
        await refuse(context, "RUNTIME_UNAVAILABLE")

    async with AsyncExitStack() as ends:
        here = await ends.enter_async_context(activation())
        list_models = await ends.enter_async_context(calling(here.address))
        replicas = [await ends.enter_async_context(grpc_replica(always)) for _ in range(3)]
        for number, num_tries in ((1, 1), (3, 2)):
            await here.has(*(replica.address for replica in replicas[:number]))
            before = sum(replica.num_calls for replica in replicas)
            with pytest.raises(grpc.aio.AioRpcError, match="not now") as refused:
                await list_models(b"")
            details = dict(refused.value.trailing_metadata())["grpc-status-details-bin"]
            assert status_pb2.Status.FromString(details) == refusal("RUNTIME_UNAVAILABLE")
            assert sum(replica.num_calls for replica in replicas) == before + num_tries


async def test_a_call_that_a_draining_replica_refuses_is_held():
    """It was the only one."""
    refused = asyncio.Event()

    async def drained(replica, context):
        if not refused.is_set():
            refused.set()
            await refuse(context, "DRAINING")
        return replica.address.encode()

    async with activation() as here, calling(here.address) as list_models, grpc_replica(drained) as replica:
        await here.has(replica.address)
        assert await list_models(b"") == replica.address.encode()
        assert replica.num_calls == 2


async def test_a_call_that_was_answered_in_part_is_not_tried_again():
    async with AsyncExitStack() as ends:
        here = await ends.enter_async_context(activation())
        servers = [
            await ends.enter_async_context(serving_here(runtime="simulated", simulated_base_ms=2.0)) for _ in range(2)
        ]
        relays = [await Relay.start(server.address) for server in servers]
        await here.has(*(relay.address for relay in relays))
        channel = await ends.enter_async_context(grpc.aio.insecure_channel(here.address))
        spec = pb.GenerationSpec(prompt="a key", num_inference_steps=500)
        call = channel.unary_stream("/safelight.v1.GenerationService/Generate")(
            pb.GenerateRequest(spec=spec).SerializeToString()
        )
        assert isinstance(await call.read(), bytes)
        for relay in relays:
            relay.reset()
        with pytest.raises(grpc.aio.AioRpcError) as lost:
            while await call.read() is not grpc.aio.EOF:
                pass
        assert lost.value.code() is grpc.StatusCode.UNAVAILABLE
        for relay in relays:
            relay.cut()


async def test_requests_are_kept_until_they_are_too_many():
    async def source() -> AsyncIterator[bytes]:
        for size in (10, KEPT_BYTES, 10):
            yield bytes(size)

    requests = CallRequests(source())
    first = aiter(requests.all())
    assert len(await anext(first)) == 10
    assert requests.complete
    again = [len(request) async for request in requests.all()]
    assert again == [10, KEPT_BYTES, 10]
    assert not requests.complete
    requests.close()


# --- certificates ---


def pem(folder: Path, name: str, *parts: bytes) -> Path:
    file = folder / name
    file.write_bytes(b"".join(parts))
    return file


def test_files_that_cannot_be_used_are_named(tmp_path):
    cert, key = new_pair()
    _, other_key = new_pair()
    ca = pem(tmp_path, "ca.pem", cert)
    for ca_file, client_cert_file, words in (
        (pem(tmp_path, "no.pem", b"no"), None, "no.pem: has no certificate"),
        (ca, pem(tmp_path, "lone.pem", cert), "lone.pem: must have a certificate and its key"),
        (ca, pem(tmp_path, "mixed.pem", cert, other_key), "mixed.pem: the key is not that"),
        (None, pem(tmp_path, "own.pem", cert, key), "own.pem: a client's certificate needs TLS"),
        (ca, tmp_path / "gone.pem", "gone.pem: No such file"),
    ):
        with pytest.raises(ConfigFileError, match=words):
            Connector(ca_file, client_cert_file)
    for parts in ((cert, key), (key, cert)):
        assert Connector(ca, pem(tmp_path, "own.pem", *parts)).certificates == (cert, b"".join(parts))
