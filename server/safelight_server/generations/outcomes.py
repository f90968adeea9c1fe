"""How generations end: what is counted, and what callers are told where there is no picture to give them."""

from __future__ import annotations

from safelight_server.domain.errors import FailedPreconditionError, UnavailableError
from safelight_server.domain.events import Disposition
from safelight_server.domain.request import Request
from safelight_server.generations.generation import Generation
from safelight_server.telemetry import Metrics


def count(generation: Generation, metrics: Metrics) -> None:
    """Counts how a generation ended, what caches saved of it, and its previews."""
    events, times = generation.log, generation.times
    assert times.ended is not None
    code = "OK" if generation.error is None else generation.error.status.name
    metrics.ended(code, times.ended - times.accepted)
    for origin in generation.origins:
        if origin is not None and origin.disposition is not Disposition.MISS:
            metrics.cache.served(origin.disposition.value, origin.num_steps_skipped, origin.compute_s_saved)
    waited = None if events.first_preview_at is None else events.first_preview_at - times.accepted
    metrics.previews(events.num_previews, events.preview_bytes, events.num_dropped, waited)


def drained(generation: Generation) -> UnavailableError:
    """Why a draining server ends a generation, with what its client needs to send it to another."""
    metadata = {"generation": generation.name, "request_id": generation.request.request_id}
    metadata["seeds"] = ",".join(map(str, generation.request.spec.seeds))
    return UnavailableError(
        "the server stops; send the same spec with these seeds to another",
        reason="DRAINING",
        metadata=metadata,
        retry_after_s=1.0,
    )


def no_longer_kept(identifier: str, request: Request) -> FailedPreconditionError:
    """Why a request id whose generation was forgotten does not run again: it never runs or bills twice."""
    return FailedPreconditionError(
        f"request_id {request.request_id} has ended and its pictures are no longer kept; use a new one to run it again",
        reason="OUTCOME_EXPIRED",
        metadata={"request_id": request.request_id, "generation": f"generations/{identifier}"},
    )
