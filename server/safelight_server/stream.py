"""What each client stream of a generation is sent: a reliable lane and newest-wins slots.

`EventLog` keeps a generation's reliable events, serialized once and shared by
all its streams, and its newest frames. `Watcher` is one stream: cursors into
the log, one slot each for Queued and per output for Progress and Preview.

Invariants: reliable events reach every watcher complete and in order; a slow
watcher costs one slot per output and slows nobody; a preview is made only for
a watcher that is waiting for something to send, and never sent after its
output's picture; what a watcher holds is bounded by the number of outputs.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp
from safelight.v1 import generation_pb2 as pb
from safelight_server.errors import FieldViolation, InvalidRequestError, QueueFullError
from safelight_server.picture import Encoded
from safelight_server.preview import Budget, Cadence, Frame, Rendered, Renderer
from safelight_server.request import PreviewMethod, PreviewPolicy

PREVIEW_METHODS = {
    PreviewMethod.LINEAR: pb.PREVIEW_METHOD_LINEAR,
    PreviewMethod.TINY_DECODER: pb.PREVIEW_METHOD_TINY_DECODER,
    PreviewMethod.FULL_DECODER: pb.PREVIEW_METHOD_FULL_DECODER,
}


@dataclass(frozen=True, slots=True)
class _State:
    sequence: int
    data: bytes


@dataclass(frozen=True, slots=True)
class _Artifact:
    output_index: int
    picture: Encoded
    sha256: bytes
    chunks: list[bytes]


class EventLog:
    """The events of one generation.

    Args:
        generation: its resource name.
        clock: monotonic seconds.
    """

    def __init__(
        self, generation: str, renderer: Renderer, clock: Callable[[], float], *, chunk_bytes: int, max_watchers: int
    ) -> None:
        self.generation = generation
        self.renderer = renderer
        self.clock = clock
        self.items: list[_State | _Artifact] = []
        self.closed = False
        self.last_sequence = 0
        self.num_previews = 0
        self.preview_bytes = 0
        self.num_dropped = 0
        self.first_preview_at: float | None = None
        self.artifact_bytes = 0
        self.watchers: set[Watcher] = set()
        self._chunk_bytes = chunk_bytes
        self._max_watchers = max_watchers
        self._newest: dict[object, bytes] = {}
        self._sizes: dict[int, int] = {}

    # --- what happens ---

    def state(self, event: pb.GenerationEvent, *, last: bool = False) -> None:
        """Appends a reliable state event; after the `last` the log is closed."""
        self.last_sequence += 1
        event.sequence = self.last_sequence
        self.closed = self.closed or last
        self._append(_State(self.last_sequence, self.serialize(event)))

    def artifact(self, output_index: int, picture: Encoded) -> None:
        """Appends a finished picture; its chunks are serialized once, for all."""
        item = _Artifact(output_index, picture, hashlib.sha256(picture.data).digest(), [])
        for offset in range(0, len(picture.data), self._chunk_bytes):
            item.chunks.append(self.chunk(item, offset, offset + self._chunk_bytes))
        self._sizes[output_index] = len(picture.data)
        self.artifact_bytes += len(picture.data)
        self._newest.pop(("progress", output_index), None)
        self._append(item)

    def newest(self, slot: object, event: pb.GenerationEvent) -> None:
        """Offers a newest-wins event."""
        data = self._newest[slot] = self.serialize(event)
        for watcher in self.watchers:
            watcher.offer(slot, data)

    def wants_frame(self, output_index: int, step: int) -> bool:
        """Whether a frame of this step would be of use to any stream."""
        now = self.clock()
        return any([watcher.wants(output_index, step, now) for watcher in self.watchers])

    def frame(self, frame: Frame) -> None:
        """A frame that was wanted."""
        for watcher in self.watchers:
            watcher.frame(frame)

    # --- who watches ---

    def watch(
        self, policy: PreviewPolicy, after_sequence: int = 0, artifact_offsets: Mapping[int, int] | None = None
    ) -> Watcher:
        """Opens a stream.

        Raises:
            InvalidRequestError: an offset lies beyond its picture, or a sequence in the future.
            QueueFullError: too many streams.
        """
        if len(self.watchers) >= self._max_watchers:
            raise QueueFullError("too many streams watch this generation", reason="TOO_MANY_WATCHERS")
        offsets = dict(artifact_offsets or {})
        faults = [
            FieldViolation("artifact_offsets", f"offset {offset} of output {index} is beyond what there is")
            for index, offset in offsets.items()
            if offset < 0 or offset > self._sizes.get(index, 0)
        ]
        if after_sequence > self.last_sequence:
            faults.append(FieldViolation("after_sequence", f"the newest sequence is {self.last_sequence}"))
        if faults:
            raise InvalidRequestError(faults)
        watcher = Watcher(self, policy, after_sequence, offsets)
        for slot, data in self._newest.items():
            watcher.offer(slot, data)
        self.watchers.add(watcher)
        return watcher

    def update_policy(self, policy: PreviewPolicy) -> None:
        """Changes the previews of all streams."""
        for watcher in self.watchers:
            watcher.set_policy(policy)

    # --- how it is written ---

    def serialize(self, event: pb.GenerationEvent) -> bytes:
        """The bytes of a GenerateResponse, which are those of a WatchGenerationResponse."""
        event.generation = self.generation
        event.event_time.CopyFrom(_now())
        return pb.GenerateResponse(event=event).SerializeToString()

    def chunk(self, item: _Artifact, start: int, stop: int) -> bytes:
        """One piece of a picture."""
        picture = item.picture
        chunk = pb.ArtifactChunk(
            output_index=item.output_index,
            media_type=picture.media_type.value,
            width_px=picture.width_px,
            height_px=picture.height_px,
            stride_bytes=picture.stride_bytes,
            offset=start,
            total_bytes=len(picture.data),
            data=picture.data[start:stop],
        )
        if stop >= len(picture.data):
            chunk.sha256 = item.sha256
        return self.serialize(pb.GenerationEvent(artifact_chunk=chunk))

    def chunks_from(self, item: _Artifact, offset: int) -> list[bytes]:
        """The pieces of a picture from `offset` on; whole ones are shared."""
        first, within = divmod(offset, self._chunk_bytes)
        if not within:
            return item.chunks[first:]
        rest = self.chunk(item, offset, (first + 1) * self._chunk_bytes)
        return [rest, *item.chunks[first + 1 :]]

    def _append(self, item: _State | _Artifact) -> None:
        self.items.append(item)
        for watcher in self.watchers:
            watcher.wake()


class Watcher:
    """One client stream. Use `events` once, then `close`."""

    def __init__(
        self, log: EventLog, policy: PreviewPolicy, after_sequence: int, artifact_offsets: dict[int, int]
    ) -> None:
        self._log = log
        self._after = after_sequence
        self._offsets = artifact_offsets
        self._cursor = 0
        self._chunks: list[bytes] = []
        self._next_chunk = 0
        self._slots: OrderedDict[object, bytes] = OrderedDict()
        self._pending: OrderedDict[int, Frame] = OrderedDict()
        self._rendering: dict[int, asyncio.Task[None]] = {}
        self._dropped: dict[int, int] = {}
        self._sent_step: dict[int, int] = {}
        self._finished_outputs: set[int] = set()
        self._wakeup = asyncio.Event()
        self._idle = False
        self._closed = False
        self._yielding_since: float | None = None
        self.set_policy(policy)

    def set_policy(self, policy: PreviewPolicy) -> None:
        """Takes a new preview policy from the next frame on."""
        self._policy = policy
        self._cadences: dict[int, Cadence] = {}
        self._budget = Budget(policy.max_bytes_per_second, self._log.clock())

    def stalled_for(self, now: float) -> float:
        """Seconds for which the client has not taken what was handed over."""
        return 0.0 if self._yielding_since is None else now - self._yielding_since

    async def events(self) -> AsyncIterator[bytes]:
        """The stream, as serialized responses; ends after Finished."""
        while not self._closed:
            data = self._next()
            if data is not None:
                self._yielding_since = self._log.clock()
                yield data
                self._yielding_since = None
            elif self._log.closed and self._cursor == len(self._log.items):
                return
            else:
                self._wakeup.clear()
                self._idle = True
                self._start_renders()
                await self._wakeup.wait()
                self._idle = False

    def close(self) -> None:
        """Leaves the generation; nothing is made for it any more."""
        self._closed = True
        self._log.watchers.discard(self)
        for task in self._rendering.values():
            task.cancel()

    def wake(self) -> None:
        """There is something new."""
        self._wakeup.set()

    def offer(self, slot: object, data: bytes) -> None:
        """Puts a newest-wins event in its slot."""
        self._slots[slot] = data
        self.wake()

    # --- previews ---

    def wants(self, output_index: int, step: int, now: float) -> bool:
        """Whether a preview of this step is due here."""
        if self._policy.method is PreviewMethod.NONE or output_index in self._finished_outputs:
            return False
        return self._cadence(output_index).due(step, now)

    def frame(self, frame: Frame) -> None:
        """Takes a new frame, if it is due, in place of an older one that was not made yet."""
        index = frame.output_index
        if not self.wants(index, frame.step, self._log.clock()):
            return
        if index in self._pending:
            self._drop(index)
        self._pending[index] = frame
        if self._idle:
            self._start_renders()

    def _cadence(self, output_index: int) -> Cadence:
        return self._cadences.setdefault(output_index, Cadence(self._policy))

    def _drop(self, output_index: int) -> None:
        self._dropped[output_index] = self._dropped.get(output_index, 0) + 1
        self._log.num_dropped += 1

    def _start_renders(self) -> None:
        now = self._log.clock()
        for index in list(self._pending):
            if index not in self._rendering and self._budget.allows(now):
                frame = self._pending.pop(index)
                self._cadence(index).taken(now)
                self._rendering[index] = asyncio.create_task(self._render(frame))

    async def _render(self, frame: Frame) -> None:
        index, policy = frame.output_index, self._policy
        rendered = await self._log.renderer.render(frame, policy.method, policy.encoding, policy.max_edge_px)
        del self._rendering[index]
        if rendered is None or index in self._finished_outputs or frame.step <= self._sent_step.get(index, 0):
            self._drop(index)
        else:
            self._sent_step[index] = frame.step
            self._budget.spend(len(rendered.picture.data))
            self.offer(("preview", index), self._preview(rendered))
        if self._idle:
            self._start_renders()

    def _preview(self, rendered: Rendered) -> bytes:
        picture = rendered.picture
        self._log.num_previews += 1
        self._log.preview_bytes += len(picture.data)
        if self._log.first_preview_at is None:
            self._log.first_preview_at = self._log.clock()
        preview = pb.Preview(
            output_index=rendered.output_index,
            step=rendered.step,
            media_type=picture.media_type.value,
            width_px=picture.width_px,
            height_px=picture.height_px,
            stride_bytes=picture.stride_bytes,
            method=PREVIEW_METHODS[rendered.method],
            num_dropped=self._dropped.pop(rendered.output_index, 0),
            data=picture.data,
        )
        return self._log.serialize(pb.GenerationEvent(preview=preview))

    # --- what is sent next ---

    def _next(self) -> bytes | None:
        while self._next_chunk == len(self._chunks) and self._cursor < len(self._log.items):
            item = self._log.items[self._cursor]
            self._cursor += 1
            if isinstance(item, _State):
                if item.sequence > self._after:
                    return item.data
            else:
                self._finish_output(item.output_index)
                self._chunks = self._log.chunks_from(item, self._offsets.get(item.output_index, 0))
                self._next_chunk = 0
        if self._next_chunk < len(self._chunks):
            self._next_chunk += 1
            return self._chunks[self._next_chunk - 1]
        if self._slots:
            return self._slots.popitem(last=False)[1]
        return None

    def _finish_output(self, output_index: int) -> None:
        self._finished_outputs.add(output_index)
        for slot in (("preview", output_index), ("progress", output_index)):
            self._slots.pop(slot, None)
        if self._pending.pop(output_index, None) is not None:
            self._drop(output_index)


def _now() -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(datetime.now(UTC))
    return stamp
