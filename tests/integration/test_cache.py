"""The caches through a real server with the real model: earlier work is not repeated."""

from __future__ import annotations

import asyncio
import itertools
import sys
from types import FrameType

import grpc
import numpy as np
import pytest
import pytest_asyncio
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs

from tests.conftest import eventually, serving_here
from tests.integration.test_generate import BYPASS, collect, kinds, pixels, reason_of, request
from tests.support.pause import steps_paused

R = pb.CacheResult
SIMILAR = pb.CachePolicy(mode=pb.CachePolicy.MODE_ALLOW_SIMILAR, min_similarity=0.8)
LATENT = pb.CachePolicy(mode=pb.CachePolicy.MODE_ALLOW_LATENT)


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server():
    """A server shared by tests that need no settings of their own; each test uses its own seeds."""
    async with serving_here() as running, grpc.aio.insecure_channel(running.address) as channel:
        yield running, stubs.GenerationServiceStub(channel)


@pytest.fixture
def seed(_seeds=itertools.count(100, 10)):
    """The first of ten seeds that no other test uses."""
    return next(_seeds)


def ask(prompt: str, seed: int, policy: pb.CachePolicy | None = None, **changes: object) -> pb.GenerateRequest:
    message = request(seed, steps=10, **changes)
    message.spec.prompt = prompt
    if policy is not None:
        message.cache.CopyFrom(policy)
    return message


def result(events: list[pb.GenerationEvent]) -> pb.CacheResult:
    [only] = events[-1].finished.cache_results
    return only


def pictures(events: list[pb.GenerationEvent]) -> list[bytes]:
    """The encoded picture of each output."""
    data: dict[int, bytes] = {}
    for chunk in (e.artifact_chunk for e in events if e.WhichOneof("event") == "artifact_chunk"):
        data[chunk.output_index] = data.get(chunk.output_index, b"") + chunk.data
    return list(data.values())


async def kept(running) -> None:
    """Waits until all writes to the caches have ended."""
    await eventually(lambda: not (running.inspect().live or running.inspect().keeping))


async def test_an_identical_request_gets_the_very_picture_without_a_denoiser_row(server, seed):
    running, stub = server
    first = await collect(stub.Generate(request(seed)))
    await kept(running)
    again = await collect(stub.Generate(request(seed)))
    assert kinds(again) == ["accepted", "artifact_chunk", "output_finished", "finished"]
    assert np.array_equal(pixels(first), pixels(again))
    assert again[-1].finished.usage.num_rows == 0
    found = result(again)
    assert (found.disposition, found.num_steps_skipped) == (R.DISPOSITION_EXACT, 6)
    assert found.source == first[0].generation
    assert result(first).disposition == R.DISPOSITION_MISS


async def test_a_hit_calls_few_functions_of_the_server(server, seed):
    """What is done again for each request, though it depends on the model or the settings alone, shows as calls.

    Their number is the same on a busy machine, where a time is not. It was 433 when this bound was set, and 580 before.
    """
    running, stub = server
    for _ in range(2):  # the second makes and keeps the encoded file
        await collect(stub.Generate(request(seed)))
        await kept(running)
    num_calls, seen = 0, []

    def count(frame: FrameType, event: str, _what: object) -> None:
        nonlocal num_calls
        num_calls += event == "call" and "/safelight_server/" in frame.f_code.co_filename

    sys.setprofile(count)
    try:
        for _ in range(10):
            before = num_calls
            found = result(await collect(stub.Generate(request(seed))))
            seen.append(num_calls - before)
            assert found.disposition == R.DISPOSITION_EXACT
    finally:
        sys.setprofile(None)
    assert min(seen) < 500, seen  # the least: what runs four times a second may be in the others


async def test_defaults_spelled_out_and_other_encodings_find_the_same_picture(server, seed):
    running, stub = server
    first = await collect(stub.Generate(request(seed)))
    await kept(running)
    spelled_out = pb.GenerateRequest(spec=first[0].accepted.spec, encoding=pb.PixelEncoding(media_type="image/webp"))
    again = await collect(stub.Generate(spelled_out))
    assert result(again).disposition == R.DISPOSITION_EXACT
    chunks = [e.artifact_chunk for e in again if e.WhichOneof("event") == "artifact_chunk"]
    assert {chunk.media_type for chunk in chunks} == {"image/webp"}
    raw = pb.GenerateRequest(spec=first[0].accepted.spec)
    raw.encoding.media_type = "application/x-raw-rgba8"
    raw.encoding.row_order = pb.PixelEncoding.ROW_ORDER_BOTTOM_UP
    events = await collect(stub.Generate(raw))
    data = b"".join(e.artifact_chunk.data for e in events if e.WhichOneof("event") == "artifact_chunk")
    rows = np.frombuffer(data, np.uint8).reshape(pixels(first).shape[0], -1, 4)
    assert np.array_equal(rows[::-1, :, :3], pixels(first))


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"steps": 7},
        {"guidance_scale": 2.0},
        {"guidance_rescale": 0.5},
        {"guidance_interval": pb.GuidanceInterval(start=0.34)},
        {"prompt": "a blue potion"},
        {"sampler": "euler"},
    ],
)
async def test_anything_that_decides_pixels_makes_it_another_picture(server, seed, change):
    running, stub = server
    await collect(stub.Generate(request(seed, steps=3)))
    await kept(running)
    other = request(seed=seed + change.get("seed", 0), steps=change.get("steps", 3))
    guidance = {name: value for name, value in change.items() if name.startswith("guidance")}
    other.spec.MergeFrom(pb.GenerationSpec(**guidance))
    other.spec.prompt = change.get("prompt", other.spec.prompt)
    other.spec.sampler.name = change.get("sampler", "")
    assert result(await collect(stub.Generate(other))).disposition == R.DISPOSITION_MISS


async def test_bypass_neither_reads_nor_keeps(server, seed):
    running, stub = server
    for policy, disposition in ((BYPASS, R.DISPOSITION_MISS), (None, R.DISPOSITION_MISS), (BYPASS, R.DISPOSITION_MISS)):
        events = await collect(stub.Generate(ask("a red potion", seed, policy)))
        assert result(events).disposition == disposition
        await kept(running)
    assert result(await collect(stub.Generate(ask("a red potion", seed)))).disposition == R.DISPOSITION_EXACT


async def test_a_full_queue_never_refuses_what_is_there(start):
    async with (
        start(max_running_outputs=1, max_waiting_per_caller=1) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        stub = stubs.GenerationServiceStub(channel)
        await collect(stub.Generate(request()))
        await kept(running)
        with steps_paused(running):
            calls = [asyncio.create_task(collect(stub.Generate(request(seed, steps=50)))) for seed in (1, 2)]
            await eventually(lambda: running.inspect().live == 2)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await collect(stub.Generate(request(3)))
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert result(await collect(stub.Generate(request()))).disposition == R.DISPOSITION_EXACT
        for call in calls:
            call.cancel()


async def test_a_similar_picture_is_served_only_where_allowed_and_where_the_text_says_the_same(server, seed):
    running, stub = server
    source = await collect(stub.Generate(ask("a red potion on a dark background", seed)))
    await kept(running)
    similar = await collect(stub.Generate(ask("red potion, dark background", seed + 1, SIMILAR)))
    found = result(similar)
    assert found.disposition == R.DISPOSITION_SIMILAR
    assert (found.source, found.num_steps_skipped) == (source[0].generation, 10)
    assert 0.8 <= found.similarity <= 1
    assert np.array_equal(pixels(similar), pixels(source))
    for prompt, policy in (
        ("red potion, dark background", None),
        ("a blue potion on a dark background", SIMILAR),
        ("a red sword on a dark background", SIMILAR),
        ("a red potion on a white background", SIMILAR),
    ):
        answer = result(await collect(stub.Generate(ask(prompt, seed + 2, policy))))
        assert answer.disposition not in (R.DISPOSITION_SIMILAR, R.DISPOSITION_EXACT), prompt


@pytest.mark.parametrize("policy", [SIMILAR, LATENT], ids=["similar", "latent"])
async def test_no_two_outputs_of_a_request_show_the_same_picture(server, seed, policy):
    running, stub = server
    prompt, reworded = "an emerald ring on a dark background", "emerald ring, dark background"
    await collect(stub.Generate(ask(prompt, seed)))
    await kept(running)
    message = ask(reworded, seed + 1, policy)
    for number in (2, 3):
        message.spec.outputs.add(seed=seed + number)
    events = await collect(stub.Generate(message))
    found = [one.disposition for one in events[-1].finished.cache_results]
    wanted = R.DISPOSITION_SIMILAR if policy is SIMILAR else R.DISPOSITION_LATENT
    assert wanted in found
    assert len(set(pictures(events))) == 3
    await kept(running)
    again = await collect(stub.Generate(ask(prompt, seed, policy)))
    assert result(again).disposition == R.DISPOSITION_EXACT


async def test_a_similarity_of_one_is_that_of_the_same_words(server, seed):
    running, stub = server
    await collect(stub.Generate(ask("a silver shield on a dark background", seed)))
    await kept(running)
    strict = pb.CachePolicy(mode=pb.CachePolicy.MODE_ALLOW_SIMILAR, min_similarity=1)
    reworded = result(await collect(stub.Generate(ask("silver shield, dark background", seed + 1, strict))))
    same = result(await collect(stub.Generate(ask("a silver shield on a dark background", seed + 2, strict))))
    assert reworded.disposition != R.DISPOSITION_SIMILAR
    assert (same.disposition, same.similarity) == (R.DISPOSITION_SIMILAR, 1)


async def test_another_seed_of_the_same_prompt_does_not_begin_from_its_latent(server, seed):
    """Otherwise it would become the same picture."""
    running, stub = server
    first = await collect(stub.Generate(ask("a golden crown on a grey background", seed)))
    await kept(running)
    second = await collect(stub.Generate(ask("a golden crown on a grey background", seed + 1, LATENT)))
    assert result(second).disposition == R.DISPOSITION_MISS
    assert not np.array_equal(pixels(first), pixels(second))


async def test_after_so_many_similar_answers_one_is_developed_anew(start):
    async with start(cache_similar_uses=2) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        first = await collect(stub.Generate(ask("a red potion on a dark background", 1)))
        await collect(stub.Generate(ask("a blue potion on a dark background", 1)))
        answers = []
        for seed in range(2, 6):
            await kept(running)
            answers.append(await collect(stub.Generate(ask("red potion, dark background", seed, SIMILAR))))
        found = [result(answer) for answer in answers]
        similar, miss = R.DISPOSITION_SIMILAR, R.DISPOSITION_MISS
        assert [one.disposition for one in found] == [similar, similar, miss, similar], (
            "from noise, not from any latent"
        )
        sources = [one.source for one in found if one.disposition == similar]
        assert sources == [first[0].generation, first[0].generation, answers[2][0].generation]
        await kept(running)
        same = result(await collect(stub.Generate(ask("a red potion on a dark background", 9, SIMILAR))))
        assert same.source == answers[2][0].generation, "although the first is nearer"
        again = await collect(stub.Generate(ask("a red potion on a dark background", 1)))
        assert result(again).disposition == R.DISPOSITION_EXACT, "it is only found as similar no more"


async def test_of_many_at_once_only_every_so_manyth_is_developed_anew(start):
    async with start(cache_similar_uses=2) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        await collect(stub.Generate(ask("a red potion on a dark background", 1)))
        await kept(running)
        asked = [ask("red potion, dark background", seed, SIMILAR) for seed in range(2, 11)]
        with steps_paused(running):
            calls = [asyncio.create_task(collect(stub.Generate(message))) for message in asked]
            await eventually(lambda: sum(call.done() for call in calls) + running.inspect().outputs == len(calls))
        answers = await asyncio.gather(*calls)
        found = [result(answer).disposition for answer in answers]
        assert sorted(found) == [R.DISPOSITION_MISS] * 3 + [R.DISPOSITION_SIMILAR] * 6


async def test_a_picture_answers_until_another_is_there_to_take_its_place(start):
    async with start(cache_similar_uses=1) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        first = await collect(stub.Generate(ask("a red potion on a dark background", 1)))
        await kept(running)
        await collect(stub.Generate(ask("red potion, dark background", 2, SIMILAR)))
        with steps_paused(running):
            stream = stub.Generate(ask("red potion, dark background", 3, SIMILAR))
            await stream.read()
            stream.cancel()
            answering = asyncio.create_task(collect(stub.Generate(ask("red potion, dark background", 4, SIMILAR))))
            await asyncio.wait([answering], timeout=5)  # what is not served would wait for the end of the pause
        again = await answering
        assert (result(again).disposition, result(again).source) == (R.DISPOSITION_SIMILAR, first[0].generation)


async def test_a_picture_that_is_made_again_is_in_the_index_once(start):
    async with start(cache_similar_uses=1) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        await collect(stub.Generate(ask("red potion, dark background", 1)))
        await kept(running)
        for _ in range(3):
            near = await collect(stub.Generate(ask("a red potion on a dark background", 50, LATENT)))
            assert result(near).disposition == R.DISPOSITION_LATENT
            await kept(running)
        assert len(running.cache._similar._store) == 2
        found = []
        for seed in (60, 61):
            asked = ask("a red potion on a dark background", seed, SIMILAR)
            found.append(result(await collect(stub.Generate(asked))).disposition)
            await kept(running)
            await collect(stub.Generate(ask("a red potion on a dark background", 50, LATENT)))
            await kept(running)
        assert found == [R.DISPOSITION_SIMILAR, R.DISPOSITION_MISS], "its answers are counted whoever made it"


async def test_a_nearby_latent_saves_steps_and_never_enters_exact(server, seed):
    running, stub = server
    await collect(stub.Generate(ask("a red potion on a dark background", seed)))
    await kept(running)
    wanted = ask("red potion, dark background", seed + 1, LATENT)
    near = await collect(stub.Generate(wanted))
    found = result(near)
    assert found.disposition == R.DISPOSITION_LATENT
    assert 0 < found.num_steps_skipped <= 5
    assert near[-1].finished.usage.num_steps == 10 - found.num_steps_skipped
    await kept(running)
    exact = await collect(stub.Generate(ask("red potion, dark background", seed + 1)))
    assert result(exact).disposition == R.DISPOSITION_MISS, "what is approximate is not exact"
    assert not np.array_equal(pixels(exact), pixels(near))


async def test_a_branch_starts_from_a_step_of_another(server, seed):
    running, stub = server
    source = await collect(stub.Generate(ask("a red potion on a dark background", seed)))
    await kept(running)
    message = ask("a blue potion on a dark background", seed)
    message.branch.CopyFrom(pb.Branch(generation=source[0].generation, step=4))
    first = await collect(stub.Generate(message))
    found = result(first)
    assert (found.disposition, found.num_steps_skipped) == (R.DISPOSITION_BRANCHED, 4)
    assert first[-1].finished.usage.num_steps == 6
    assert np.array_equal(pixels(first), pixels(await collect(stub.Generate(message))))
    same = ask("a red potion on a dark background", seed)
    same.branch.CopyFrom(message.branch)
    assert np.array_equal(pixels(await collect(stub.Generate(same))), pixels(source)), "the same way leads to the same"


@pytest.mark.parametrize(
    ("branch", "field", "code"),
    [
        ({"step": 4, "generation": "x"}, "branch.generation", "INVALID_ARGUMENT"),
        ({"step": 0}, "branch.step", "INVALID_ARGUMENT"),
        ({"step": 10}, "branch.step", "INVALID_ARGUMENT"),
        ({"step": 4, "output_index": 1}, "branch.output_index", "INVALID_ARGUMENT"),
        ({"step": 4, "output_index": -1}, "branch.output_index", "INVALID_ARGUMENT"),
        ({"step": 4, "generation": "generations/0"}, "branch.generation", "NOT_FOUND"),
    ],
)
async def test_what_cannot_be_a_branch_is_refused(server, seed, branch, field, code):
    _, stub = server
    source = await collect(stub.Generate(ask("a red potion", seed)))
    message = ask("a blue potion", seed)
    message.branch.CopyFrom(pb.Branch(**({"generation": source[0].generation} | branch)))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(stub.Generate(message))
    assert caught.value.code().name == code
    assert field.encode() in dict(caught.value.trailing_metadata())["grpc-status-details-bin"]


async def test_a_branch_of_what_is_not_kept_is_refused(server, seed):
    _, stub = server
    source = await collect(stub.Generate(ask("a red potion", seed, BYPASS)))
    message = ask("a blue potion", seed)
    message.branch.CopyFrom(pb.Branch(generation=source[0].generation, step=4))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(stub.Generate(message))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert reason_of(caught.value) == "CHECKPOINT_GONE"
    message = ask("a blue potion", seed)
    message.spec.num_inference_steps = 12
    message.branch.CopyFrom(pb.Branch(generation=source[0].generation, step=4))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(stub.Generate(message))
    assert "must have the steps of" in caught.value.details()


async def test_what_is_approximate_has_no_steps_to_branch_from(server, seed):
    """Checkpoints under its spec may belong to another output, which started from noise and has another picture."""
    running, stub = server
    await collect(stub.Generate(ask("a red potion on a dark background", seed)))
    await kept(running)
    prompt = "red potion, dark background"
    near = await collect(stub.Generate(ask(prompt, seed + 1, LATENT)))
    similar = await collect(stub.Generate(ask(prompt, seed + 1, SIMILAR)))
    assert result(near).disposition == R.DISPOSITION_LATENT
    assert result(similar).disposition == R.DISPOSITION_SIMILAR
    exact = await collect(stub.Generate(ask(prompt, seed + 1)))
    await kept(running)
    message = ask("a blue potion on a dark background", seed + 1)
    message.branch.CopyFrom(pb.Branch(generation=exact[0].generation, step=4))
    branched = await collect(stub.Generate(message))
    assert result(branched).disposition == R.DISPOSITION_BRANCHED
    await collect(stub.Generate(ask("a blue potion on a dark background", seed + 1)))
    await kept(running)
    for source in (near, similar, branched):
        message.branch.generation = source[0].generation
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(stub.Generate(message))
        assert reason_of(caught.value) == "CHECKPOINT_GONE"


@pytest.fixture
def two_tenants(tmp_path):
    from safelight_server.api.identity import new_key

    (ann, ann_entry), (bob, bob_entry) = new_key("ann", "a"), new_key("bob", "b")
    keys = tmp_path / "keys.json"
    keys.write_text(f'{{"keys": [{ann_entry}, {bob_entry}]}}')
    return keys, *((("authorization", f"Bearer {key}"),) for key in (ann, bob))


@pytest.mark.parametrize("pooled", [False, True])
async def test_nothing_crosses_tenants_unless_pooled(start, two_tenants, pooled):
    keys, ann, bob = two_tenants
    pools = {"studio": ("a", "b")} if pooled else {}
    async with (
        start(api_key_file=keys, cache_pools=pools) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        stub = stubs.GenerationServiceStub(channel)
        first = await collect(stub.Generate(ask("a red potion on a dark background", 7), metadata=ann))
        await kept(running)
        exact = result(await collect(stub.Generate(ask("a red potion on a dark background", 7), metadata=bob)))
        assert (exact.disposition == R.DISPOSITION_EXACT) is pooled
        if not pooled:
            near = await collect(stub.Generate(ask("red potion, dark background", 8, SIMILAR), metadata=bob))
            assert result(near).source != first[0].generation
        message = ask("a blue potion", 7)
        message.branch.CopyFrom(pb.Branch(generation=first[0].generation, step=4))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(stub.Generate(message, metadata=bob))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND, "a generation is its owner's, pooled or not"


async def test_a_prompt_is_read_and_compared_once_for_a_request(server, seed, monkeypatch):
    running, stub = server
    prompts, reads, vectors = running.cache._prompts, [], []
    known, vector = prompts.known, prompts.vector

    def counted(calls, call):
        async def counting(*args):
            calls.append(args)
            return await call(*args)

        return counting

    await collect(stub.Generate(ask(f"a red potion {seed}", seed, SIMILAR)))
    await kept(running)
    monkeypatch.setattr(prompts, "known", counted(reads, known))
    monkeypatch.setattr(prompts, "vector", counted(vectors, vector))
    await collect(stub.Generate(ask(f"a blue sword {seed}", seed + 1, SIMILAR)))
    await kept(running)
    await eventually(lambda: not running.inspect().keeping)
    assert (len(reads), len(vectors)) == (2, 1), "the prompt and the negative prompt; and nothing when it is kept"


async def test_nothing_of_the_caches_outlives_the_server():
    async with serving_here(runtime="simulated") as running:
        starts, executions = running.cache._warm_starts, running.generations._planner._executions
        starts._start(asyncio.sleep(3600))
        keeping = asyncio.create_task(asyncio.sleep(0.2))
        executions._tasks.add(keeping)
        keeping.add_done_callback(executions._tasks.discard)
    assert not starts._rebuilding
    assert keeping.done()
