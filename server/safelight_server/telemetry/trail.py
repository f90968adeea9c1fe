"""What becomes of one output, in the trace of its generation, and the spans of the calls that it shares.

    output ── queue · text_encode · queue · denoise ── wait · step · wait · step …
           └─ decode · encode · suspended

`queue` is the time until its first step in which no call works for it, `wait`
the same after that. A call serves several traces: each has a span for its own
part, and the first one also the span of the batch, linked with all the others.

Invariants: `end` ends whatever is open, once; the spans of a call end when it
returns, also those of outputs that have ended meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Protocol

from safelight_server.telemetry.tracing import Stage

Attributes = Mapping[str, str | int | float]
NO_CALL: AbstractContextManager[object] = nullcontext()
"""In place of `CallSpans` where nobody is traced."""


class TracedOutput(Protocol):
    """Whom a call serves, in one trace."""

    def call(self, name: str, now_ns: int, attributes: Attributes, linked: Stage | None) -> Stage:
        """A call that works for it begins."""

    def returned(self, now_ns: int) -> None:
        """One of its calls is over."""


class Trail:
    """See the module. Made when the output is accepted; `generation` is recorded."""

    def __init__(self, generation: Stage, attributes: Attributes) -> None:
        self._tracing = generation.tracing
        self._tracing.num_trails += 1
        self._output = generation.begin("output", attributes)
        self._stage: Stage | None = None
        self._waits_since_ns: int | None = time.time_ns()
        self._waits_as = "queue"
        self._num_calls = 0
        self._was_decoded = False
        self._rests = False

    # --- calls ---

    def call(self, name: str, now_ns: int, attributes: Attributes, linked: Stage | None) -> Stage:
        """A call that works for it begins."""
        self._end_wait(now_ns)
        if name == "decode":
            self._end_stage(now_ns)
        elif name == "step" and self._stage is None:
            self._stage = self._output.begin("denoise", start_ns=now_ns)
            self._waits_as = "wait"
        self._was_decoded = name == "decode"
        self._num_calls += 1
        return (self._stage or self._output).begin(name, attributes, start_ns=now_ns, linked=linked)

    def returned(self, now_ns: int) -> None:
        """One of its calls is over."""
        self._num_calls -= 1
        self._wait(now_ns)

    # --- what else happens ---

    def suspend(self) -> None:
        """Nobody wants it for a while."""
        self._rest("suspended", time.time_ns())

    def resume(self) -> None:
        """It is wanted again."""
        now_ns = time.time_ns()
        self._end_stage(now_ns)
        self._rests = False
        self._wait(now_ns)

    def developed(self) -> None:
        """The decoder's result, or another's pixels, are there; they are made into a picture and encoded."""
        now_ns = time.time_ns()
        if self._was_decoded and self._waits_since_ns is not None:
            now_ns, self._waits_since_ns = self._waits_since_ns, None
        self._rest("encode", now_ns)

    def end(self, attributes: Attributes, error: str = "") -> None:
        """It has ended."""
        now_ns = time.time_ns()
        self._tracing.num_trails -= 1
        self._rest("", now_ns)
        self._output.note(attributes)
        self._output.end(error, now_ns)

    def _rest(self, name: str, now_ns: int) -> None:
        """Goes on to a stage without calls; empty: to the end."""
        self._rests = True
        self._end_wait(now_ns)
        self._end_stage(now_ns)
        if name:
            self._stage = self._output.begin(name, start_ns=now_ns)

    def _wait(self, now_ns: int) -> None:
        if not self._num_calls and not self._rests:
            self._waits_since_ns = now_ns

    def _end_wait(self, now_ns: int) -> None:
        if self._waits_since_ns is not None:
            within = self._stage or self._output
            within.begin(self._waits_as, start_ns=self._waits_since_ns).end(at_ns=now_ns)
            self._waits_since_ns = None

    def _end_stage(self, now_ns: int) -> None:
        if self._stage is not None:
            self._stage.end(at_ns=now_ns)
            self._stage = None


class PreviewSpan:
    """A preview that is being made, as calls see it."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def call(self, name: str, now_ns: int, attributes: Attributes, linked: Stage | None) -> Stage:
        """Its decoding begins."""
        return self._stage.begin(name, attributes, start_ns=now_ns, linked=linked)

    def returned(self, now_ns: int) -> None:
        """Its decoding is over."""


class CallSpans:
    """The spans of one call of the runtime, from its dispatch until the block is left, which makes the batch current.

    Args:
        name: of the part that each trace has.
        served: those whom the call serves and is to be recorded for, at least one.
        batch: attributes of the batch's own span.
    """

    def __init__(self, name: str, served: Sequence[tuple[TracedOutput, Attributes]], batch: Attributes) -> None:
        now_ns = time.time_ns()
        self._served = [one for one, _ in served]
        first, attributes = served[0]
        self._parts = [first.call(name, now_ns, attributes, None)]
        self._batch = self._parts[0].begin("batch", batch, start_ns=now_ns)
        for one, attributes in served[1:]:
            self._parts.append(one.call(name, now_ns, attributes, self._batch))
            self._batch.link(self._parts[-1])
        self._current: AbstractContextManager[None] = self._batch.as_current()

    def __enter__(self) -> None:
        self._current.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._current.__exit__(kind, error, traceback)
        now_ns = time.time_ns()
        reason = "" if error is None else str(error) or type(error).__name__
        for stage in (self._batch, *self._parts):
            stage.end(reason, now_ns)
        for one in self._served:
            one.returned(now_ns)
