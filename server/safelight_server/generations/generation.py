"""One generation: the state of an accepted request, its outputs, its events and its end.

A generation gets reports from the executions that develop its outputs, and publishes
events to its log, which streams read. Invariants: the first event is Accepted and the
last Finished; every output gets exactly one OutputFinished; after Finished no output
is a member of an execution.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import structlog

from safelight_server.cluster.journal import Journal
from safelight_server.cluster.records import EventRecord
from safelight_server.domain.caller import Caller
from safelight_server.domain.errors import GenerationCancelledError, InternalError, SafelightError, UnavailableError
from safelight_server.domain.events import (
    Accepted,
    Disposition,
    Durability,
    Finished,
    FinishReason,
    GenerationState,
    GenerationView,
    Origin,
    OutputFinished,
    OutputView,
    Progress,
    Timings,
    Usage,
)
from safelight_server.domain.picture import EncodedPicture, FinishedPicture
from safelight_server.domain.request import Degradation, DegradationKind, PreviewMethod, PreviewPolicy, Request
from safelight_server.generations.execution import Execution
from safelight_server.generations.output import ComputedWork, Output
from safelight_server.prices import ComputePrice
from safelight_server.scheduler import Priority
from safelight_server.stream import EventLog, serialization
from safelight_server.telemetry import Stage, tracing

log = structlog.get_logger(__name__)


DECIDE_RETRY_S = 0.25
"""Seconds between two checks whether the lease is held, where an outcome waits for that."""
RENEWAL_S = 5.0
"""How long a cancel waits for the lease to be renewed."""
GENERATION_BYTES = 6 << 10
"""Memory of a generation without its request, outputs and events; measured: 5.0 KB with its entries in tables."""
OUTPUT_BYTES = 1 << 10
"""Memory of an output without its picture and its event; measured: 0.8 KB."""


@dataclass(slots=True)
class GenerationTimes:
    """When things happened, on the engine's clock."""

    accepted: float
    first_batch: float | None = None
    last_step: float | None = None
    ended: float | None = None


class Generation:
    """An accepted request; see the module for its invariants.

    Args:
        stage: the trace of the call that started the generation; that call may end first.
        deadline: on the engine's clock.
        late: makes the error of a generation whose deadline has passed.
        charge: called with each amount of compute that counts for the generation, in seconds.
        price: the price of compute; None: it has no cost.
        on_end: called once, after Finished.
        now: Unix seconds, on the clock that all replicas share.

    Attributes:
        name: its resource name.
        owned: whether this replica decides the outcome; otherwise another replica does, and this one shows it.
        durability: REPLICATED once its record is written, else LOCAL; Accepted promises what it is then.
        journal: stores its events for other replicas; None: they are not stored.
        picture_bytes: memory of the decoded pictures that its outputs start from or follow.
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
        late: Callable[[], SafelightError],
        on_end: Callable[[Generation], None],
        now: Callable[[], float] = time.time,
        charge: Callable[[float], None] = lambda _seconds: None,
        price: ComputePrice | None = None,
    ) -> None:
        self.identifier = identifier
        self.name = f"generations/{identifier}"
        self.caller = caller
        self.request = request
        self.log = events
        self.deadline = deadline
        self.priority = request.priority
        self.owned = True
        self.durability = Durability.LOCAL
        self.journal: Journal | None = None
        self.state = GenerationState.QUEUED
        self.error: SafelightError | None = None
        self.work = ComputedWork()
        self.charge = charge
        self._price = price
        self.times = GenerationTimes(clock())
        self._now = now
        self.create_time = datetime.fromtimestamp(now(), UTC)
        self.finish_time: datetime | None = None
        self.origins: tuple[Origin | None, ...] = ()
        self.numerics_id = ""
        self.outputs = [Output(self, index, seed, clock) for index, seed in enumerate(request.spec.seeds)]
        self.picture_bytes = 0
        self._fixed_bytes = GENERATION_BYTES + OUTPUT_BYTES * len(self.outputs) + request.held_bytes
        self._clock = clock
        self.stage = stage
        self._late = late
        self._on_end = on_end
        self._usage_of_owner = Usage()
        self._expiry: asyncio.TimerHandle | None = None
        self._encode_tasks: set[asyncio.Task[None]] = set()
        self._logger = log.bind(generation=self.name)

    @property
    def output_ids(self) -> list[int]:
        """The scheduler's ids of those of its outputs that have an execution."""
        return [output.output_id for output in self.outputs if output.output_id]

    @property
    def left_s(self) -> float | None:
        """Seconds to its deadline; None: it has no deadline."""
        return None if self.deadline is None else self.deadline - self._clock()

    @property
    def ended(self) -> bool:
        """Whether Finished was published."""
        return self.finish_time is not None

    @property
    def whole(self) -> bool:
        """Whether all its finished pictures are in this process."""
        return all(o.total_bytes for o in self.outputs if o.reason is FinishReason.COMPLETED)

    @property
    def degradations(self) -> tuple[Degradation, ...]:
        """What its quality floor gave up under load."""
        if not self.request.degradations:
            return ()
        similar = any(output.origin.disposition is Disposition.SIMILAR for output in self.outputs)
        # a replica that took the generation over develops the picture where the similar one is gone
        return tuple(
            loss for loss in self.request.degradations if similar or loss.kind is not DegradationKind.SIMILAR_PICTURE
        )

    def preview_policy(self, wanted: PreviewPolicy) -> PreviewPolicy:
        """The preview policy of a stream that requested `wanted`: a degraded generation has only cheap previews."""
        cheaper = any(loss.kind is DegradationKind.CHEAPER_PREVIEWS for loss in self.request.degradations)
        if cheaper and wanted.method in (PreviewMethod.TINY_DECODER, PreviewMethod.FULL_DECODER):
            return replace(wanted, method=PreviewMethod.LINEAR)
        return wanted

    @property
    def held_bytes(self) -> int:
        """Bytes in memory: request, state events, finished pictures, objects, and until its end `picture_bytes`."""
        return self._fixed_bytes + self.log.held_bytes + (0 if self.ended else self.picture_bytes)

    # --- commands ---

    def accept(
        self,
        numerics_id: str,
        estimate_s: float,
        sources: Sequence[EncodedPicture | Execution],
        batch_tolerance: float,
    ) -> None:
        """Publishes Accepted, then gives each output its picture or lets it join its execution."""
        spec, self.numerics_id = self.request.spec, numerics_id
        self.log.publish(
            Accepted(
                spec,
                numerics_id,
                self.request.encoding,
                estimate_s,
                self.stage.trace_id,
                self.request.warnings,
                self.durability,
                batch_tolerance,
            )
        )
        self._logger.info("accepted", model=spec.model, outputs=len(self.outputs), caller=self.caller.name)
        self._watch_deadline()
        if sources:
            self.enter(self.outputs, sources)

    @property
    def may_decide(self) -> bool:
        """Whether this replica may end the generation now: not while the lease may have run out."""
        return self.owned and (self.journal is None or self.journal.held)

    async def until_decidable(self, is_registered: Callable[[], bool]) -> None:
        """Waits until this replica certainly holds the lease of the generation.

        Args:
            is_registered: whether the generation is still among those of this replica.

        Raises:
            UnavailableError: the lease is not renewed in time, or another replica has taken it.
        """
        until = time.monotonic() + RENEWAL_S
        while not self.may_decide and is_registered() and time.monotonic() < until:  # noqa: ASYNC110  # the clock ends it too
            await asyncio.sleep(DECIDE_RETRY_S)
        void = self.journal is not None and self.journal.lost
        if void or (not self.ended and (not self.may_decide or not is_registered())):
            raise UnavailableError("another replica may own it by now; try again", retry_after_s=1.0)

    def _watch_deadline(self) -> None:
        if self.deadline is not None:
            left = max(0.0, self.deadline - self._clock())
            self._expiry = asyncio.get_running_loop().call_later(left, self.expire)

    def enter(self, outputs: Sequence[Output], sources: Sequence[EncodedPicture | Execution]) -> None:
        """Gives outputs their pictures or lets them join their executions. Outputs that have one are left alone."""
        for output, source in zip(outputs, sources, strict=True):
            if not output.idle:
                continue
            output.begin_trail(self.stage)
            if isinstance(source, EncodedPicture):
                output.recall(source)
            else:
                output.enter(source)

    def suspend(self) -> None:
        """Suspends the generation: its outputs leave their executions, which keep the state after the last step."""
        self._set_state(GenerationState.SUSPENDED)
        for output in self.outputs:
            if output.reason is None:
                output.pause()
        self._logger.info("suspended", steps=[output.step for output in self.outputs])

    def _set_state(self, state: GenerationState) -> None:
        self.state = state
        if self.owned and self.journal is not None:
            self.journal.write(EventRecord("state", b"", state=state))

    def resume(self) -> None:
        """Resumes the generation after `suspend`: its outputs join their executions again, at their present steps."""
        self._set_state(GenerationState.RUNNING if self.times.first_batch is not None else GenerationState.QUEUED)
        self._logger.info("resumed", steps=[output.step for output in self.outputs])
        for output in self.outputs:
            if output.reason is None:
                output.resume()

    def stop(self, error: SafelightError, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """Ends every output that has not ended, and with them the generation."""
        for output in self.outputs:
            if output.reason is None:
                output.leave()
            if output.reason is None:  # `leave` may have reported that the output has ended by itself
                self.on_output_ended(output, reason, error)

    def expire(self) -> None:
        """Ends the generation, since its deadline has passed.

        While another replica may own it, this one decides nothing and checks again after `DECIDE_RETRY_S`.
        """
        if self.ended:
            return
        if not self.may_decide:
            if self.owned:
                self._expiry = asyncio.get_running_loop().call_later(DECIDE_RETRY_S, self.expire)
            return
        error = self._late()
        outage = isinstance(error, UnavailableError)  # then the server was too slow, and not the deadline too short
        self.stop(error, FinishReason.FAILED if outage else FinishReason.DEADLINE_EXCEEDED)

    def leave(self) -> None:
        """Leaves all executions without an event: another replica continues, or nothing here watches it."""
        if self._expiry is not None:
            self._expiry.cancel()
        for output in self.outputs:
            output.leave()
            output.end_trail("moved")

    def set_priority(self, priority: Priority) -> None:
        """Changes its priority, and that of its executions."""
        self.priority = priority
        for output in self.outputs:
            output.reschedule()

    # --- while another replica owns it ---

    def hear(self, event: EventRecord, picture: EncodedPicture | None) -> None:
        """Shows the streams here an event of the owner. `picture` is that of the output which the event ends."""
        if event.kind == "state" and event.state is not None and not self.ended:
            self.state = event.state
        if event.sequence <= self.log.last_sequence:
            return
        ends = event.output_index if event.kind == "output" else None
        if ends is not None:
            output = self.outputs[ends]
            output.leave()
            output.held = None
            output.reason, output.step = event.reason, event.step
            self.error = event.error
            if picture is not None:
                output.total_bytes = len(picture.data)
                self.log.artifact(ends, picture)
        if event.kind == "finished":
            assert event.state is not None
            self.state, self.error, self.finish_time = event.state, event.error, event.finish_time
            self._usage_of_owner, self.times.ended = event.usage, self._clock()
            self._part()
        self.log.replay(serialization.SerializedEvent(event.sequence, event.data, ends, event.kind == "finished"))
        if event.kind == "finished":
            self._on_end(self)

    def adopt(self, journal: Journal, numerics_id: str, batch_tolerance: float) -> None:
        """Takes over the ownership, and decides the outcomes that the outputs have held back until now."""
        self.owned, self.journal, self.log.journal = True, journal, journal
        self.durability = Durability.REPLICATED
        self._logger.info("adopted", steps=[output.step for output in self.outputs])
        if not self.log.last_sequence:
            self.accept(numerics_id, 0.0, (), batch_tolerance)
        else:
            self._watch_deadline()
        for output in self.outputs:
            held, output.held = output.held, None
            if output.reason is None and isinstance(held, FinishedPicture):
                self.on_developed(output, held)
            elif output.reason is None and isinstance(held, SafelightError):
                self.on_output_ended(output, FinishReason.FAILED, held)
        if self.outputs and not self.ended and all(output.reason is not None for output in self.outputs):
            self._finish()  # the owner died between the last output's end and Finished

    # --- reports of its outputs ---

    def on_started(self) -> None:
        """An output is in its first batch."""
        if self.state is GenerationState.QUEUED:
            self._set_state(GenerationState.RUNNING)
        if self.times.first_batch is None:
            self.times.first_batch = self._clock()

    def on_stepped(self, output: Output, batch_size: int) -> None:
        """An output has made a step."""
        self.times.last_step = self._clock()
        steps = self.request.spec.num_inference_steps
        remaining_s = output.seconds_per_step * (steps - output.step)
        self.log.publish(Progress(output.index, output.step, steps, batch_size, remaining_s))

    def on_developed(self, output: Output, picture: FinishedPicture) -> None:
        """The pixels of an output are there; a thread encodes them."""
        output.encoding = True
        task = asyncio.create_task(self._encode(output, picture))
        self._encode_tasks.add(task)
        task.add_done_callback(functools.partial(self._encoded, output))

    def _encoded(self, output: Output, task: asyncio.Task[None]) -> None:
        self._encode_tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None and output.reason is None:
            self.on_output_ended(output, FinishReason.FAILED, InternalError())
            self._logger.error("bug", output=output.index, exc_info=fault)

    async def _encode(self, output: Output, picture: FinishedPicture) -> None:
        encoded = await picture.encoded(self.request.encoding)
        if output.reason is None:
            self.on_encoded(output, encoded)

    def on_encoded(self, output: Output, picture: EncodedPicture) -> None:
        """An output is complete."""
        output.total_bytes = len(picture.data)
        self.log.artifact(output.index, picture)
        self.on_output_ended(output, FinishReason.COMPLETED, None)

    def on_output_ended(self, output: Output, reason: FinishReason, error: SafelightError | None) -> None:
        """An output has ended; with the last one the generation ends."""
        output.reason = reason
        output.end_trail(reason.value, tracing.fault(error.status.name, error.reason) if error is not None else "")
        self.error = self.error or error
        self.log.publish(OutputFinished(output.index, reason, output.step))
        if all(output.reason is not None for output in self.outputs):
            self._finish()

    def _finish(self) -> None:
        self.times.ended = self._clock()
        self.finish_time = datetime.fromtimestamp(self._now(), UTC)
        if self._expiry is not None:
            self._expiry.cancel()
        if self.error is None:
            self.state = GenerationState.SUCCEEDED
        elif isinstance(self.error, GenerationCancelledError):
            self.state = GenerationState.CANCELLED
        else:
            self.state = GenerationState.FAILED
        self.origins = tuple(output.final_origin() for output in self.outputs)
        self.log.publish(Finished(self.error, self._usage(), self._timings(), self.origins, self.degradations))
        self._part()
        self._on_end(self)
        level = self._logger.error if isinstance(self.error, InternalError) else self._logger.info
        level("finished", state=self.state.name, seconds=round(self.times.ended - self.times.accepted, 3))

    def _part(self) -> None:
        for output in self.outputs:
            output.part()

    # --- views ---

    def view(self) -> GenerationView:
        """A snapshot of its state, as Get returns it."""
        steps = self.request.spec.num_inference_steps
        return GenerationView(
            name=self.name,
            state=self.state,
            spec=self.request.spec,
            priority=self.priority,
            create_time=self.create_time,
            usage=self._usage(),
            last_sequence=self.log.last_sequence,
            outputs=tuple(OutputView(o.index, o.step, steps, o.reason, o.total_bytes) for o in self.outputs),
            labels=self.request.labels,
            finish_time=self.finish_time,
            error=self.error,
            degradations=self.degradations,
        )

    def _usage(self) -> Usage:
        work, log_of = self.work, self.log
        if not self.owned and self.ended:
            return self._usage_of_owner
        usage = Usage(
            work.compute_s,
            work.num_rows,
            work.num_steps,
            log_of.num_previews,
            log_of.preview_bytes,
            num_rows_skipped=work.num_rows_skipped,
        )
        if self._price is None:
            return usage
        return replace(usage, cost_nanos=self._price.of(work.compute_s), currency=self._price.currency)

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
