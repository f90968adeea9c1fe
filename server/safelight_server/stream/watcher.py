"""One client stream of a generation: cursors into what all streams share, and slots for the newest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field

from safelight_server.domain.request import PreviewPolicy
from safelight_server.stream.previews import PreviewCounts, Previews
from safelight_server.stream.serialization import SerializedArtifact, SerializedEvent, preview

PREVIEW = "preview"
LossySlot = tuple[str, int]
"""Kind of a newest-wins event, and its output."""


@dataclass(eq=False, slots=True)
class SharedStreamState:
    """What all streams of a generation share.

    Attributes:
        items: the reliable events, in order; only ever appended to.
        newest: the newest-wins events that still mean something.
        closed: Finished is among the items.
    """

    generation: str
    clock: Callable[[], float]
    items: list[SerializedEvent | SerializedArtifact] = field(default_factory=list)
    newest: dict[LossySlot, bytes] = field(default_factory=dict)
    counts: PreviewCounts = field(default_factory=PreviewCounts)
    closed: bool = False


class Watcher:
    """One client stream. Read `events` once, then `close`; of bounded size: a few words for each output.

    Args:
        after_sequence: the last state event that the client has.
        artifact_offsets: bytes of pictures that the client has, by output.
        leave: called by `close`.

    Attributes:
        previews: what it gets of the frames of the outputs.
    """

    def __init__(
        self,
        story: SharedStreamState,
        policy: PreviewPolicy,
        after_sequence: int,
        artifact_offsets: Mapping[int, int],
        leave: Callable[[Watcher], None],
    ) -> None:
        self._story = story
        self._after = after_sequence
        self._offsets = dict(artifact_offsets)
        self._leave = leave
        self._cursor = 0
        self._piece: int | None = None
        self._slots: dict[LossySlot, None] = dict.fromkeys(story.newest)
        self.previews = Previews(policy, story.clock, story.counts, self._preview_ready)
        self._wakeup = asyncio.Event()
        self._closed = False
        self._yielding_since: float | None = None

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The stream, as serialized responses; ends after Finished, or when closed."""
        while not self._closed:
            data = self._next()
            if data is not None:
                self._yielding_since = self._story.clock()
                yield data
                self._yielding_since = None
            elif self._story.closed:
                return
            else:
                self._wakeup.clear()
                self.previews.open()
                await self._wakeup.wait()
                self.previews.shut()

    def stalled_for(self, now: float) -> float:
        """Seconds for which the client has not taken what was handed over."""
        return 0.0 if self._yielding_since is None else now - self._yielding_since

    def close(self) -> None:
        """Leaves the generation; `events` ends at its next turn."""
        self._closed = True
        self.previews.close()
        self._wakeup.set()
        self._leave(self)

    # --- what the log says ---

    def wake(self) -> None:
        """There are new items."""
        self._wakeup.set()

    def offer(self, slot: LossySlot) -> None:
        """There is a newest-wins event; one that has not been sent keeps its place in the line."""
        self._slots[slot] = None
        self._wakeup.set()

    # --- what is sent next ---

    def _next(self) -> bytes | None:
        """What is sent next: reliable events first, then whatever has waited longest. None: nothing."""
        items = self._story.items
        while self._cursor < len(items):
            item = items[self._cursor]
            data = self._piece_of(item) if isinstance(item, SerializedArtifact) else self._state(item)
            if data is not None:
                return data
        while self._slots:
            slot = next(iter(self._slots))
            del self._slots[slot]
            data = self._preview(slot[1]) if slot[0] == PREVIEW else self._story.newest.get(slot)
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
        """The next piece of the picture at the cursor; None, and on to the next item, when there is no more."""
        offset = self._offsets.get(artifact.output_index, 0)
        if self._piece is None:
            self.previews.end(artifact.output_index)
            self._piece = offset // artifact.piece_bytes
        if offset == artifact.total_bytes or self._piece == len(artifact.pieces):
            self._cursor += 1
            self._piece = None
            return None
        self._piece += 1
        return artifact.piece(self._piece - 1, offset)

    def _preview(self, output_index: int) -> bytes | None:
        taken = self.previews.take(output_index)
        return None if taken is None else preview(self._story.generation, output_index, *taken)

    def _preview_ready(self, output_index: int) -> None:
        self.offer((PREVIEW, output_index))
