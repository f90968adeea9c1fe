"""The event log of one generation: the generation publishes events, its client streams (watchers) read them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Protocol

from safelight_server.domain.errors import QueueFullError
from safelight_server.domain.events import Accepted, Event, Finished, OutputFinished, Progress, Queued, StateEvent
from safelight_server.domain.picture import EncodedPicture
from safelight_server.domain.request import PreviewPolicy
from safelight_server.preview import FrameFeed
from safelight_server.stream.serialization import SerializedArtifact, SerializedEvent, artifact, serialize
from safelight_server.stream.turns import SendTurns
from safelight_server.stream.watcher import LossySlot, SharedStreamState, Watcher
from safelight_server.validation.violations import Violations

QUEUED = ("queued", 0)
RETRY_S = 1.0
"""RetryInfo for a client that opens one stream too many. The time at which another stream will close is unknown."""


class DurableWriter(Protocol):
    """Stores events and pictures durably, in order, and calls `show` for each once it is stored."""

    def event(self, event: StateEvent, sequence: int, data: bytes, show: Callable[[], None]) -> None:
        """Stores a state event."""

    def picture(self, output_index: int, picture: EncodedPicture, show: Callable[[], None]) -> None:
        """Stores a finished picture."""


class EventLog:
    """The events of one generation, in order. Publishing never waits for a stream.

    Args:
        generation: its resource name.
        clock: monotonic seconds.
        chunk_bytes: size of the pieces in which a picture is sent.
        max_watchers: bound on the streams that are open at once.
        tenant: the tenant of the generation.
        turns: shares sending among the streams of all generations; None: this log has its own.

    Attributes:
        journal: stores state events and pictures before any stream sees them; None: streams see them at once.
        watchers: the open streams.
        last_sequence: sequence number of the newest state event.
        begun_elsewhere: whether another replica may have sent streams more than this replica knows.
    """

    def __init__(
        self,
        generation: str,
        clock: Callable[[], float],
        *,
        chunk_bytes: int,
        max_watchers: int,
        tenant: str = "",
        turns: SendTurns | None = None,
    ) -> None:
        self.generation = generation
        self.journal: DurableWriter | None = None
        self.watchers: set[Watcher] = set()
        self.last_sequence = 0
        self.begun_elsewhere = False
        self._clock = clock
        self._shared = SharedStreamState(generation, clock, tenant, turns or SendTurns())
        self._counts = self._shared.counts
        self._chunk_bytes = chunk_bytes
        self._max_watchers = max_watchers
        self._feeds: dict[int, FrameFeed] = {}
        self._sizes: dict[int, int] = {}

    # --- publishing ---

    def publish(self, event: Event) -> None:
        """Adds an event to the lane of its kind.

        Accepted, OutputFinished and Finished are numbered and reliable; Queued and Progress are newest-wins. Finished
        closes the log. Pictures come by `artifact`, previews by `add_feed`.
        """
        match event:
            case Accepted() | OutputFinished() | Finished():
                self._append_state(event)
            case Queued():
                self._offer(QUEUED, event)
            case Progress():
                self._shared.newest.pop(QUEUED, None)
                self._offer(("progress", event.output_index), event)

    def artifact(self, output_index: int, picture: EncodedPicture) -> None:
        """Appends a finished picture of an output; streams send it in pieces."""
        self._end_output(output_index)
        item = artifact(self.generation, output_index, picture, self._chunk_bytes)
        self._sizes[output_index] = item.total_bytes
        if self.journal is None:
            self._show(item)
        else:
            self.journal.picture(output_index, picture, functools.partial(self._show, item))

    def picture(self, output_index: int) -> EncodedPicture | None:
        """The finished picture of an output; None where streams have not been shown one."""
        for item in self._shared.items:
            if isinstance(item, SerializedArtifact) and item.output_index == output_index:
                return item.picture()
        return None

    def replay(self, item: SerializedEvent) -> None:
        """Adds a state event that the replica which owns the generation has published."""
        self.last_sequence = item.sequence
        if item.ends_output is not None:
            self._end_output(item.ends_output)
        self._show(item)

    def add_feed(self, output_index: int, feed: FrameFeed) -> None:
        """Lets the streams pull previews of an output, from the execution that develops it."""
        self._feeds[output_index] = feed
        for watcher in self.watchers:
            watcher.previews.add_feed(output_index, feed)

    def remove_feed(self, output_index: int) -> None:
        """Stops the previews of an output."""
        if self._feeds.pop(output_index, None) is not None:
            for watcher in self.watchers:
                watcher.previews.remove_feed(output_index)

    # --- streams ---

    def watch(
        self, policy: PreviewPolicy, after_sequence: int = 0, artifact_offsets: Mapping[int, int] | None = None
    ) -> Watcher:
        """Opens a stream of all events, past ones first, in order.

        Args:
            after_sequence: sequence number of the last state event that the client has; 0: it has none.
            artifact_offsets: number of bytes that the client has of each picture, by output.

        Raises:
            InvalidRequestError: an offset lies beyond its picture, or the sequence number in the future.
            QueueFullError: `max_watchers` streams are open.
        """
        if len(self.watchers) >= self._max_watchers:
            limit = str(self._max_watchers)
            raise QueueFullError(
                f"{limit} streams watch {self.generation} already, which is the limit; close one of them",
                reason="TOO_MANY_WATCHERS",
                metadata={"bound": "watchers", "subject": self.generation, "limit": limit},
                retry_after_s=RETRY_S,
            )
        offsets = artifact_offsets or {}
        faults = Violations()
        newest = f"the newest sequence is {self.last_sequence}"
        # another replica may have sent Accepted, which is always the first event, and died before it was written
        last = max(self.last_sequence, 1) if self.begun_elsewhere else self.last_sequence
        faults.check(after_sequence <= last, "after_sequence", newest)
        for index, offset in offsets.items():
            size = self._sizes.get(index, 0)
            what = f"offset {offset} of output {index} is not within its {size} bytes"
            ahead = self.begun_elsewhere and index not in self._sizes
            faults.check(offset >= 0 and (ahead or offset <= size), "artifact_offsets", what)
        faults.done()
        watcher = Watcher(self._shared, policy, after_sequence, offsets, self.watchers.discard)
        self.watchers.add(watcher)
        for output_index, feed in self._feeds.items():
            watcher.previews.add_feed(output_index, feed)
        return watcher

    def update_policy(self, policy: PreviewPolicy) -> None:
        """Changes the preview policy of all open streams."""
        for watcher in self.watchers:
            watcher.previews.set_policy(policy)

    # --- figures ---

    @property
    def closed(self) -> bool:
        """Whether Finished was published."""
        return self._shared.closed

    @property
    def held_bytes(self) -> int:
        """Bytes of the state events and the finished pictures, which the log keeps."""
        return self._shared.num_bytes

    @property
    def num_previews(self) -> int:
        """Previews handed over to streams."""
        return self._counts.num_sent

    @property
    def preview_bytes(self) -> int:
        """Bytes of these previews."""
        return self._counts.num_bytes

    @property
    def num_dropped(self) -> int:
        """Previews that were due on a stream and were skipped."""
        return self._counts.num_dropped

    @property
    def first_preview_at(self) -> float | None:
        """When the first preview was handed to a stream, on the clock; None: none was yet."""
        return self._counts.first_at

    def _append_state(self, event: StateEvent) -> None:
        self.last_sequence += 1
        is_last = isinstance(event, Finished)
        ends = event.output_index if isinstance(event, OutputFinished) else None
        if ends is not None:
            self._end_output(ends)
        data = serialize(self.generation, event, self.last_sequence)
        item = SerializedEvent(self.last_sequence, data, ends, is_last)
        if self.journal is None:
            self._show(item)
        else:
            self.journal.event(event, self.last_sequence, data, functools.partial(self._show, item))

    def _show(self, item: SerializedEvent | SerializedArtifact) -> None:
        self._shared.items.append(item)
        self._shared.num_bytes += item.num_bytes
        self._shared.closed = isinstance(item, SerializedEvent) and item.is_last
        for watcher in self.watchers:
            watcher.wake()

    def _offer(self, slot: LossySlot, event: Event) -> None:
        self._shared.newest[slot] = serialize(self.generation, event)
        for watcher in self.watchers:
            watcher.offer(slot)

    def _end_output(self, output_index: int) -> None:
        self._shared.newest.pop(("progress", output_index), None)
        self.remove_feed(output_index)
