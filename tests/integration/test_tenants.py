"""Results of one tenant never evict what another tenant was promised."""

from __future__ import annotations

import uuid
from collections import Counter

import grpc
import pytest
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight_server.api.identity import new_key

from tests.conftest import eventually
from tests.integration.test_generate import collect, reason_of
from tests.integration.test_streams import PICTURE_BYTES, channel

SIMULATED = {"runtime": "simulated", "simulated_base_ms": 1.0, "simulated_row_ms": 0.0}
NONE = pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE)


@pytest.fixture
def keys(tmp_path):
    """A key file of two tenants, and the metadata that each sends."""
    (polite, polite_entry), (rude, rude_entry) = new_key("ann", "polite"), new_key("bob", "rude")
    file = tmp_path / "keys.json"
    file.write_text(f'{{"keys": [{polite_entry}, {rude_entry}]}}')
    return file, *(((("authorization", f"Bearer {key}"),)) for key in (polite, rude))


def request(steps: int = 1, outputs: int = 1, **what) -> pb.GenerateRequest:
    spec = pb.GenerationSpec(prompt="x", num_inference_steps=steps, outputs=[{"seed": n} for n in range(outputs)])
    return pb.GenerateRequest(spec=spec, preview=NONE, **what)


async def test_generations_that_one_tenant_leaves_never_end_those_of_another(start, keys):
    file, polite, rude = keys
    async with (
        start(**SIMULATED | {"simulated_base_ms": 20.0}, api_key_file=file, max_lost=3) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        stub, suspended = stubs.GenerationServiceStub(channel), running.generations._suspended

        async def leave(who) -> str:
            call = stub.Generate(request(steps=900), metadata=who)
            name = (await call.read()).event.generation
            call.cancel()
            await eventually(lambda: name.partition("/")[2] in suspended)
            return name

        mine = await leave(polite)
        theirs = [await leave(rude) for _ in range(6)]

        async def state(name: str, who) -> int:
            return (await stub.GetGeneration(pb.GetGenerationRequest(name=name), metadata=who)).generation.state

        assert await state(mine, polite) == pb.Generation.STATE_SUSPENDED
        states = [await state(name, rude) for name in theirs]
        assert states == [pb.Generation.STATE_CANCELLED] * 4 + [pb.Generation.STATE_SUSPENDED] * 2
        resumed = stub.WatchGeneration(pb.WatchGenerationRequest(name=mine), metadata=polite)
        assert (await resumed.read()).event.generation == mine
        resumed.cancel()


@pytest.mark.parametrize("bound", [{"max_results": 6}, {"max_results_bytes": 1 << 20}])
async def test_results_of_one_tenant_never_push_out_those_of_another(start, keys, bound):
    """Neither pictures nor outcomes of request ids, by number or by bytes (8 of the rude tenant's exceed 2 MiB)."""
    file, polite, rude = keys
    raw = pb.PixelEncoding(media_type="application/x-raw-rgba8")
    async with (
        start(**SIMULATED, api_key_file=file, **bound) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        stub = stubs.GenerationServiceStub(channel)
        mine = request(request_id=str(uuid.uuid4()))
        [name] = {event.generation for event in await collect(stub.Generate(mine, metadata=polite))}
        theirs = [
            (await collect(stub.Generate(request(outputs=4, encoding=raw), metadata=rude)))[0].generation
            for _ in range(8)
        ]
        kept = running.generations._finished
        await eventually(lambda: not any(one.log.watchers for one in kept.values()))
        assert theirs[0].partition("/")[2] not in kept
        assert theirs[-1].partition("/")[2] in kept
        again = await collect(stub.WatchGeneration(pb.WatchGenerationRequest(name=name), metadata=polite))
        assert again[-1].HasField("finished")
        replayed = await collect(stub.Generate(mine, metadata=polite))
        assert {event.generation for event in replayed} == {name}


async def test_results_that_are_watched_stay_watchable(start, keys):
    """A result that a stream still reads is not dropped for later results of the same tenant."""
    file, _, rude = keys
    async with (
        start(**SIMULATED, api_key_file=file, max_results=2) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        stub = stubs.GenerationServiceStub(channel)
        name = (await collect(stub.Generate(request(), metadata=rude)))[0].generation
        generation = running.generations._finished.get(name.partition("/")[2])
        await eventually(lambda: not generation.log.watchers)
        caller = generation.caller
        watcher = running.generations.attach(generation, generation.request.preview, lambda _: None)
        for _ in range(4):
            await collect(stub.Generate(request(), metadata=rude))
        assert await running.generations.find(caller, generation.identifier) is generation
        running.generations.detach(watcher)
        for _ in range(4):
            await collect(stub.Generate(request(), metadata=rude))
        await eventually(lambda: generation.identifier not in running.generations._finished)


async def test_slow_streams_of_one_tenant_are_ended_before_memory_is_short_and_resume(start, keys):
    """Long before `watcher_stall_s`. Another tenant's slow stream is not ended; both pictures arrive complete."""
    file, polite, rude = keys
    raw = pb.PixelEncoding(media_type="application/x-raw-rgba8")
    async with (
        start(**SIMULATED, api_key_file=file, max_unread_bytes=4 << 20, watcher_stall_s=3600) as running,
        channel(running) as slow,
        channel(running) as mine,
        channel(running) as fast,
    ):
        message = request(outputs=16, encoding=raw)
        kept = aiter(stubs.GenerationServiceStub(mine).Generate(message, metadata=polite))
        await anext(kept)
        calls, events = [], []
        for _ in range(6):
            calls.append(aiter(stubs.GenerationServiceStub(slow).Generate(message, metadata=rude)))
            events.append((await anext(calls[-1])).event)
        streams = running.generations._streams
        await eventually(lambda: len(streams) < 5)
        assert "polite" in {generation.caller.tenant for generation in streams.watched()}
        accepted, *_ = events
        del events[1:]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for response in calls[0]:
                events.append(response.event)
        assert reason_of(caught.value) == "WATCHER_STALLED"
        got = Counter()
        for event in events:
            got[event.artifact_chunk.output_index] += len(event.artifact_chunk.data)
        again = pb.WatchGenerationRequest(
            name=accepted.generation,
            after_sequence=max(event.sequence for event in events),
            artifact_offsets=[{"output_index": index, "offset": offset} for index, offset in got.items()],
        )
        events = await collect(stubs.GenerationServiceStub(fast).WatchGeneration(again, metadata=rude))
        assert events[-1].HasField("finished")
        for event in events:
            got[event.artifact_chunk.output_index] += len(event.artifact_chunk.data)
        assert [got[index] for index in range(16)] == [PICTURE_BYTES] * 16
        rest = [response.event async for response in kept]
        assert sum(len(event.artifact_chunk.data) for event in rest) == 16 * PICTURE_BYTES
