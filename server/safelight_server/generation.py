"""One generation: a request being developed, its outputs, its events, its end.

Between the engine, which reports on outputs, and the event log, which streams
read. Invariants: the first event is Accepted and the last Finished; every
output gets exactly one OutputFinished; after Finished nothing runs.
"""

from __future__ import annotations

import asyncio
import enum
import functools
import itertools
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeAlias

import structlog
from google.rpc import status_pb2
from opentelemetry.trace import Span
from safelight.v1 import generation_pb2 as pb
from safelight_server import convert
from safelight_server.catalog import Pipeline
from safelight_server.engine import Engine, Job
from safelight_server.errors import (
    DeadlineExceededError,
    GenerationCancelledError,
    InternalError,
    SafelightError,
)
from safelight_server.identity import Caller
from safelight_server.latents import Snapshot
from safelight_server.picture import Encoded, encode
from safelight_server.pipeline import sampler_table, to_pixels
from safelight_server.preview import Frame
from safelight_server.request import Request
from safelight_server.runtime.base import FloatArray
from safelight_server.scheduler import Priority
from safelight_server.stream import EventLog
from safelight_server.telemetry import tracing

log = structlog.get_logger(__name__)

_OUTPUT_IDS = itertools.count(1)
Reason = pb.OutputFinished.FinishReason
if TYPE_CHECKING:
    ReasonValue: TypeAlias = pb.OutputFinished.FinishReason.ValueType


class State(enum.Enum):
    """Where a generation is in its life."""

    QUEUED = pb.Generation.STATE_QUEUED
    RUNNING = pb.Generation.STATE_RUNNING
    SUSPENDED = pb.Generation.STATE_SUSPENDED
    SUCCEEDED = pb.Generation.STATE_SUCCEEDED
    CANCELLED = pb.Generation.STATE_CANCELLED
    FAILED = pb.Generation.STATE_FAILED


@dataclass(slots=True)
class Usage:
    """What a generation has used."""

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


@dataclass(slots=True)
class _Spans:
    """The stages' spans; a stage that has not begun has none."""

    tracing: tracing.Tracing
    parent: Span
    open: dict[str, Span] = field(default_factory=dict)

    def begin(self, stage: str, **attributes: str | int | float) -> None:
        self.open[stage] = self.tracing.span(stage, self.parent, (), **attributes)

    def end(self, stage: str, error: str = "") -> None:
        if (span := self.open.pop(stage, None)) is not None:
            tracing.end(span, error)


class _Output:
    """One picture of a generation; listens to the engine."""

    def __init__(self, generation: Generation, index: int, seed: int) -> None:
        self._generation = generation
        self.index = index
        self.seed = seed
        self.output_id = 0
        self.step = 0
        self.reason: ReasonValue = Reason.FINISH_REASON_UNSPECIFIED
        self.snapshot: Snapshot | None = None
        self.picture: Encoded | None = None

    def started(self) -> None:
        self._generation.on_started()

    def computed(self, seconds: float, rows: int) -> None:
        usage = self._generation.usage
        usage.compute_s += seconds
        usage.num_rows += rows

    def stepped(self, step: int, batch_size: int) -> None:
        self.step = step
        self._generation.on_stepped(self, batch_size)

    def wants_frame(self, step: int) -> bool:
        return self._generation.log.wants_frame(self.index, step)

    def frame(self, step: int, denoised: FloatArray) -> None:
        self._generation.log.frame(Frame(self.output_id, self.index, step, denoised))

    def decoded(self, image: FloatArray) -> None:
        self._generation.on_decoded(self, image)

    def failed(self, error: SafelightError) -> None:
        self._generation.on_output_ended(self, Reason.FINISH_REASON_FAILED, error)

    def expired(self) -> None:
        error = DeadlineExceededError("the deadline passed")
        self._generation.on_output_ended(self, Reason.FINISH_REASON_DEADLINE_EXCEEDED, error)


class Generation:
    """See the module.

    Args:
        deadline: on the engine's clock.
        estimate_s: expected time until it is finished.
        on_end: called once, after Finished.
    """

    def __init__(
        self,
        identifier: str,
        caller: Caller,
        request: Request,
        pipeline: Pipeline,
        engine: Engine,
        events: EventLog,
        pool: Executor,
        clock: Callable[[], float],
        tracer: tracing.Tracing,
        span: Span,
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
        self.status: status_pb2.Status | None = None
        self.error: SafelightError | None = None
        self.usage = Usage()
        self.times = Times(clock())
        self.create_time = datetime.now(UTC)
        self.finish_time: datetime | None = None
        self.outputs = [_Output(self, index, seed) for index, seed in enumerate(request.spec.seeds)]
        self.grace: asyncio.TimerHandle | None = None
        self._pipeline = pipeline
        self._engine = engine
        self._pool = pool
        self._clock = clock
        self._spans = _Spans(tracer, span)
        self._trace_id = tracing.trace_id(span)
        self._on_end = on_end
        self._encoding: set[asyncio.Task[None]] = set()
        self._logger = log.bind(generation=self.name)

    @property
    def name(self) -> str:
        """The resource name."""
        return f"generations/{self.identifier}"

    @property
    def ended(self) -> bool:
        """Whether Finished was sent."""
        return self.status is not None

    # --- what is asked of it ---

    def jobs(self) -> list[tuple[_Output, Job]]:
        """The outputs that have not ended, as the engine takes them."""
        spec = self.request.spec
        tokens = (spec.token_ids,) if spec.negative_token_ids is None else (spec.token_ids, spec.negative_token_ids)
        jobs: list[tuple[_Output, Job]] = []
        for output in self.outputs:
            if output.reason:
                continue
            output.output_id = next(_OUTPUT_IDS)
            job = Job(
                output_id=output.output_id,
                caller=f"{self.caller.tenant}/{self.caller.name}",
                priority=self.priority,
                pipeline=self._pipeline,
                latent_shape=self._pipeline.latent_shape(spec.width_px, spec.height_px),
                table=sampler_table(self._pipeline, spec),
                seed=output.seed,
                guidance_scale=spec.guidance_scale,
                token_ids=tokens,
                deadline=self.deadline,
                start=output.snapshot,
            )
            jobs.append((output, job))
        return jobs

    def accept(self, numerics_id: str, estimate_s: float, jobs: list[tuple[_Output, Job]]) -> None:
        """Says Accepted and hands the outputs to the engine."""
        accepted = pb.Accepted(
            spec=convert.spec_message(self.request.spec),
            model_revision=self.request.spec.revision,
            numerics_id=numerics_id,
            encoding=convert.encoding_message(self.request.encoding),
            estimated_duration=convert.duration(estimate_s),
            trace_id=self._trace_id,
            warnings=[pb.Warning(reason=n.reason, message=n.message) for n in self.request.warnings],
        )
        self.log.publish(pb.GenerationEvent(accepted=accepted))
        self._logger.info("accepted", model=self.request.spec.model, outputs=len(self.outputs), caller=self.caller.name)
        self._spans.begin("queue")
        self._submit(jobs)

    def suspend(self) -> None:
        """Stops the work at once and keeps what is needed to go on."""
        self.state = State.SUSPENDED
        for output in self.outputs:
            if not output.reason:
                output.snapshot = self._engine.suspend(output.output_id)
        self._logger.info("suspended", steps=[output.step for output in self.outputs])

    def resume(self) -> None:
        """Goes on from where `suspend` stopped."""
        if self.grace is not None:
            self.grace.cancel()
            self.grace = None
        self.state = State.RUNNING if self.times.first_batch is not None else State.QUEUED
        self._logger.info("resumed", steps=[output.step for output in self.outputs])
        self._submit(self.jobs())

    def stop(self, error: SafelightError, reason: ReasonValue = Reason.FINISH_REASON_CANCELLED) -> None:
        """Ends every output that has not ended."""
        for output in self.outputs:
            if not output.reason:
                self._engine.cancel(output.output_id)
                self.on_output_ended(output, reason, error)

    def set_priority(self, priority: Priority) -> None:
        """Changes the class of what waits."""
        self.priority = priority
        for output in self.outputs:
            if not output.reason and self.state is not State.SUSPENDED:
                self._engine.scheduler.set_priority(output.output_id, priority)

    def _submit(self, jobs: list[tuple[_Output, Job]]) -> None:
        for output, job in jobs:
            self._engine.submit(job, output)

    # --- what the engine reports ---

    def on_started(self) -> None:
        """An output is in its first batch."""
        if self.state is State.QUEUED:
            self.state = State.RUNNING
        if self.times.first_batch is None:
            self.times.first_batch = self._clock()
            self._spans.end("queue")
            self._spans.begin("denoise", steps=self.request.spec.num_inference_steps)

    def on_stepped(self, output: _Output, batch_size: int) -> None:
        """An output has made a step."""
        self.usage.num_steps += 1
        self.times.last_step = self._clock()
        steps = self.request.spec.num_inference_steps
        pace = (self.times.last_step - (self.times.first_batch or self.times.accepted)) / output.step
        progress = pb.Progress(
            output_index=output.index,
            step=output.step,
            num_steps=steps,
            batch_size=batch_size,
            estimated_remaining=convert.duration(pace * (steps - output.step)),
        )
        self.log.publish(pb.GenerationEvent(progress=progress))

    def on_decoded(self, output: _Output, image: FloatArray) -> None:
        """An output's picture is decoded; it is encoded beside the loop."""
        self._spans.end("denoise")
        self._spans.begin(f"encode {output.index}")
        task = asyncio.create_task(self._encode(output, image))
        self._encoding.add(task)
        task.add_done_callback(functools.partial(self._encoded, output))

    def _encoded(self, output: _Output, task: asyncio.Task[None]) -> None:
        self._encoding.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None and not output.reason:
            self._logger.error("bug", output=output.index, exc_info=fault)
            self.on_output_ended(output, Reason.FINISH_REASON_FAILED, InternalError())

    async def _encode(self, output: _Output, image: FloatArray) -> None:
        loop, encoding = asyncio.get_running_loop(), self.request.encoding
        picture = await loop.run_in_executor(self._pool, lambda: encode(to_pixels(image), encoding))
        self._spans.end(f"encode {output.index}")
        if not output.reason:
            output.picture = picture
            self.log.artifact(output.index, picture)
            self.on_output_ended(output, Reason.FINISH_REASON_COMPLETED, None)

    def on_output_ended(self, output: _Output, reason: ReasonValue, error: SafelightError | None) -> None:
        """An output has ended; with the last one the generation ends."""
        output.reason = reason
        output.snapshot = None
        self.error = self.error or error
        finished = pb.OutputFinished(output_index=output.index, finish_reason=reason, step=output.step)
        self.log.publish(pb.GenerationEvent(output_finished=finished))
        if all(output.reason for output in self.outputs):
            self._finish()

    def _finish(self) -> None:
        self.times.ended = self._clock()
        self.finish_time = datetime.now(UTC)
        self.status = convert.OK if self.error is None else convert.status_of(self.error)
        if self.error is None:
            self.state = State.SUCCEEDED
        elif isinstance(self.error, GenerationCancelledError):
            self.state = State.CANCELLED
        else:
            self.state = State.FAILED
        for stage in list(self._spans.open):
            self._spans.end(stage, self.error.reason if self.error else "")
        finished = pb.Finished(status=self.status, usage=self.usage_message(), timings=self._timings())
        self.log.publish(pb.GenerationEvent(finished=finished))
        level = self._logger.error if isinstance(self.error, InternalError) else self._logger.info
        level("finished", state=self.state.name, seconds=round(self.times.ended - self.times.accepted, 3))
        self._on_end(self)

    # --- how it looks from outside ---

    def usage_message(self) -> pb.Usage:
        """What it has used so far."""
        return pb.Usage(
            compute_time=convert.duration(self.usage.compute_s),
            num_rows=self.usage.num_rows,
            num_steps=self.usage.num_steps,
            num_previews=self.log.num_previews,
            preview_bytes=self.log.preview_bytes,
        )

    def _timings(self) -> pb.Timings:
        times, timings = self.times, pb.Timings()
        ends = {
            "queue": (times.accepted, times.first_batch),
            "first_preview": (times.accepted, self.log.first_preview_at),
            "denoise": (times.first_batch, times.last_step),
            "decode": (times.last_step, times.ended),
            "total": (times.accepted, times.ended),
        }
        for name, (begin, end) in ends.items():
            if begin is not None and end is not None:
                getattr(timings, name).CopyFrom(convert.duration(max(0.0, end - begin)))
        return timings

    def message(self) -> pb.Generation:
        """The resource."""
        message = pb.Generation(
            name=self.name,
            state=self.state.value,
            spec=convert.spec_message(self.request.spec),
            priority=convert.priority_message(self.priority),
            labels=self.request.labels,
            create_time=convert.timestamp(self.create_time),
            usage=self.usage_message(),
            last_sequence=self.log.last_sequence,
        )
        for output in self.outputs:
            message.outputs.add(
                output_index=output.index,
                step=output.step,
                num_steps=self.request.spec.num_inference_steps,
                finish_reason=output.reason,
                total_bytes=len(output.picture.data) if output.picture else 0,
            )
        if self.status is not None and self.finish_time is not None:
            message.status.CopyFrom(self.status)
            message.finish_time.CopyFrom(convert.timestamp(self.finish_time))
        return message
