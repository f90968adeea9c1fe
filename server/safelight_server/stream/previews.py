"""The previews of one stream: what is due, what is being made, what is ready to be sent.

Of each output at most one frame waits (the newest) and at most one preview is
being made or ready. Making begins only while the stream is open, that is, has
nothing else to send and is not held up by its client; what was made is sent,
unless its output ends first. So a stream that is held up costs no rendering,
and when it comes free the newest frame is rendered.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass

from safelight_server.domain.request import PreviewMethod, PreviewPolicy
from safelight_server.preview import Budget, Cadence, Frame, RenderedPreview
from safelight_server.telemetry import Stage, tracing


@dataclass(slots=True)
class PreviewCounts:
    """Previews of all streams of a generation: handed over (with their bytes), passed over, and when the first was."""

    num_sent: int = 0
    num_bytes: int = 0
    num_dropped: int = 0
    first_at: float | None = None


@dataclass(eq=False, slots=True)
class _PreviewSlot:
    """A preview from its beginning until it is taken; `rendered` once it is ready."""

    budget: Budget
    num_dropped: int
    rendered: RenderedPreview | None = None


class Previews:
    """See the module.

    Args:
        clock: monotonic seconds.
        counts: of the generation.
        ready: called with the output whose preview can be taken.
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
        self._closed = False
        self._waiting: dict[int, Frame] = {}
        self._making: dict[int, _PreviewSlot] = {}
        self._dropped: dict[int, int] = {}
        self._ended: set[int] = set()
        self.set_policy(policy)

    def set_policy(self, policy: PreviewPolicy) -> None:
        """Takes a new policy, for all that is not being made yet."""
        self._policy = policy
        self._cadences: dict[int, Cadence] = {}
        self._budget = Budget(policy.max_bytes_per_second, self._clock())
        if policy.method is PreviewMethod.NONE:
            for output_index in list(self._waiting):
                self._drop_waiting(output_index)

    # --- what comes ---

    def wants(self, output_index: int, step: int, now: float) -> bool:
        """Whether a frame of this step is due."""
        if self._policy.method is PreviewMethod.NONE or self._closed or output_index in self._ended:
            return False
        return self._cadence(output_index).due(step, now, busy=output_index in self._making)

    def frame(self, output_index: int, frame: Frame) -> None:
        """Takes a frame if it is due, in place of an older one that nothing was made of."""
        if self.wants(output_index, frame.step, self._clock()):
            self._take_up(output_index, frame)

    def join(self, output_index: int, frame: Frame) -> None:
        """Takes the newest frame there is, due or not: a stream that comes later sees something at once."""
        if self._policy.method is not PreviewMethod.NONE:
            self._take_up(output_index, frame)

    def _take_up(self, output_index: int, frame: Frame) -> None:
        if output_index in self._waiting:
            self._drop(output_index)
        self._waiting[output_index] = frame  # in the place in the line that the older one had
        if self._open:
            self._start()

    # --- what is made ---

    def open(self) -> None:
        """The stream waits for something to send."""
        self._open = True
        self._start()

    def shut(self) -> None:
        """The stream has something to send, or is held up by its client."""
        self._open = False

    def _start(self) -> None:
        """Begins what can begin. An output that has had its turn goes to the end of the line."""
        for output_index in [index for index in self._waiting if index not in self._making]:
            if not self._budget.hold(self._clock()):
                return
            frame, policy = self._waiting.pop(output_index), self._policy
            making = self._making[output_index] = _PreviewSlot(self._budget, self._dropped.pop(output_index, 0))
            stage = self._stage.begin("preview", {"safelight.output": output_index, "safelight.step": frame.step})
            with stage.as_current():
                task = frame.preview(policy.method, policy.encoding, policy.max_edge_px)
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

    # --- what goes ---

    def take(self, output_index: int) -> tuple[RenderedPreview, int] | None:
        """The preview that is ready, and how many were passed over between the one before and it."""
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
        """The output's picture begins, or the output has ended: no more previews of it."""
        self._ended.add(output_index)
        self._drop_waiting(output_index)
        making = self._making.pop(output_index, None)
        if making is not None:
            self._counts.num_dropped += 1
            if making.rendered is not None:
                making.budget.settle(0)

    def close(self) -> None:
        """The stream is over; nothing is begun any more."""
        self._closed = True
        self._waiting.clear()
        self._making.clear()
        self._ready = _nobody  # else it and its stream would keep each other

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


def _nobody(_output_index: int) -> None:
    """In place of a stream that is over."""
