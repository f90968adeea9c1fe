"""Streams get all reliable events in order, and the newest of the others, with any interleaving."""

from __future__ import annotations

import asyncio
import hashlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safelight.v1 import generation_pb2 as pb
from safelight_server.domain.errors import InvalidRequestError, QueueFullError
from safelight_server.domain.events import FinishReason
from safelight_server.domain.request import PreviewPolicy

from tests.support.streams import LINEAR, NONE, PICTURE, TINY, Reader, Stage, kinds, picture, previews, settle

EVERY_3RD = PreviewPolicy(encoding=TINY.encoding, method=TINY.method, every_n_steps=3)
MAX_OUTPUTS = 3


@pytest.fixture
def stage():
    return Stage()


# --- the reliable lane ---


async def test_a_stream_from_the_beginning(stage):
    stage.accept()
    reader = Reader(stage.log.watch(LINEAR))
    stage.queue(3)
    await reader.drain()
    stage.step(1)
    await reader.drain()
    stage.complete()
    await reader.drain()
    assert kinds(reader.events) == [
        "accepted",
        "queued",
        "progress",
        "preview",
        *["artifact_chunk"] * 5,
        "output_finished",
        "finished",
    ]
    assert reader.ended
    assert [event.sequence for event in reader.events if event.sequence] == [1, 2, 3]
    assert {event.generation for event in reader.events} == {"generations/x"}
    assert all(event.event_time.seconds > 0 for event in reader.events)
    assert picture(reader.events) == PICTURE.data
    hashes = [event.artifact_chunk.sha256 for event in reader.events if event.HasField("artifact_chunk")]
    assert hashes == [b""] * 4 + [hashlib.sha256(PICTURE.data).digest()]


async def test_a_replay_has_only_what_still_means_something(stage):
    stage.accept()
    stage.queue()
    stage.step(4)
    stage.end(1, FinishReason.FAILED)
    stage.complete()
    reader = Reader(stage.log.watch(LINEAR))
    await reader.drain()
    assert kinds(reader.events) == [
        "accepted",
        "output_finished",
        *["artifact_chunk"] * 5,
        "output_finished",
        "finished",
    ]
    assert reader.ended


async def test_a_replay_of_one_cancelled_in_the_queue_ends_with_finished(stage):
    stage.accept()
    stage.queue(5)
    stage.end(0, FinishReason.CANCELLED)
    stage.finish()
    reader = Reader(stage.log.watch(LINEAR))
    assert kinds(await reader.drain()) == ["accepted", "output_finished", "finished"]


async def test_nothing_follows_finished(stage):
    """After a cancellation, progress, a place in the queue and a running preview come too late."""
    stage.accept()
    reader = Reader(stage.log.watch(TINY))
    await reader.take()
    stage.decoder.shut = True
    stage.step(1)
    await reader.drain()
    assert stage.decoder.waiting
    stage.step(2)
    await settle()
    reader.collect()  # held up from here on, with a preview under way
    stage.step(3)
    stage.queue()
    stage.end(0, FinishReason.CANCELLED)
    stage.finish()
    stage.decoder.answer()
    await settle()
    assert kinds(await reader.drain()) == ["output_finished", "finished"]
    assert reader.ended


@example(offset=1, after=0)  # seen first: a wrong offset can also make the stream endless
@given(offset=st.integers(0, len(PICTURE.data)), after=st.integers(0, 3))
@settings(deadline=None)
def test_a_stream_resumes_at_any_byte(offset, after):
    async def scenario() -> None:
        stage = Stage()
        stage.accept()
        stage.complete()
        reader = Reader(stage.log.watch(LINEAR, after, {0: offset}))
        await reader.drain()
        assert reader.ended
        assert picture(reader.events) == PICTURE.data[offset:]
        chunks = [event.artifact_chunk for event in reader.events if event.HasField("artifact_chunk")]
        at = offset
        for chunk in chunks:
            assert (chunk.offset, chunk.total_bytes) == (at, len(PICTURE.data))
            at += len(chunk.data)
        assert all(chunk.sha256 == b"" for chunk in chunks[:-1])
        assert not chunks or chunks[-1].sha256
        assert [event.sequence for event in reader.events if event.sequence] == list(range(after + 1, 4))

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("after", "offsets", "field"),
    [
        (9, {}, "after_sequence"),
        (0, {0: 5}, "artifact_offsets"),
        (0, {7: 1}, "artifact_offsets"),
        (0, {1: len(PICTURE.data) + 1}, "artifact_offsets"),
        (0, {1: -1}, "artifact_offsets"),
    ],
)
async def test_what_cannot_be_resumed_names_the_field(stage, after, offsets, field):
    stage.accept()
    stage.log.artifact(1, PICTURE)
    with pytest.raises(InvalidRequestError) as caught:
        stage.log.watch(LINEAR, after, offsets)
    assert [violation.field for violation in caught.value.violations] == [field]
    assert not stage.log.watchers


@pytest.mark.parametrize("offset", [0, 5, len(PICTURE.data), 10 * len(PICTURE.data)])
async def test_a_client_may_have_more_of_a_picture_than_this_replica_knows_of(stage, offset):
    """The previous owner had sent it, and ended before it could record that."""
    stage.log.begun_elsewhere = True
    stage.accept()
    reader = Reader(stage.log.watch(LINEAR, 1, {0: offset}))
    stage.complete()
    await reader.drain()
    assert picture(reader.events) == PICTURE.data[offset:]
    assert [event.sequence for event in reader.events if event.sequence] == [2, 3] and reader.ended
    with pytest.raises(InvalidRequestError):
        stage.log.watch(LINEAR, 1, {0: len(PICTURE.data) + 1})


async def test_a_client_may_have_accepted_before_this_replica_knows_of_it(stage):
    """The previous owner had sent it during an outage, and ended before it could record that."""
    with pytest.raises(InvalidRequestError):
        stage.log.watch(LINEAR, 1)
    stage.log.begun_elsewhere = True
    with pytest.raises(InvalidRequestError):
        stage.log.watch(LINEAR, 2)
    reader = Reader(stage.log.watch(LINEAR, 1))
    stage.accept()
    stage.complete()
    await reader.drain()
    assert [event.sequence for event in reader.events if event.sequence] == [2, 3] and reader.ended


async def test_streams_share_the_bytes(stage):
    stage.accept()
    streams = [stage.log.watch(LINEAR).events() for _ in range(2)]
    first = [await anext(stream) for stream in streams]
    assert first[0] is first[1]
    waiting = [asyncio.ensure_future(anext(stream)) for stream in streams]
    await settle()
    stage.step(1)
    await asyncio.gather(*waiting)
    one, other = [await anext(stream) for stream in streams]
    assert pb.GenerateResponse.FromString(one).event.HasField("preview")
    assert one is other
    stage.complete()
    for _ in range(7):
        one, other = [await anext(stream) for stream in streams]
        assert one is other


def test_both_calls_have_the_same_wire_form():
    """Streams use the same serialization for both responses."""
    event = pb.GenerationEvent(sequence=3, generation="generations/x", preview=pb.Preview(step=2, data=b"pixels"))
    data = pb.GenerateResponse(event=event).SerializeToString()
    assert pb.WatchGenerationResponse.FromString(data).event == event
    assert pb.WatchGenerationResponse(event=event).SerializeToString() == data
    both = [message.DESCRIPTOR for message in (pb.GenerateResponse, pb.WatchGenerationResponse)]
    fields = [[(field.number, field.name, field.message_type.full_name) for field in one.fields] for one in both]
    assert fields[0] == fields[1]


# --- the newest of the rest ---


async def test_one_that_is_held_up_gets_the_newest_of_each(stage):
    stage.accept()
    reader = Reader(stage.log.watch(NONE))
    await reader.take()
    for step in range(1, 10):
        for output in range(2):
            stage.step(step, output)
    newest = await reader.drain()
    assert [(event.progress.output_index, event.progress.step) for event in newest] == [(0, 9), (1, 9)]


async def test_a_place_in_the_queue_is_history_once_it_runs(stage):
    stage.accept()
    reader = Reader(stage.log.watch(NONE))
    await reader.take()
    stage.queue()
    stage.step(1)
    assert kinds(await reader.drain()) == ["progress"]


async def test_the_reliable_lane_goes_first(stage):
    stage.accept()
    reader = Reader(stage.log.watch(NONE))
    await reader.take()
    stage.step(3, 1)
    stage.complete(0, last=False)
    assert kinds(await reader.drain()) == [*["artifact_chunk"] * 5, "output_finished", "progress"]


# --- who watches ---


async def test_streams_are_bounded():
    stage = Stage(max_watchers=2)
    first = stage.log.watch(LINEAR)
    stage.log.watch(LINEAR)
    with pytest.raises(QueueFullError) as caught:
        stage.log.watch(LINEAR)
    assert caught.value.reason == "TOO_MANY_WATCHERS"
    assert caught.value.metadata["limit"] == "2"
    assert caught.value.retry_after_s is not None, "it may succeed later"
    first.close()
    stage.log.watch(LINEAR)


async def test_one_that_is_not_read_is_seen_to_stall(stage):
    stage.accept()
    reader = Reader(stage.log.watch(NONE))
    assert reader.watcher.stalled_for(99.0) == 0.0
    await reader.take()
    stage.clock.now = 12.0
    assert reader.watcher.stalled_for(stage.clock.now) == 12.0
    await reader.take()
    assert reader.waits
    stage.clock.now = 99.0
    assert reader.watcher.stalled_for(stage.clock.now) == 0.0, "having nothing to send is no stall"


@pytest.mark.parametrize("held_up", [True, False])
async def test_a_stream_that_is_closed_ends(stage, held_up):
    stage.accept()
    reader = Reader(stage.log.watch(TINY))
    await reader.take()
    stage.decoder.shut = True
    stage.step(1)
    while not held_up and not reader.waits:
        await reader.take()
    reader.watcher.close()
    assert not stage.log.watchers
    assert not stage.is_due(2)
    await reader.drain()
    assert reader.ended
    if stage.decoder.waiting:
        stage.decoder.answer()
        await settle()
    assert stage.log.num_previews == 0


# --- whatever the interleaving ---

ACTIONS = st.one_of(
    st.tuples(st.just("step"), st.integers(0, MAX_OUTPUTS - 1)),
    st.tuples(st.just("take"), st.integers(0, 3)),
    st.tuples(st.just("answer"), st.booleans()),
    st.tuples(st.just("end"), st.integers(0, MAX_OUTPUTS - 1)),
    st.tuples(st.just("tick"), st.integers(1, 10)),
    st.tuples(st.just("join"), st.sampled_from([LINEAR, TINY, EVERY_3RD, NONE])),
)
TIMED = PreviewPolicy(encoding=TINY.encoding, method=TINY.method, min_interval_s=0.4, max_bytes_per_second=1024)


class Play:
    """Publishes and reads at random, and checks the invariants."""

    def __init__(self, outputs: int) -> None:
        self.stage = Stage(max_watchers=4)
        self.stage.decoder.shut = True
        self.stage.decoder.on_call = self.check_that_someone_waits
        self.steps = [0] * outputs
        self.ended: list[bool] = [False] * outputs
        self.readers: list[Reader] = []
        self.stage.accept()
        self.join(TINY)
        self.join(TIMED)

    def join(self, policy: PreviewPolicy) -> None:
        if len(self.readers) < 4:
            self.readers.append(Reader(self.stage.log.watch(policy)))

    def check_that_someone_waits(self) -> None:
        assert any(reader.waits for reader in self.readers), "a preview is made and nobody would take it"

    def end(self, output: int) -> None:
        if not self.ended[output]:
            self.ended[output] = True
            if self.steps[output] % 2:
                self.stage.log.artifact(output, PICTURE)
            self.stage.end(output)

    async def act(self, action: str, value: object) -> None:
        match action, value:
            case "step", int(output) if output < len(self.steps) and not self.ended[output]:
                self.steps[output] += 1
                self.stage.step(self.steps[output], output)
            case "take", int(number) if number < len(self.readers):
                await self.readers[number].take()
            case "answer", bool(superseded) if self.stage.decoder.waiting:
                self.stage.decoder.answer(superseded=superseded)
            case "end", int(output) if output < len(self.steps):
                self.end(output)
            case "tick", int(tenths):
                self.stage.clock.now += tenths / 10
            case "join", PreviewPolicy() as policy:
                self.join(policy)
        await settle()
        self.check_bounds()

    def check_bounds(self) -> None:
        for reader in self.readers:
            own = reader.watcher.previews
            assert len(reader.watcher._slots) <= 2 * len(self.steps) + 1
            assert max(len(own._waiting), len(own._making), len(own._cadences)) <= len(self.steps)

    async def end_all(self) -> None:
        for output in range(len(self.steps)):
            self.end(output)
        self.stage.finish()
        while self.stage.decoder.waiting:
            self.stage.decoder.answer()
        await settle()
        for reader in self.readers:
            while not reader.ended:
                await reader.take()
            self.check(reader.events)

    def check(self, events: list[pb.GenerationEvent]) -> None:
        assert kinds(events)[0] == "accepted"
        assert kinds(events)[-1] == "finished"
        assert [event.sequence for event in events if event.sequence] == list(range(1, len(self.steps) + 3))
        for output, steps in enumerate(self.steps):
            names = [
                event.WhichOneof("event")
                for event in events
                if getattr(getattr(event, str(event.WhichOneof("event"))), "output_index", -1) == output
            ]
            until = [index for index, name in enumerate(names) if name in ("progress", "preview")]
            assert until == list(range(len(until))), "progress or a preview after the picture has begun"
            assert names[-1] == "output_finished"
            assert picture(events, output) == (PICTURE.data if steps % 2 else b"")
            seen = [preview.step for preview in previews(events, output)]
            assert seen == sorted(set(seen))


@given(plan=st.lists(ACTIONS, max_size=60), outputs=st.integers(1, MAX_OUTPUTS))
@settings(max_examples=150, deadline=None)
def test_whatever_the_interleaving_a_stream_gets_everything_that_counts(plan, outputs):
    async def scenario() -> None:
        play = Play(outputs)
        for action, value in plan:
            await play.act(action, value)
        await play.end_all()

    asyncio.run(scenario())
