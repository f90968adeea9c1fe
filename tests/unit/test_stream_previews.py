"""The previews of a stream are made only when it can send them, newest first, with the outputs in turn."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safelight_server.domain.request import MediaType, PixelEncoding, PreviewPolicy

from tests.support.streams import LINEAR, NONE, PICTURE, TINY, Reader, Stage, kinds, previews, settle

JPEG = dataclasses.replace(TINY, encoding=PixelEncoding(MediaType.JPEG))


def steps(events, output: int = 0) -> list[int]:
    return [preview.step for preview in previews(events, output)]


@pytest.fixture
async def stage():
    stage = Stage()
    stage.accept()
    return stage


@pytest.fixture
async def reader(stage):
    """A reader that has taken Accepted and waits for more."""
    reader = Reader(stage.log.watch(TINY))
    await reader.drain()
    return reader


async def hold_up(stage, reader) -> None:
    """Blocks the stream with an event that its client does not read."""
    stage.queue()
    await settle()
    assert reader.collect() is not None
    assert not reader.waits


async def test_nothing_is_rendered_while_nobody_takes(stage, reader):
    await hold_up(stage, reader)
    for step in range(1, 30):
        stage.step(step)
        await settle()
    assert stage.decoder.calls == []
    assert kinds(await reader.drain()) == ["progress", "preview"]
    [preview] = previews(reader.events)
    assert (preview.step, preview.num_dropped) == (29, 28)
    assert stage.num_rendered == 1
    assert (stage.log.num_previews, stage.log.num_dropped) == (1, 28)
    assert stage.log.preview_bytes == len(preview.data)


async def test_what_comes_while_one_is_made_waits_and_only_the_newest_is_kept(stage, reader):
    stage.decoder.shut = True
    for step in range(1, 5):
        stage.step(step)
        await reader.drain()
    assert len(stage.decoder.calls) == 1
    stage.decoder.answer()
    await reader.drain()
    stage.decoder.answer()
    await reader.drain()
    assert [(preview.step, preview.num_dropped) for preview in previews(reader.events)] == [(1, 0), (4, 2)]


async def test_what_was_made_is_sent(stage, reader):
    """A stream that is blocked when its preview becomes ready still gets it, and then the newest."""
    stage.decoder.shut = True
    stage.step(1)
    await reader.drain()
    await hold_up(stage, reader)
    stage.decoder.answer()
    stage.decoder.shut = False
    stage.step(2)
    stage.step(3)
    await reader.drain()
    assert steps(reader.events) == [1, 3]


async def test_a_preview_that_is_ready_is_not_sent_once_the_picture_has_begun(stage, reader):
    stage.decoder.shut = True
    stage.step(1)
    await reader.drain()
    stage.step(2)
    await hold_up(stage, reader)
    stage.decoder.answer()
    await settle()
    stage.step(3)  # takes the place of Queued in the line
    stage.log.artifact(0, PICTURE)
    assert kinds(await reader.drain()) == ["artifact_chunk"] * 5
    assert (stage.log.num_previews, stage.log.num_dropped) == (0, 3)


async def test_a_preview_under_way_is_not_sent_once_the_picture_has_begun(stage, reader):
    stage.decoder.shut = True
    stage.step(1)
    await reader.drain()
    stage.log.artifact(0, PICTURE)
    assert kinds(await reader.drain()) == ["artifact_chunk"] * 5
    stage.decoder.answer()
    assert await reader.drain() == []
    assert not stage.is_due(2)
    assert (stage.log.num_previews, stage.log.num_dropped) == (0, 1)


async def test_outputs_take_turns(stage, reader):
    """With a budget of one preview at a time, newer frames of one output do not delay the others'."""
    stage.log.update_policy(dataclasses.replace(TINY, max_bytes_per_second=256))
    for step in range(1, 40):
        for output in range(4):
            stage.step(step, output)
        stage.clock.now += 0.5
        await reader.drain()
    counts = [len(steps(reader.events, output)) for output in range(4)]
    assert sum(counts) >= 15
    assert max(counts) - min(counts) <= 1


async def test_a_byte_budget_holds_back_and_counts(stage, reader):
    stage.log.update_policy(dataclasses.replace(TINY, max_bytes_per_second=1024))
    num_steps = 200
    for step in range(1, num_steps + 1):
        stage.clock.now += 0.01
        stage.step(step)
        await reader.drain()
    sent = previews(reader.events)
    num_bytes = sum(len(preview.data) for preview in sent)
    assert 0.9 * 1024 * 3 <= num_bytes <= 1024 * 3 + 256
    assert sum(preview.num_dropped for preview in sent) == sent[-1].step - len(sent)


async def test_an_interval_runs_from_one_sent_to_the_next_made(stage, reader):
    stage.log.update_policy(dataclasses.replace(TINY, min_interval_s=1.0))
    for step in range(1, 41):
        stage.clock.now = step / 10
        stage.step(step)
        await reader.drain()
    assert steps(reader.events) == [1, 11, 21, 31]
    assert all(preview.num_dropped == 0 for preview in previews(reader.events)), "what is not due is not dropped"


async def test_no_copy_is_asked_for_when_nothing_is_due(stage, reader):
    stage.log.update_policy(dataclasses.replace(TINY, every_n_steps=5))
    copied = []
    for step in range(1, 12):
        before = stage.num_frames
        stage.step(step)
        copied += [step] * (stage.num_frames - before)
    assert copied == [1, 5, 10]
    stage.log.update_policy(NONE)
    assert not any(stage.is_due(step) for step in range(12, 30))
    stage.log.update_policy(TINY)
    assert stage.is_due(12)
    reader.watcher.close()
    assert not stage.is_due(12)


async def test_a_later_stream_sees_the_newest_frame_at_once(stage, reader):
    for step in range(1, 4):
        stage.step(step)
        await reader.drain()
    num_rendered = stage.num_rendered
    later = Reader(stage.log.watch(dataclasses.replace(TINY, every_n_steps=50)))
    await later.drain()
    assert steps(later.events) == [3]
    assert stage.num_rendered == num_rendered, "it was made already"
    stage.log.artifact(0, PICTURE)
    last = Reader(stage.log.watch(TINY))
    await last.drain()
    assert steps(last.events) == [], "its picture is there"


async def test_frames_do_not_outlive_the_streams(stage, reader):
    stage.step(1)
    await reader.leave()
    assert stage.feeds[0].newest is None
    later = Reader(stage.log.watch(TINY))
    await later.drain()
    assert steps(later.events) == []


async def test_streams_with_two_encodings_share_the_decoded_image(stage, reader):
    others = [Reader(stage.log.watch(policy)) for policy in (TINY, JPEG)]
    for other in others:
        await other.drain()
    for step in range(1, 6):
        stage.step(step)
        for each in (reader, *others):
            await each.drain()
    assert len(stage.decoder.calls) == 5
    assert stage.num_rendered == 10
    assert stage.log.num_previews == 15
    assert {preview.media_type for preview in previews(others[1].events)} == {"image/jpeg"}


async def test_a_new_policy_counts_from_the_next_frame(stage, reader):
    await hold_up(stage, reader)
    stage.step(1)
    stage.log.update_policy(JPEG)
    await reader.drain()
    assert [preview.media_type for preview in previews(reader.events)] == ["image/jpeg"]
    await hold_up(stage, reader)
    stage.step(2)
    stage.log.update_policy(NONE)
    await reader.drain()
    stage.step(3)
    await reader.drain()
    assert steps(reader.events) == [1]


async def test_a_policy_may_change_while_a_preview_is_made(stage, reader):
    stage.decoder.shut = True
    stage.step(1)
    await reader.drain()
    stage.log.update_policy(dataclasses.replace(LINEAR, max_bytes_per_second=1024))
    stage.decoder.answer()
    await reader.drain()
    for step in range(2, 8):
        stage.clock.now += 10
        stage.step(step)
        await reader.drain()
    assert steps(reader.events) == list(range(1, 8))


@pytest.mark.parametrize("failure", [None, RuntimeError("no decoder")])
async def test_one_that_cannot_be_made_costs_only_itself(stage, reader, failure, capsys):
    stage.decoder.shut = True
    stage.step(1)
    await reader.drain()
    stage.step(2)
    await reader.drain()
    if failure is None:
        stage.decoder.answer(superseded=True)
    else:
        stage.decoder.waiting.pop(0).set_exception(failure)
    await reader.drain()
    stage.decoder.answer()
    await reader.drain()
    assert [(preview.step, preview.num_dropped) for preview in previews(reader.events)] == [(2, 1)]
    printed = capsys.readouterr()
    assert ("preview_failed" in printed.out + printed.err) == (failure is not None)


async def test_the_first_preview_is_timed_when_it_is_handed_over(stage, reader):
    assert stage.log.first_preview_at is None
    stage.decoder.shut = True
    stage.clock.now = 3.0
    stage.step(1)
    await reader.drain()
    stage.clock.now = 4.0
    stage.decoder.answer()
    await reader.drain()
    stage.clock.now = 5.0
    stage.step(2)
    assert stage.log.first_preview_at == 4.0


@given(
    plan=st.lists(st.sampled_from(["step", "take", "answer", "supersede"]), max_size=60),
    policy=st.sampled_from([TINY, LINEAR, dataclasses.replace(TINY, every_n_steps=3), PreviewPolicy(TINY.encoding)]),
)
@settings(max_examples=100, deadline=None)
def test_every_frame_that_was_due_is_sent_or_counted_as_dropped(plan, policy):
    async def scenario() -> None:
        stage = Stage()
        stage.decoder.shut = True
        reader, step = Reader(stage.log.watch(policy)), 0
        for action in plan:
            if action == "step":
                step += 1
                stage.step(step)
            elif action == "take":
                await reader.take()
            elif stage.decoder.waiting:
                stage.decoder.answer(superseded=action == "supersede")
            await settle()
        stage.complete()
        for _ in stage.decoder.waiting.copy():
            stage.decoder.answer()
        await reader.drain()
        sent = previews(reader.events)
        assert (stage.log.num_previews, stage.log.preview_bytes) == (len(sent), sum(len(one.data) for one in sent))
        assert stage.log.num_previews + stage.log.num_dropped == stage.num_frames
        assert sum(one.num_dropped for one in sent) <= stage.log.num_dropped

    asyncio.run(scenario())
