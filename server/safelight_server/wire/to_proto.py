"""Events and generations as protobuf messages."""

from __future__ import annotations

from safelight.v1 import generation_pb2 as pb

from safelight_server.domain.events import (
    Accepted,
    Event,
    Finished,
    GenerationView,
    Origin,
    OutputFinished,
    Progress,
    Queued,
    Timings,
    Usage,
)
from safelight_server.domain.request import Degradation
from safelight_server.wire.enums import DEGRADATIONS, DISPOSITIONS, DURABILITIES, PRIORITIES, REASONS, STATES
from safelight_server.wire.specs import encoding_message, spec_message
from safelight_server.wire.statuses import OK, status_of
from safelight_server.wire.times import duration, timestamp


def event_message(event: Event) -> pb.GenerationEvent:
    """An event as a message. The stream fills in its sequence, time and generation."""
    match event:
        case Accepted():
            return pb.GenerationEvent(accepted=_accepted(event))
        case Queued():
            queued = pb.Queued(position=event.position, estimated_start_time=timestamp(event.starts_at))
            return pb.GenerationEvent(queued=queued)
        case Progress():
            return pb.GenerationEvent(progress=_progress(event))
        case OutputFinished():
            ended = pb.OutputFinished(
                output_index=event.output_index, finish_reason=REASONS[event.reason], step=event.step
            )
            return pb.GenerationEvent(output_finished=ended)
        case Finished():
            return pb.GenerationEvent(finished=_finished(event))


def generation_message(view: GenerationView) -> pb.Generation:
    """A generation as the resource that calls return."""
    message = pb.Generation(
        name=view.name,
        state=STATES[view.state],
        spec=spec_message(view.spec),
        priority=PRIORITIES[view.priority],
        labels=view.labels,
        create_time=timestamp(view.create_time),
        usage=usage_message(view.usage),
        last_sequence=view.last_sequence,
        degradations=map(_degradation, view.degradations),
    )
    for output in view.outputs:
        message.outputs.add(
            output_index=output.index,
            step=output.step,
            num_steps=output.num_steps,
            finish_reason=REASONS[output.reason] if output.reason else None,
            total_bytes=output.total_bytes,
        )
    if view.finish_time is not None:
        message.finish_time.CopyFrom(timestamp(view.finish_time))
        message.status.CopyFrom(OK if view.error is None else status_of(view.error))
    return message


def usage_message(usage: Usage) -> pb.Usage:
    """What a generation has used, as a message."""
    cost = pb.Cost(currency_code=usage.currency, nanos=usage.cost_nanos) if usage.currency else None
    return pb.Usage(
        compute_time=duration(usage.compute_s),
        num_rows=usage.num_rows,
        num_steps=usage.num_steps,
        num_previews=usage.num_previews,
        preview_bytes=usage.preview_bytes,
        cost=cost,
        num_rows_skipped=usage.num_rows_skipped,
    )


def _accepted(event: Accepted) -> pb.Accepted:
    return pb.Accepted(
        spec=spec_message(event.spec),
        model_revision=event.spec.revision,
        numerics_id=event.numerics_id,
        encoding=encoding_message(event.encoding),
        estimated_duration=duration(event.estimate_s),
        trace_id=event.trace_id,
        warnings=[pb.Warning(reason=notice.reason, message=notice.message) for notice in event.warnings],
        durability=DURABILITIES[event.durability],
        batch_tolerance=event.batch_tolerance,
    )


def _progress(event: Progress) -> pb.Progress:
    return pb.Progress(
        output_index=event.output_index,
        step=event.step,
        num_steps=event.num_steps,
        batch_size=event.batch_size,
        estimated_remaining=duration(event.remaining_s),
    )


def _finished(event: Finished) -> pb.Finished:
    return pb.Finished(
        status=OK if event.error is None else status_of(event.error),
        usage=usage_message(event.usage),
        timings=_timings(event.timings),
        cache_results=[_cache_result(origin) for origin in event.origins],
        degradations=map(_degradation, event.degradations),
    )


def _cache_result(origin: Origin | None) -> pb.CacheResult:
    if origin is None:
        return pb.CacheResult()
    return pb.CacheResult(
        disposition=DISPOSITIONS[origin.disposition],
        similarity=origin.similarity,
        source=origin.source,
        num_steps_skipped=origin.num_steps_skipped,
        numerics_id=origin.numerics_id,
    )


def _degradation(given_up: Degradation) -> pb.Degradation:
    kind = DEGRADATIONS[given_up.kind]
    return pb.Degradation(kind=kind, requested=given_up.requested, applied=given_up.applied)


def _timings(timings: Timings) -> pb.Timings:
    message = pb.Timings()
    seconds = {
        "queue": timings.queue_s,
        "first_preview": timings.first_preview_s,
        "denoise": timings.denoise_s,
        "decode": timings.decode_s,
        "total": timings.total_s,
    }
    for name, value in seconds.items():
        if value is not None:
            getattr(message, name).CopyFrom(duration(max(0.0, value)))
    return message
