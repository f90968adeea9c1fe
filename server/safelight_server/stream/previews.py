"""The previews of one stream: which are due, being made, or ready to be sent.

A stream pulls its previews. While it is open, which means that it has nothing else to
send and that its client reads, it renders the newest frame of each output of which a
frame is due. Of each output at most one preview is being made or ready; a preview that
was made is sent, unless its output ends first. So a stream whose client does not read
costs no rendering, and pulls the newest frame when its client reads again.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from safelight_server.domain.request import PreviewMethod, PreviewPolicy
from safelight_server.preview import Budget, Cadence, FrameFeed, RenderedPreview
from safelight_server.telemetry import Stage, tracing


@dataclass(slots=True)
class PreviewCounts:
    """Counts over all streams of a generation: previews sent, their bytes, previews dropped, time of the first."""

    num_sent: int = 0
    num_bytes: int = 0
    num_dropped: int = 0
    first_at: float | None = None


@dataclass(eq=False, slots=True)
class _PreviewSlot:
    """A preview that is being made, or is ready (`rendered`) and not sent yet."""

    budget: Budget
    num_dropped: int
    rendered: RenderedPreview | None = None


class Previews:
    """The previews of one stream, over all outputs of its generation.

    Args:
        clock: monotonic seconds.
        counts: counters of the generation, which all its streams share.
        ready: called with the index of an output when its preview is ready.
    """

    def __init__(
        self,
        policy: PreviewPolicy,
        clock: Callable[[], float],
        counts: PreviewCounts,
        ready: Callable[[int], None],
    ) -> None:
        self._clock = clock
        self._counts = counts
        self._ready = ready
        self._stage = tracing.current()
        self._open = False
        self._feeds: dict[int, FrameFeed] = {}
        self._waiting: dict[int, None] = {}  # outputs of which a frame is due, in the order of their turns
        self._making: dict[int, _PreviewSlot] = {}
        self._dropped: dict[int, int] = {}
        self._ended: set[int] = set()
        self.set_policy(policy)

    def set_policy(self, policy: PreviewPolicy) -> None:
        """Replaces the policy; previews that are being made keep the old one."""
        self._policy = policy
        self._cadences: dict[int, Cadence] = {}
        self._budget = Budget(policy.max_bytes_per_second, self._clock())
        if policy.method is PreviewMethod.NONE:
            for output_index in list(self._waiting):
                self._drop_waiting(output_index)
        for output_index in self._feeds:
            self._subscribe(output_index)

    # --- frames ---

    def add_feed(self, output_index: int, feed: FrameFeed) -> None:
        """Pulls frames of an output from now on, the newest existing one at once, so that a new stream shows it."""
        self._feeds[output_index] = feed
        self._subscribe(output_index)
        if feed.newest is not None and self._policy.method is not PreviewMethod.NONE:
            self._enqueue(output_index)

    def remove_feed(self, output_index: int) -> None:
        """Stops pulling frames of an output."""
        if (feed := self._feeds.pop(output_index, None)) is not None:
            feed.unsubscribe((self, output_index))

    def _subscribe(self, output_index: int) -> None:
        feed = self._feeds[output_index]
        if self._policy.method is PreviewMethod.NONE:
            feed.unsubscribe((self, output_index))
            return
        due = self._cadence(output_index).next_due(feed.newest.step if feed.newest is not None else 0)
        feed.subscribe((self, output_index), due, functools.partial(self._offer, output_index))

    def _offer(self, output_index: int, step: int) -> float:
        """Handles a new frame, and returns the next step that is due."""
        if output_index in self._ended:
            return math.inf
        cadence = self._cadence(output_index)
        if cadence.due(step, self._clock(), busy=output_index in self._making):
            self._enqueue(output_index)
        return cadence.next_due(step)

    def _enqueue(self, output_index: int) -> None:
        if output_index in self._waiting:
            self._drop(output_index)  # the older frame; the output keeps its position in the queue
        self._waiting[output_index] = None
        if self._open:
            self._start()

    # --- making previews ---

    def open(self) -> None:
        """Begins to pull: the stream has nothing to send."""
        self._open = True
        self._start()

    def shut(self) -> None:
        """Stops pulling: the stream has something to send, or its client does not read."""
        self._open = False

    def _start(self) -> None:
        """Begins the previews that the budget allows. An output that had its turn goes to the end of the queue."""
        for output_index in [index for index in self._waiting if index not in self._making]:
            feed = self._feeds.get(output_index)
            if feed is None or (frame := feed.newest) is None:
                self._drop_waiting(output_index)
                continue
            if not self._budget.hold(self._clock()):
                return
            del self._waiting[output_index]
            policy = self._policy
            making = self._making[output_index] = _PreviewSlot(self._budget, self._dropped.pop(output_index, 0))
            stage = self._stage.begin("preview", {"safelight.output": output_index, "safelight.step": frame.step})
            with stage.as_current():
                task = feed.render(frame, policy.method, policy.encoding, policy.max_edge_px)
            task.add_done_callback(functools.partial(self._made, output_index, making, stage))

    def _made(
        self, output_index: int, making: _PreviewSlot, stage: Stage, task: asyncio.Task[RenderedPreview | None]
    ) -> None:
        stage.end()
        if self._making.get(output_index) is not making:
            making.budget.settle(0)  # the output ended meanwhile
            return
        if task.cancelled() or task.exception() is not None or task.result() is None:
            making.budget.settle(0)
            del self._making[output_index]
            self._drop(output_index, again=making.num_dropped)
            if self._open:
                self._start()
            return
        making.rendered = task.result()
        self._ready(output_index)

    # --- sending previews ---

    def take(self, output_index: int) -> tuple[RenderedPreview, int] | None:
        """Takes the ready preview, with the number of due frames dropped since the last one; None: none is ready."""
        making = self._making.get(output_index)
        if making is None or making.rendered is None:
            return None
        del self._making[output_index]
        now, num_bytes = self._clock(), len(making.rendered.picture.data)
        making.budget.settle(num_bytes)
        self._cadence(output_index).sent(now)
        self._counts.num_sent += 1
        self._counts.num_bytes += num_bytes
        if self._counts.first_at is None:
            self._counts.first_at = now
        return making.rendered, making.num_dropped

    def end(self, output_index: int) -> None:
        """Stops the previews of an output whose picture begins to be sent, or which has ended."""
        self._ended.add(output_index)
        self._drop_waiting(output_index)
        making = self._making.pop(output_index, None)
        if making is not None:
            self._counts.num_dropped += 1
            if making.rendered is not None:
                making.budget.settle(0)

    def close(self) -> None:
        """Drops all feeds and previews, since the stream has ended."""
        for output_index in list(self._feeds):
            self.remove_feed(output_index)
        self._waiting.clear()
        self._making.clear()
        self._ready = _ignore  # the callback refers to the stream: a reference cycle would delay freeing both

    def _cadence(self, output_index: int) -> Cadence:
        if (cadence := self._cadences.get(output_index)) is None:
            cadence = self._cadences[output_index] = Cadence(self._policy)
        return cadence

    def _drop_waiting(self, output_index: int) -> None:
        if output_index in self._waiting:
            del self._waiting[output_index]
            self._drop(output_index)

    def _drop(self, output_index: int, again: int = 0) -> None:
        self._dropped[output_index] = self._dropped.get(output_index, 0) + 1 + again
        self._counts.num_dropped += 1


def _ignore(_output_index: int) -> None:
    """Replaces the callback of a stream that has ended."""
