"""One generation: a request being developed, its outputs, its events, its end.

Between the executions, which develop outputs, and the event log, which streams
read. Invariants: the first event is Accepted and the last Finished; every
output gets exactly one OutputFinished; after Finished it is a member of no
execution.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import structlog
from safelight_server.errors import (
    DeadlineExceededError,
    GenerationCancelledError,
    InternalError,
    SafelightError,
)
from safelight_server.events import (
    Accepted,
    Disposition,
    Finished,
    FinishReason,
    GenerationView,
    Origin,
    OutputFinished,
    OutputView,
    Progress,
    State,
    Timings,
    Usage,
)
from safelight_server.execution import Execution
from safelight_server.identity import Caller
from safelight_server.picture import Developed, Encoded
from safelight_server.preview import Frame
from safelight_server.request import Request
from safelight_server.scheduler import Priority
from safelight_server.stream import EventLog
from safelight_server.telemetry import Stage, Trail, tracing

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Work:
    """What was computed for a generation."""

    compute_s: float = 0.0
    num_rows: int = 0
    num_steps: int = 0


@dataclass(slots=True)
class Times:
    """When things happened, on the engine's clock."""

    accepted: float
    first_batch: float | None = None
    last_step: float | None = None
    ended: float | None = None


class Output:
    """One picture of a generation; a member of the execution that develops it.

    Attributes:
        index: its place in the spec.
        step: steps made.
        reason: why it ended; None before.
        origin: where its picture comes from.
        trail: where it is in the generation's trace, once accepted, if that is recorded.
    """

    def __init__(self, generation: Generation, index: int, seed: int) -> None:
        self._generation = generation
        self._execution: Execution | None = None
        self._away = False
        self.index = index
        self.seed = seed
        self.step = 0
        self.reason: FinishReason | None = None
        self.origin = Origin()
        self._counted = 0
        self._compute_s = 0.0
        self._others_s = 0.0
        self.picture: Encoded | None = None
        self.trail: Trail | None = None

    @property
    def priority(self) -> Priority:
        """Its generation's."""
        return self._generation.priority

    @property
    def deadline(self) -> float | None:
        """Its generation's."""
        return self._generation.deadline

    @property
    def output_id(self) -> int:
        """What the scheduler knows its execution by; 0: it has none."""
        return self._execution.job.output_id if self._execution is not None else 0

    def final_origin(self) -> Origin | None:
        """Where its picture came from; None where there is none."""
        if self.reason is not FinishReason.COMPLETED:
            return None
        match self.origin.disposition:
            case Disposition.COALESCED:
                skipped = self.step - self._counted
                return replace(self.origin, num_steps_skipped=skipped, compute_s_saved=self._others_s)
            case Disposition.LATENT | Disposition.BRANCHED:
                pace_s = self._compute_s / max(1, self._counted)
                return replace(self.origin, compute_s_saved=pace_s * self.origin.num_steps_skipped)
        return self.origin

    # --- with its execution ---

    def follow(self, stage: Stage) -> None:
        """Is on its way from here on, in the trace of its generation's `stage` if that is recorded."""
        if stage.recorded:
            disposition = {"safelight.disposition": self.origin.disposition.value}
            self.trail = Trail(stage, {"safelight.output": self.index, "safelight.seed": str(self.seed), **disposition})

    def enter(self, execution: Execution) -> None:
        """Becomes a member."""
        self._execution = execution
        execution.join(self)

    def recall(self, picture: Encoded) -> None:
        """Its picture was there already."""
        self._generation.on_encoded(self, picture)

    def pause(self) -> None:
        """Stops wanting it, for a while."""
        if self._execution is not None and not self._away:
            self._away = True
            if self.trail is not None:
                self.trail.suspend()
            self._execution.leave(self, back=True)

    def resume(self) -> None:
        """Wants it again."""
        if self._execution is not None and self._away:
            self._away = False
            if self.trail is not None:
                self.trail.resume()
            self._execution.join(self, again=True)

    def leave(self) -> None:
        """Stops wanting it, for good."""
        execution, self._execution = self._execution, None
        if execution is not None:
            if self._away:
                execution.give_up()
            else:
                execution.leave(self)

    def reschedule(self) -> None:
        """Its generation's class has changed."""
        if self._execution is not None and not self._away:
            self._execution.reschedule()

    # --- as a member ---

    def started(self) -> None:
        """To the generation."""
        self._generation.on_started()

    def joined(self, step: int, frame: Frame | None) -> None:
        """Shows what there is."""
        self.step = step
        if frame is not None:
            self._generation.log.join(self.index, frame)

    def used(self, seconds: float, rows: int, steps: int) -> None:
        """Adds up."""
        work = self._generation.work
        work.compute_s += seconds
        work.num_rows += rows
        work.num_steps += steps
        self._counted += steps
        self._compute_s += seconds

    def stepped(self, step: int, batch_size: int) -> None:
        """To the generation."""
        self.step = step
        self._generation.on_stepped(self, batch_size)

    def wants_frame(self, step: int) -> bool:
        """Whether a stream would take it."""
        return self._generation.log.wants_frame(self.index, step)

    def frame(self, frame: Frame) -> None:
        """To the streams."""
        self._generation.log.frame(self.index, frame)

    def developed(self, picture: Developed) -> None:
        """To the generation."""
        execution, self._execution = self._execution, None
        self._others_s = 0.0 if execution is None else max(0.0, execution.compute_s - self._compute_s)
        if self.trail is not None:
            self.trail.developed()
        self._generation.on_developed(self, picture)

    def failed(self, error: SafelightError) -> None:
        """To the generation."""
        self._execution = None
        self._generation.on_output_ended(self, FinishReason.FAILED, error)

    def expired(self) -> None:
        """To the generation."""
        self._execution = None
        self._generation.expire()


class Generation:
    """See the module.

    Args:
        stage: of the call that began it; outlived where that ends first.
        deadline: on the engine's clock.
        on_end: called once, after Finished.
    """

    def __init__(
        self,
        identifier: str,
        caller: Caller,
        request: Request,
        events: EventLog,
        clock: Callable[[], float],
        stage: Stage,
        *,
        deadline: float | None,
        on_end: Callable[[Generation], None],
    ) -> None:
        self.identifier = identifier
        self.caller = caller
        self.request = request
        self.log = events
        self.deadline = deadline
        self.priority = request.priority
        self.state = State.QUEUED
        self.error: SafelightError | None = None
        self.work = Work()
        self.times = Times(clock())
        self.create_time = datetime.now(UTC)
        self.finish_time: datetime | None = None
        self.origins: tuple[Origin | None, ...] = ()
        self.outputs = [Output(self, index, seed) for index, seed in enumerate(request.spec.seeds)]
        self.grace: asyncio.TimerHandle | None = None
        self._clock = clock
        self.stage = stage
        self._on_end = on_end
        self._expiry: asyncio.TimerHandle | None = None
        self._encoding: set[asyncio.Task[None]] = set()
        self._logger = log.bind(generation=self.name)

    @property
    def name(self) -> str:
        """The resource name."""
        return f"generations/{self.identifier}"

    @property
    def output_ids(self) -> list[int]:
        """What the scheduler knows its outputs by, as far as they are on their way."""
        return [output.output_id for output in self.outputs if output.output_id]

    @property
    def ended(self) -> bool:
        """Whether Finished was sent."""
        return self.finish_time is not None

    # --- what is asked of it ---

    def accept(self, numerics_id: str, estimate_s: float, sources: Sequence[Encoded | Execution]) -> None:
        """Says Accepted and gives each output its picture or lets it enter its execution."""
        spec = self.request.spec
        self.log.publish(
            Accepted(spec, numerics_id, self.request.encoding, estimate_s, self.stage.trace_id, self.request.warnings)
        )
        self._logger.info("accepted", model=spec.model, outputs=len(self.outputs), caller=self.caller.name)
        if self.deadline is not None:
            left = max(0.0, self.deadline - self._clock())
            self._expiry = asyncio.get_running_loop().call_later(left, self.expire)
        for output, source in zip(self.outputs, sources, strict=True):
            output.follow(self.stage)
            if isinstance(source, Encoded):
                output.recall(source)
            else:
                output.enter(source)

    def suspend(self) -> None:
        """Stops wanting its pictures at once; what was done is kept."""
        self.state = State.SUSPENDED
        for output in self.outputs:
            if output.reason is None:
                output.pause()
        self._logger.info("suspended", steps=[output.step for output in self.outputs])

    def resume(self) -> None:
        """Goes on from where `suspend` stopped, or from where others have come meanwhile."""
        if self.grace is not None:
            self.grace.cancel()
            self.grace = None
        self.state = State.RUNNING if self.times.first_batch is not None else State.QUEUED
        self._logger.info("resumed", steps=[output.step for output in self.outputs])
        for output in self.outputs:
            if output.reason is None:
                output.resume()

    def stop(self, error: SafelightError, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """Ends every output that has not ended."""
        for output in self.outputs:
            if output.reason is None:
                output.leave()
            if output.reason is None:  # leaving may have told that it ended by itself
                self.on_output_ended(output, reason, error)

    def expire(self) -> None:
        """The deadline has passed."""
        self.stop(DeadlineExceededError("the deadline passed"), FinishReason.DEADLINE_EXCEEDED)

    def set_priority(self, priority: Priority) -> None:
        """Changes the class of what waits."""
        self.priority = priority
        for output in self.outputs:
            output.reschedule()

    # --- what its outputs report ---

    def on_started(self) -> None:
        """An output is in its first batch."""
        if self.state is State.QUEUED:
            self.state = State.RUNNING
        if self.times.first_batch is None:
            self.times.first_batch = self._clock()

    def on_stepped(self, output: Output, batch_size: int) -> None:
        """An output has made a step."""
        self.times.last_step = self._clock()
        steps = self.request.spec.num_inference_steps
        pace = (self.times.last_step - (self.times.first_batch or self.times.accepted)) / output.step
        self.log.publish(Progress(output.index, output.step, steps, batch_size, pace * (steps - output.step)))

    def on_developed(self, output: Output, picture: Developed) -> None:
        """An output's picture is there; it is encoded beside the loop."""
        task = asyncio.create_task(self._encode(output, picture))
        self._encoding.add(task)
        task.add_done_callback(functools.partial(self._encoded, output))

    def _encoded(self, output: Output, task: asyncio.Task[None]) -> None:
        self._encoding.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None and output.reason is None:
            self._logger.error("bug", output=output.index, exc_info=fault)
            self.on_output_ended(output, FinishReason.FAILED, InternalError())

    async def _encode(self, output: Output, picture: Developed) -> None:
        encoded = await picture.encoded(self.request.encoding)
        if output.reason is None:
            self.on_encoded(output, encoded)

    def on_encoded(self, output: Output, picture: Encoded) -> None:
        """An output is complete."""
        output.picture = picture
        self.log.artifact(output.index, picture)
        self.on_output_ended(output, FinishReason.COMPLETED, None)

    def on_output_ended(self, output: Output, reason: FinishReason, error: SafelightError | None) -> None:
        """An output has ended; with the last one the generation ends."""
        output.reason = reason
        if output.trail is not None:
            outcome = {"safelight.finish_reason": reason.value, "safelight.steps": output.step}
            output.trail.end(outcome, tracing.fault(error.status.name, error.reason) if error is not None else "")
        self.error = self.error or error
        self.log.publish(OutputFinished(output.index, reason, output.step))
        if all(output.reason is not None for output in self.outputs):
            self._finish()

    def _finish(self) -> None:
        self.times.ended = self._clock()
        self.finish_time = datetime.now(UTC)
        if self._expiry is not None:
            self._expiry.cancel()
        if self.error is None:
            self.state = State.SUCCEEDED
        elif isinstance(self.error, GenerationCancelledError):
            self.state = State.CANCELLED
        else:
            self.state = State.FAILED
        self.origins = tuple(output.final_origin() for output in self.outputs)
        self.log.publish(Finished(self.error, self._usage(), self._timings(), self.origins))
        level = self._logger.error if isinstance(self.error, InternalError) else self._logger.info
        level("finished", state=self.state.name, seconds=round(self.times.ended - self.times.accepted, 3))
        self._on_end(self)

    # --- how it looks from outside ---

    def view(self) -> GenerationView:
        """How it is now."""
        steps = self.request.spec.num_inference_steps
        return GenerationView(
            name=self.name,
            state=self.state,
            spec=self.request.spec,
            priority=self.priority,
            create_time=self.create_time,
            usage=self._usage(),
            last_sequence=self.log.last_sequence,
            outputs=tuple(
                OutputView(o.index, o.step, steps, o.reason, len(o.picture.data) if o.picture else 0)
                for o in self.outputs
            ),
            labels=self.request.labels,
            finish_time=self.finish_time,
            error=self.error,
        )

    def _usage(self) -> Usage:
        work, log_of = self.work, self.log
        return Usage(work.compute_s, work.num_rows, work.num_steps, log_of.num_previews, log_of.preview_bytes)

    def _timings(self) -> Timings:
        times = self.times
        return Timings(
            queue_s=_between(times.accepted, times.first_batch),
            first_preview_s=_between(times.accepted, self.log.first_preview_at),
            denoise_s=_between(times.first_batch, times.last_step),
            decode_s=_between(times.last_step, times.ended),
            total_s=_between(times.accepted, times.ended),
        )


def _between(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else end - begin
