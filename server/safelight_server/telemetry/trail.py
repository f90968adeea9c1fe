"""The spans of one output in its generation's trace, and the spans of the runtime calls that outputs share.

    output ── queue · text_encode · queue · denoise ── wait · step · wait · step …
           └─ decode · encode · suspended

`queue` spans cover the time before the output's first step in which no runtime
call works for it, `wait` spans the same time after that step. One call may
serve several traces. Each of them gets a span for its own part; the first also
gets the span of the batch, which is linked to all parts.

Invariants: `end` ends every open span, once; the spans of a call end when the
call returns, also for outputs that ended in the meantime.
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
"""Stands in for `CallSpans` when a call serves no traced output."""


class TracedOutput(Protocol):
    """An output, or a preview of one, that a runtime call serves and whose trace is recorded."""

    def call(self, name: str, now_ns: int, attributes: Attributes, linked: Stage | None) -> Stage:
        """Starts the span of a call that serves it; the caller ends that span."""

    def returned(self, now_ns: int) -> None:
        """Notes that one of its calls has returned."""


class Trail:
    """Records the spans of one output, from its acceptance to its end.

    Args:
        generation: the stage of its generation, which must be recorded.
        attributes: attributes of the output's span.
    """

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
        """Ends the waiting span and starts the span of a call that serves this output."""
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
        """Notes that one of its calls has returned; without others, the output waits from now on."""
        self._num_calls -= 1
        self._wait(now_ns)

    # --- other events ---

    def suspend(self) -> None:
        """Starts the `suspended` span: the output pauses because nobody watches it."""
        self._rest("suspended", time.time_ns())

    def resume(self) -> None:
        """Ends the `suspended` span: the output goes on."""
        now_ns = time.time_ns()
        self._end_stage(now_ns)
        self._rests = False
        self._wait(now_ns)

    def developed(self) -> None:
        """Starts the `encode` span: the pixels are there and are encoded next."""
        now_ns = time.time_ns()
        if self._was_decoded and self._waits_since_ns is not None:
            now_ns, self._waits_since_ns = self._waits_since_ns, None
        self._rest("encode", now_ns)

    def end(self, attributes: Attributes, error: str = "") -> None:
        """Ends every open span. The output's own gets `attributes`, and fails if `error` is not empty."""
        now_ns = time.time_ns()
        self._tracing.num_trails -= 1
        self._rest("", now_ns)
        self._output.note(attributes)
        self._output.end(error, now_ns)

    def _rest(self, name: str, now_ns: int) -> None:
        """Ends the current stage and starts one that has no runtime calls; an empty name starts none."""
        self._rests = True
        self._end_wait(now_ns)
        self._end_stage(now_ns)
        if name:
            self._stage = self._output.begin(name, start_ns=now_ns)

    def _wait(self, now_ns: int) -> None:
        """Begins to wait, unless a call is still running or the stage has no calls."""
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
    """The span of a preview that is being decoded; a `TracedOutput` for its call."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def call(self, name: str, now_ns: int, attributes: Attributes, linked: Stage | None) -> Stage:
        """Starts the span of the call that decodes it."""
        return self._stage.begin(name, attributes, start_ns=now_ns, linked=linked)

    def returned(self, now_ns: int) -> None:
        """Does nothing: the code that renders the preview ends its span."""


class CallSpans:
    """A context manager for the spans of one runtime call, from its dispatch to the end of the block.

    Inside the block the span of the batch is the current one.

    Args:
        name: name of the span that each trace gets for its part of the call.
        served: the traced outputs that the call serves, with the attributes of their spans; at least one.
        batch: attributes of the batch's span.
    """

    def __init__(self, name: str, served: Sequence[tuple[TracedOutput, Attributes]], batch: Attributes) -> None:
        now_ns = time.time_ns()
        self._served = [output for output, _ in served]
        first, attributes = served[0]
        self._parts = [first.call(name, now_ns, attributes, None)]
        self._batch = self._parts[0].begin("batch", batch, start_ns=now_ns)
        for output, attributes in served[1:]:
            self._parts.append(output.call(name, now_ns, attributes, self._batch))
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
        for output in self._served:
            output.returned(now_ns)
