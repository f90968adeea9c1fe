"""Decides which traces are recorded: those with the caller's sampled flag, up to a rate, and a share of all others."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace.sampling import Decision, ParentBased, Sampler, SamplingResult, TraceIdRatioBased
from opentelemetry.trace import Link, SpanKind, TraceState
from opentelemetry.util.types import Attributes


def build_sampler(ratio: float, requested_per_s: float) -> Sampler:
    """The sampler of a server: traces with the sampled flag, up to a rate, and `ratio` (0 to 1) of all others."""
    return ParentBased(TraceIdRatioBased(ratio), remote_parent_sampled=RequestSampler(ratio, requested_per_s))


class RequestSampler(Sampler):
    """Samples traces with the caller's sampled flag: all while a token bucket has tokens, beyond that by chance.

    The trace id does not decide, since callers choose it.

    Args:
        ratio: share (0 to 1) that is recorded while the bucket is empty.
        per_s: tokens per second. The bucket holds those of one second, and begins full.
        clock: monotonic seconds.
        chance: returns random numbers in [0, 1).
    """

    def __init__(
        self,
        ratio: float,
        per_s: float,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._ratio = ratio
        self._per_s = per_s
        self._clock = clock
        self._chance = chance
        self._most = max(1.0, per_s) if per_s else 0.0
        self._tokens = self._most
        self._filled_at = clock()

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """Decides about the span of a call whose caller has set the sampled flag."""
        recorded = self._take() or self._chance() < self._ratio
        decision = Decision.RECORD_AND_SAMPLE if recorded else Decision.DROP
        parent = trace.get_current_span(parent_context).get_span_context()
        return SamplingResult(decision, attributes if recorded else None, parent.trace_state)

    def get_description(self) -> str:
        """The name of this sampler in the SDK."""
        return f"RequestSampler({self._ratio}, {self._per_s}/s)"

    def _take(self) -> bool:
        now = self._clock()
        self._tokens = min(self._most, self._tokens + (now - self._filled_at) * self._per_s)
        self._filled_at = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
