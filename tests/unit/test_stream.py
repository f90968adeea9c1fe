"""Reliable events complete and in order, previews newest first, whatever the interleaving."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safelight.v1 import generation_pb2 as pb
from safelight_server.errors import InvalidRequestError, QueueFullError
from safelight_server.picture import Encoded
from safelight_server.preview import Frame, Renderer
from safelight_server.request import MediaType, PixelEncoding, PreviewMethod, PreviewPolicy
from safelight_server.runtime.simulated import LATENT, simulated_pipeline
from safelight_server.stream import EventLog

LINEAR = PreviewPolicy(encoding=PixelEncoding(MediaType.RAW_RGBA8), method=PreviewMethod.LINEAR)
PICTURE = Encoded(MediaType.RAW_RGBA8, 16, 16, 64, bytes(range(256)) * 16)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_log(pool, max_watchers=8) -> EventLog:
    async def decode(output_id, latent, component):
        raise AssertionError("linear previews need no decoder")

    renderer = Renderer(simulated_pipeline(), decode, lambda: 0.0, pool)
    return EventLog("generations/x", renderer, Clock(), chunk_bytes=1000, max_watchers=max_watchers)


@pytest.fixture
def log():
    with ThreadPoolExecutor(1) as pool:
        yield make_log(pool)


def publish(log: EventLog, step: int, output: int = 0) -> None:
    progress = pb.Progress(output_index=output, step=step)
    log.publish(pb.GenerationEvent(progress=progress))
    if log.wants_frame(output, step):
        log.frame(Frame(1, output, step, np.zeros(LATENT, np.float32)))


def finish(log: EventLog, output: int = 0, last: bool = True) -> None:
    log.artifact(output, PICTURE)
    log.publish(pb.GenerationEvent(output_finished=pb.OutputFinished(output_index=output)))
    if last:
        log.publish(pb.GenerationEvent(finished=pb.Finished()))


async def read(watcher, into: list) -> None:
    async for data in watcher.events():
        into.append(pb.WatchGenerationResponse.FromString(data).event)


@given(plan=st.lists(st.sampled_from(["step", "read", "yield"]), max_size=40), outputs=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_whatever_the_interleaving_a_watcher_gets_everything_that_counts(plan, outputs):
    async def scenario() -> None:
        with ThreadPoolExecutor(1) as pool:
            log = make_log(pool)
            log.publish(pb.GenerationEvent(accepted=pb.Accepted()))
            watcher = log.watch(LINEAR)
            events, stream, step = [], watcher.events(), 0
            pending = None
            for action in plan:
                if action == "step":
                    step += 1
                    for output in range(outputs):
                        publish(log, step, output)
                elif action == "read":
                    pending = pending or asyncio.ensure_future(anext(stream))
                    await asyncio.wait([pending], timeout=0.002)
                    if pending.done():
                        events.append(pb.GenerateResponse.FromString(pending.result()).event)
                        pending = None
                else:
                    await asyncio.sleep(0)
                assert len(watcher._slots) <= 2 * outputs + 1
                assert len(watcher._previews._waiting) <= outputs
            for output in range(outputs):
                finish(log, output, last=output == outputs - 1)
            if pending is not None:
                events.append(pb.GenerateResponse.FromString(await pending).event)
            async for data in stream:
                events.append(pb.GenerateResponse.FromString(data).event)
            watcher.close()
            check(events, outputs)

    asyncio.run(scenario())


def check(events, outputs) -> None:
    states = [event.sequence for event in events if event.sequence]
    assert states == list(range(1, outputs + 3))
    for output in range(outputs):
        chunks = [
            e.artifact_chunk for e in events if e.HasField("artifact_chunk") and e.artifact_chunk.output_index == output
        ]
        assert b"".join(chunk.data for chunk in chunks) == PICTURE.data
        mine = [e for e in events if e.WhichOneof("event") in ("preview", "artifact_chunk")]
        mine = [e for e in mine if getattr(e, e.WhichOneof("event")).output_index == output]
        names = [e.WhichOneof("event") for e in mine]
        assert names == sorted(names, reverse=True), "a preview after its picture"
        steps = [e.preview.step for e in mine if e.HasField("preview")]
        assert steps == sorted(set(steps))


async def test_nothing_is_rendered_while_nobody_takes(log):
    log.publish(pb.GenerationEvent(accepted=pb.Accepted()))
    watcher = log.watch(LINEAR)
    stream = watcher.events()
    await anext(stream)  # now the stream hangs in its yield, as under flow control
    for step in range(1, 30):
        publish(log, step)
        await asyncio.sleep(0.001)
    assert log.renderer.num_rendered == 0
    kinds = [pb.GenerateResponse.FromString(await anext(stream)).event for _ in range(2)]
    assert log.renderer.num_rendered == 1
    [preview] = [event.preview for event in kinds if event.HasField("preview")]
    assert (preview.step, preview.num_dropped) == (29, 28)
    await stream.aclose()
    watcher.close()


async def test_a_late_watcher_gets_the_whole_story(log):
    log.publish(pb.GenerationEvent(accepted=pb.Accepted()))
    publish(log, 4)
    finish(log)
    events: list = []
    await read(log.watch(LINEAR), events)
    names = [event.WhichOneof("event") for event in events]
    assert names == ["accepted"] + ["artifact_chunk"] * 5 + ["output_finished", "finished"]
    resumed: list = []
    await read(log.watch(LINEAR, 1, {0: 1500}), resumed)
    chunks = [event.artifact_chunk for event in resumed if event.HasField("artifact_chunk")]
    assert chunks[0].offset == 1500
    assert b"".join(chunk.data for chunk in chunks) == PICTURE.data[1500:]
    assert [event.sequence for event in resumed if event.sequence] == [2, 3]


async def test_what_cannot_be_resumed_names_the_field(log):
    log.publish(pb.GenerationEvent(accepted=pb.Accepted()))
    for after, offsets, field in ((9, {}, "after_sequence"), (0, {0: 5}, "artifact_offsets")):
        with pytest.raises(InvalidRequestError) as caught:
            log.watch(LINEAR, after, offsets)
        assert [violation.field for violation in caught.value.violations] == [field]


async def test_watchers_are_bounded():
    with ThreadPoolExecutor(1) as pool:
        log = make_log(pool, max_watchers=2)
        first = log.watch(LINEAR)
        log.watch(LINEAR)
        with pytest.raises(QueueFullError):
            log.watch(LINEAR)
        first.close()
        log.watch(LINEAR)


async def test_one_that_is_not_read_is_seen_to_stall(log):
    log.publish(pb.GenerationEvent(accepted=pb.Accepted()))
    watcher = log.watch(LINEAR)
    stream = watcher.events()
    await anext(stream)
    log._clock.now = 12.0
    assert watcher.stalled_for(log._clock.now) == 12.0
    watcher.close()
    assert [data async for data in stream] == []
