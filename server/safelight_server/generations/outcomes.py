"""What is counted of generations, and the errors of those that end with the server or are no longer kept."""

from __future__ import annotations

import structlog

from safelight_server.domain.errors import FailedPreconditionError, FieldViolation, NotFoundError, UnavailableError
from safelight_server.domain.events import Disposition
from safelight_server.domain.request import Request
from safelight_server.generations.generation import Generation
from safelight_server.scheduler import Priority
from safelight_server.telemetry import Metrics

log = structlog.get_logger(__name__)


def count_degradations(generation: Generation, metrics: Metrics) -> None:
    """Counts in the metrics, and logs, what an accepted generation has given up under pressure."""
    given_up = generation.degradations
    for loss in given_up:
        metrics.degraded(loss.kind.value, generation.request.priority.name.lower())
    if given_up:
        what = {loss.kind.value: f"{loss.requested} to {loss.applied}" for loss in given_up}
        log.info("degraded", generation=generation.name, priority=generation.request.priority.name, **what)


def count_pressure(metrics: Metrics, priority: Priority, late: bool, load: float) -> None:
    """Notes in the metrics and in the log that requests of a class are late from now on, or in time again."""
    metrics.pressure(priority.name.lower(), late)
    log.info("pressure_began" if late else "pressure_ended", priority=priority.name, load=round(load, 2))


def count_outcome(generation: Generation, metrics: Metrics) -> None:
    """Counts in the metrics how a generation ended, what caches saved, and its previews."""
    events, times = generation.log, generation.times
    assert times.ended is not None
    code = "OK" if generation.error is None else generation.error.status.name
    priority = generation.priority.name.lower()
    metrics.ended(code, times.ended - times.accepted, generation.caller.tenant, priority)
    for origin in generation.origins:
        if origin is not None and origin.disposition is not Disposition.MISS:
            metrics.cache.served(origin.disposition.value, origin.num_steps_skipped, origin.compute_s_saved)
    waited = None if events.first_preview_at is None else events.first_preview_at - times.accepted
    metrics.previews(events.num_previews, events.preview_bytes, events.num_dropped, waited, priority)


def in_field(error: NotFoundError, field: str) -> NotFoundError:
    """The error with the field of the request that names what is not there."""
    return NotFoundError(error.message, reason=error.reason, violations=[FieldViolation(field, error.message)])


def drained(generation: Generation) -> UnavailableError:
    """The error by which a draining server ends a generation, with what a client needs to send it to another server."""
    metadata = {"generation": generation.name, "request_id": generation.request.request_id}
    metadata["seeds"] = ",".join(map(str, generation.request.spec.seeds))
    return UnavailableError(
        "the server stops; send the same spec with these seeds to another",
        reason="DRAINING",
        metadata=metadata,
        retry_after_s=1.0,
    )


def expired(identifier: str, request: Request) -> FailedPreconditionError:
    """The error for a request id whose generation is no longer kept: a request id never runs or bills twice."""
    return FailedPreconditionError(
        f"request_id {request.request_id} has ended and its pictures are no longer kept; use a new one to run it again",
        reason="OUTCOME_EXPIRED",
        metadata={"request_id": request.request_id, "generation": f"generations/{identifier}"},
    )
