"""One client stream of a generation: a cursor into the shared reliable events, and slots of newest-wins events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field

from safelight_server.domain.request import PreviewPolicy
from safelight_server.stream.previews import PreviewCounts, Previews
from safelight_server.stream.serialization import SerializedArtifact, SerializedEvent, preview
from safelight_server.stream.turns import SendTurns

PREVIEW = "preview"
LossySlot = tuple[str, int]
"""Kind of a newest-wins event, and the index of its output."""


@dataclass(eq=False, slots=True)
class SharedStreamState:
    """What all streams of a generation share.

    Attributes:
        tenant: the tenant of the generation.
        turns: shares sending among the streams of all generations.
        items: the reliable events, in order; only ever appended to.
        num_bytes: the bytes of the items.
        newest: the newest-wins events that are not outdated.
        closed: whether Finished is among the items.
    """

    generation: str
    clock: Callable[[], float]
    tenant: str = ""
    turns: SendTurns = field(default_factory=SendTurns)
    items: list[SerializedEvent | SerializedArtifact] = field(default_factory=list)
    num_bytes: int = 0
    newest: dict[LossySlot, bytes] = field(default_factory=dict)
    counts: PreviewCounts = field(default_factory=PreviewCounts)
    closed: bool = False


class Watcher:
    """One client stream: read `events` once, then call `close`. Its size is bounded: a few words for each output.

    After `close` it has no reference to its generation: the call of a client that does not read lasts as long as its
    connection, and would otherwise keep the pictures in memory.

    Args:
        after_sequence: sequence number of the last state event that the client has.
        artifact_offsets: number of bytes that the client has of each picture, by output.
        leave: called by `close`.

    Attributes:
        previews: its previews of all outputs.
        unread_bytes: size of the message that was handed to gRPC and that the client has not read.
    """

    def __init__(
        self,
        shared: SharedStreamState,
        policy: PreviewPolicy,
        after_sequence: int,
        artifact_offsets: Mapping[int, int],
        leave: Callable[[Watcher], None],
    ) -> None:
        self._shared = shared
        self._after = after_sequence
        self._offsets = dict(artifact_offsets)
        self._leave = leave
        self._cursor = 0
        self._piece: int | None = None
        self._slots: dict[LossySlot, None] = dict.fromkeys(shared.newest)
        self.previews = Previews(policy, shared.clock, shared.counts, self._preview_ready)
        self._wakeup = asyncio.Event()
        self._closed = False
        self.unread_bytes = 0
        self._yielding_since: float | None = None

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The stream, as serialized responses; ends after Finished, or when closed."""
        while not self._closed:
            if self._slots or self._cursor < len(self._shared.items):
                await self._shared.turns.take(self._shared.tenant)  # before `_next`, so that it picks the newest
            if (data := self._next()) is not None:
                self._yielding_since = self._shared.clock()
                self.unread_bytes = len(data)
                yield data
                self._yielding_since = None
                self.unread_bytes = 0
            elif self._shared.closed:
                return
            else:
                self._wakeup.clear()
                self.previews.open()
                await self._wakeup.wait()
                self.previews.shut()

    def stalled_for(self, now: float) -> float:
        """Seconds since the last message was handed over, while the client has not read it; otherwise 0."""
        return 0.0 if self._yielding_since is None else now - self._yielding_since

    def close(self) -> None:
        """Leaves the generation. `events` ends when it is next resumed."""
        self._closed = True
        self._shared = SharedStreamState("", self._shared.clock, closed=True)
        self.previews.close()
        self._wakeup.set()
        self._leave(self)

    # --- called by the log ---

    def wake(self) -> None:
        """Called by the log when there are new items."""
        self._wakeup.set()

    def offer(self, slot: LossySlot) -> None:
        """Called by the log when there is a newest-wins event. An unsent event of the slot keeps its queue position."""
        self._slots[slot] = None
        self._wakeup.set()

    # --- choosing the next message ---

    def _next(self) -> bytes | None:
        """The next message: reliable events first, then the slot that has waited longest; None: there is none."""
        items = self._shared.items
        while self._cursor < len(items):
            item = items[self._cursor]
            data = self._piece_of(item) if isinstance(item, SerializedArtifact) else self._state(item)
            if data is not None:
                return data
        while self._slots:
            slot = next(iter(self._slots))
            del self._slots[slot]
            data = self._preview(slot[1]) if slot[0] == PREVIEW else self._shared.newest.get(slot)
            if data is not None:
                return data
        return None

    def _state(self, state: SerializedEvent) -> bytes | None:
        self._cursor += 1
        if state.ends_output is not None:
            self.previews.end(state.ends_output)
        if state.is_last:
            self._slots.clear()
        return state.data if state.sequence > self._after else None

    def _piece_of(self, artifact: SerializedArtifact) -> bytes | None:
        """The next piece of the picture at the cursor. None after the last piece; the cursor then moves on."""
        offset = self._offsets.get(artifact.output_index, 0)
        if self._piece is None:
            self.previews.end(artifact.output_index)
            self._piece = offset // artifact.piece_bytes
        if offset >= artifact.total_bytes or self._piece == len(artifact.pieces):
            self._cursor += 1
            self._piece = None
            return None
        self._piece += 1
        return artifact.piece(self._piece - 1, offset)

    def _preview(self, output_index: int) -> bytes | None:
        taken = self.previews.take(output_index)
        return None if taken is None else preview(self._shared.generation, output_index, *taken)

    def _preview_ready(self, output_index: int) -> None:
        self.offer((PREVIEW, output_index))
