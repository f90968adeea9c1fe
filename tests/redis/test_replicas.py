"""Two replicas on one Redis: one computes what both need, and continues when the other is killed."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

import pytest
import pytest_asyncio
from safelight import Client, Finished, Picture, Progress
from safelight.v1 import generation_pb2 as pb

from tests.support.coordination import until
from tests.support.redis_server import RedisServer
from tests.support.replicas import Replica, bills, collect, picture, replicas, sequences, until_step

pytestmark = pytest.mark.asyncio(loop_scope="module")
R = pb.CacheResult
STEPS = 30


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory):
    """Two replicas for all tests of this module; each test uses its own seeds, and restarts a replica that it killed."""
    folder = tmp_path_factory.mktemp("replicas")
    server = RedisServer(folder)
    server.start()
    async with replicas(server.url, folder) as both:
        yield both, server, folder
    server.kill()


def request(seed: int, steps: int = STEPS, **changes: object) -> pb.GenerateRequest:
    outputs = [pb.OutputSpec(seed=seed)]
    spec = pb.GenerationSpec(prompt="a red potion on a dark background", outputs=outputs, num_inference_steps=steps)
    message = pb.GenerateRequest(spec=spec)
    for name, value in changes.items():
        getattr(message, name).CopyFrom(value) if hasattr(value, "CopyFrom") else setattr(message, name, value)
    return message


TINY = pb.PREVIEW_METHOD_TINY_DECODER
BYPASS = pb.CachePolicy(mode=pb.CachePolicy.MODE_BYPASS)
DETACH = pb.DisconnectPolicy(action=pb.DisconnectPolicy.ACTION_DETACH)


async def undisturbed(replica: Replica, seed: int, steps: int = STEPS) -> bytes:
    return picture(await collect(replica.stub.Generate(request(seed, steps, cache=BYPASS))))


def billed(found: list[dict[str, object]], names: list[str]) -> list[dict[str, object]]:
    return [bill for bill in found if bill["generation"] in names]


def disposition(events: list[pb.GenerationEvent]) -> int:
    return events[-1].finished.cache_results[0].disposition


async def test_identical_requests_on_both_compute_once(pair) -> None:
    (one, other), server, folder = pair
    streams = await asyncio.gather(*(collect(r.stub.Generate(request(1))) for r in (one, other, one, other)))
    assert len({picture(events) for events in streams}) == 1
    assert sum(events[-1].finished.usage.num_steps for events in streams) == STEPS
    names = [events[0].generation for events in streams]
    [bill] = billed(await bills(server.url, folder), names)
    assert (bill["rows"], bill["steps"], bill["tenant"]) == (STEPS, STEPS, "default")
    followed = [events for events in streams if not events[-1].finished.usage.num_steps]
    assert {disposition(events) for events in followed} == {R.DISPOSITION_COALESCED}
    assert all(any(e.WhichOneof("event") == "preview" for e in events) for events in followed), "they saw it develop"


async def test_who_follows_has_previews_of_its_own_encoding_size_and_cadence(pair) -> None:
    """A follower decodes previews itself."""
    (one, other), _, _ = pair
    policies = [
        pb.PreviewPolicy(accept=[pb.PixelEncoding(media_type=kind)], max_edge_px=edge, every_n_steps=every, method=TINY)
        for kind, edge, every in (("image/png", 40, 2), ("image/webp", 12, 3))
    ]
    call = one.stub.Generate(request(14, 60, preview=policies[0]))
    await until_step(call, 3)
    ours, theirs = await asyncio.gather(
        collect(call), collect(other.stub.Generate(request(14, 60, preview=policies[1])))
    )
    assert disposition(theirs) == R.DISPOSITION_COALESCED
    for events, kind, edge, every in ((ours, "image/png", 40, 2), (theirs, "image/webp", 12, 3)):
        seen = [event.preview for event in events if event.WhichOneof("event") == "preview"]
        assert seen
        assert {(p.media_type, p.width_px, p.height_px, p.method) for p in seen} == {(kind, edge, edge, TINY)}
        assert all(p.step % every == 0 for p in seen[1:]), "the first may be the newest that there was"


async def test_the_leader_is_killed_and_the_follower_goes_on_bit_identical(pair) -> None:
    (one, other), server, folder = pair
    leading = one.stub.Generate(request(2))
    first = await until_step(leading, 6)
    following = asyncio.create_task(collect(other.stub.Generate(request(2))))
    await until_step(leading, 12)
    await one.kill()
    events = await following
    assert events[-1].finished.status.code == 0
    assert 0 < events[-1].finished.usage.num_steps < STEPS, "it went on from a checkpoint"
    await one.start()
    assert picture(events) == await undisturbed(one, 2)
    resumed = await collect(other.stub.WatchGeneration(pb.WatchGenerationRequest(name=first[0].generation)))
    assert picture(resumed) == picture(events)
    assert len(billed(await bills(server.url, folder), [first[0].generation, events[0].generation])) == 1


async def test_a_stream_that_is_cut_on_one_resumes_on_the_other(pair) -> None:
    (one, other), server, folder = pair
    call = one.stub.Generate(request(3))
    before = await until_step(call, 8)
    assert before[0].accepted.durability == pb.Accepted.DURABILITY_REPLICATED
    call.cancel()
    name, last = before[0].generation, max(sequences(before))
    watch = pb.WatchGenerationRequest(name=name, after_sequence=last)
    after = await collect(other.stub.WatchGeneration(watch))
    assert sequences(before) + sequences(after) == [1, 2, 3]
    assert picture(after) == await undisturbed(one, 3)
    again = await collect(one.stub.WatchGeneration(pb.WatchGenerationRequest(name=name)))
    assert sequences(again) == [1, 2, 3]
    assert picture(again) == picture(after)
    assert len(billed(await bills(server.url, folder), [name])) == 1


async def test_a_second_screen_on_the_other_replica(pair) -> None:
    (one, other), _, _ = pair
    call = one.stub.Generate(request(4))
    first = await until_step(call, 2)
    name = first[0].generation
    screen = asyncio.create_task(collect(other.stub.WatchGeneration(pb.WatchGenerationRequest(name=name))))
    rest = await collect(call)
    events = await screen
    assert sequences(events) == [1, 2, 3]
    assert picture(events) == picture(rest)
    assert events[-1].finished.usage.num_steps == STEPS
    assert any(event.WhichOneof("event") == "preview" for event in events)
    chunk = next(e.artifact_chunk for e in events if e.WhichOneof("event") == "artifact_chunk")
    offsets = [pb.ArtifactOffset(output_index=0, offset=chunk.total_bytes - 10)]
    tail = await collect(
        other.stub.WatchGeneration(pb.WatchGenerationRequest(name=name, after_sequence=1, artifact_offsets=offsets))
    )
    assert picture(tail) == picture(rest)[-10:]


async def test_killed_after_accepted_the_other_replica_has_the_picture(pair) -> None:
    (one, other), server, folder = pair
    wanted = request(5, disconnect=DETACH)
    wanted.spec.guidance_scale, wanted.spec.guidance_interval.start = 3, 0.9
    call = one.stub.Generate(wanted)
    accepted = (await call.read()).event
    assert accepted.accepted.durability == pb.Accepted.DURABILITY_REPLICATED
    await one.kill()
    events = await collect(other.stub.WatchGeneration(pb.WatchGenerationRequest(name=accepted.generation)))
    assert sequences(events) == [1, 2, 3]
    assert events[0].event_time == accepted.event_time, "the very event"
    usage = events[-1].finished.usage
    assert usage.num_rows + usage.num_rows_skipped == 2 * usage.num_steps
    assert usage.num_rows_skipped > 0, "it knows the interval"
    await one.start()
    wanted.cache.CopyFrom(BYPASS)
    assert picture(events) == picture(await collect(one.stub.Generate(wanted)))
    assert len(billed(await bills(server.url, folder), [accepted.generation])) == 1


async def test_a_request_id_that_is_sent_to_the_other_replica_never_runs_or_bills_twice(pair) -> None:
    (one, other), server, folder = pair
    message = request(6, request_id=str(uuid.uuid4()))
    call = one.stub.Generate(message)
    first = await until_step(call, 3)
    attached = asyncio.create_task(collect(other.stub.Generate(message)))
    done = await collect(call)
    events = await attached
    replayed = await collect(other.stub.Generate(message))
    assert {e[0].generation for e in (first, events, replayed)} == {first[0].generation}
    assert picture(done) == picture(events) == picture(replayed)
    assert len(billed(await bills(server.url, folder), [first[0].generation])) == 1
    changed = request(7, request_id=message.request_id)
    call = other.stub.Generate(changed)
    with pytest.raises(Exception, match="was used with another request"):
        await collect(call)


async def test_a_request_id_survives_the_replica_that_took_it(pair) -> None:
    (one, other), server, folder = pair
    message = request(8, request_id=str(uuid.uuid4()))
    call = one.stub.Generate(message)
    first = await until_step(call, 10)
    await one.kill()
    events = await collect(other.stub.Generate(message))
    assert events[0].generation == first[0].generation
    await one.start()
    assert picture(events) == await undisturbed(one, 8)
    assert len(billed(await bills(server.url, folder), [first[0].generation])) == 1


async def test_cancel_and_get_reach_the_replica_that_runs_it(pair) -> None:
    (one, other), _, _ = pair
    call = one.stub.Generate(request(9, steps=500))
    first = await until_step(call, 2)
    name = first[0].generation
    got = (await other.stub.GetGeneration(pb.GetGenerationRequest(name=name))).generation
    assert got.state == pb.Generation.STATE_RUNNING
    assert got.spec == first[0].accepted.spec
    cancelled = (await other.stub.CancelGeneration(pb.CancelGenerationRequest(name=name))).generation
    assert cancelled.state == pb.Generation.STATE_CANCELLED
    with pytest.raises(Exception, match="it was cancelled"):
        await collect(call)


async def test_one_that_nobody_watches_is_finished_by_whoever_is_left(pair, tmp_path: Path) -> None:
    (one, other), server, folder = pair
    detached, lost = one.stub.Generate(request(10, disconnect=DETACH)), one.stub.Generate(request(11))
    names = [(await until_step(call, 2))[0].generation for call in (detached, lost)]
    await one.kill()

    async def state(name: str) -> int:
        return (await other.stub.GetGeneration(pb.GetGenerationRequest(name=name))).generation.state

    async def finished() -> bool:
        return await state(names[0]) == pb.Generation.STATE_SUCCEEDED

    await until(finished, 30)
    assert await state(names[1]) == pb.Generation.STATE_SUSPENDED, "it waits for its grace"
    events = await collect(other.stub.WatchGeneration(pb.WatchGenerationRequest(name=names[1])))
    assert sequences(events) == [1, 2, 3]
    await one.start()
    assert picture(events) == await undisturbed(one, 11)
    assert len(billed(await bills(server.url, folder), names)) == 2


async def test_the_client_goes_to_the_next_replica(pair) -> None:
    (one, other), server, folder = pair
    seen: list[object] = []
    async with Client([one.address, other.address]) as client:
        async for event in client.generate("a red potion on a dark background", seed=12, steps=STEPS):
            seen.append(event)
            if isinstance(event, Progress) and event.step >= 6 and one.is_running:
                await one.kill()
    await one.start()
    pictures = [event for event in seen if isinstance(event, Picture)]
    assert [found.data for found in pictures] == [await undisturbed(one, 12)]
    assert isinstance(seen[-1], Finished)
    assert len(billed(await bills(server.url, folder), [seen[-1].generation])) == 1
    async with Client(f"127.0.0.1:1, {other.address}") as client:
        events = [event async for event in client.generate("x", seed=13, steps=2)]
        assert isinstance(events[-1], Finished), "one that was never there"
