"""The loop around the scheduler: schedule → runtime → complete, on every instance of the runtime.

Decides nothing about order (the scheduler does) and knows nothing of
generations: it reports to an `OutputListener` per output. `batches.py` has the
tensors.

Invariants: an instance runs one batch at a time; an output that was cancelled,
suspended or has expired is in no later batch; a batch whose instance was lost
is run again elsewhere, from the same step and held against nobody; every output that was submitted
ends in exactly one of `decoded`, `failed`, `expired`, or by `cancel` or
`suspend`. Runs on one event loop and takes no locks; the work between a
batch's return and the next dispatch is the critical path and is counted.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog
from safelight_server.batches import Batches, Call, Flight, Preview
from safelight_server.catalog import Pipeline
from safelight_server.errors import InternalError, SafelightError, UnavailableError
from safelight_server.latents import Snapshot
from safelight_server.outage import Outage, no_runtime
from safelight_server.runtime.base import Component, Fault, FloatArray, Runtime, RuntimeFailure
from safelight_server.sampler import SamplerTable
from safelight_server.scheduler import (
    Batch,
    Decoded,
    Event,
    Expired,
    Failed,
    Kind,
    Limits,
    Output,
    Priority,
    Released,
    Scheduler,
    Stepped,
)
from safelight_server.telemetry import Metrics

log = structlog.get_logger(__name__)

MAX_ATTEMPTS = 3
"""Failures of batches that an output survives."""
MAX_INSTANCES_LOST = 16
"""Instances in a row that may be lost under an output: what comes after is likely to be its own doing."""

COMPONENTS = {
    Kind.ENCODE: Component.TEXT_ENCODER,
    Kind.DENOISE: Component.DENOISER,
    Kind.DECODE: Component.DECODER,
}


class OutputListener(Protocol):
    """Hears what becomes of one output. Called on the event loop; must not block or raise."""

    def started(self) -> None:
        """Its first denoiser batch is on its way."""

    def computed(self, seconds: float, rows: int) -> None:
        """It was in a batch: its share of the time, and denoiser rows."""

    def stepped(self, step: int, batch_size: int) -> None:
        """`step` steps are made; the last call was shared by `batch_size` outputs."""

    def wants_frame(self, step: int) -> bool:
        """Whether someone would take a preview of this step: only then is `frame` called."""

    def frame(self, step: int, denoised: FloatArray) -> None:
        """The denoised estimate (C, h, w) after `step` steps; the listener's own copy."""

    def decoded(self, image: FloatArray) -> None:
        """The finished picture (3, H, W) in [-1, 1], unclamped. The output has ended."""

    def failed(self, error: SafelightError) -> None:
        """The output has ended without a picture."""

    def expired(self) -> None:
        """Its deadline has passed. The output has ended without a picture."""


@dataclass(frozen=True, slots=True)
class Job:
    """One output to develop.

    Attributes:
        token_ids: of the prompt and, with guidance, of the negative prompt; each (T,).
        deadline: on the engine's clock.
        start: where it stopped, when it goes on after `suspend`.
    """

    output_id: int
    caller: str
    priority: Priority
    pipeline: Pipeline
    latent_shape: tuple[int, int, int]
    table: SamplerTable
    seed: int
    guidance_scale: float
    token_ids: tuple[tuple[int, ...], ...]
    deadline: float | None = None
    start: Snapshot | None = None


@dataclass(slots=True)
class _Entry:
    listener: OutputListener
    num_failures: int = 0
    num_lost: int = 0
    started: bool = False


class Engine:
    """Runs jobs to their pictures.

    Args:
        runtime: started.
        clock: monotonic seconds.
        max_running: outputs that take steps at once.
        preview_share: of instance time that previews may take from other work.
        runtime_wait_s: how long an output without a deadline waits while no instance is live.
        runtime_grace_s: how long new work is taken while no instance is live.
    """

    def __init__(
        self,
        runtime: Runtime,
        clock: Callable[[], float],
        metrics: Metrics,
        *,
        max_running: int,
        preview_share: float = 0.1,
        runtime_wait_s: float = 60.0,
        runtime_grace_s: float = 5.0,
    ) -> None:
        self._runtime = runtime
        self._clock = clock
        self._metrics = metrics
        self._batches = Batches(max_running * 2 + runtime.num_instances * 128)
        self._entries: dict[int, _Entry] = {}
        self._encoding_failures: defaultdict[str, int] = defaultdict(int)
        self._free = set(range(runtime.num_instances))
        self._tasks: set[asyncio.Task[None]] = set()
        self._expiry: asyncio.TimerHandle | None = None
        limits = Limits(max_running, self._max_rows, runtime.num_instances, preview_share)
        self.scheduler = Scheduler(limits, self)
        self.outage = Outage(clock, runtime_wait_s, runtime_grace_s, self._strand)
        runtime.watch(self._instances_changed)

    # --- what the scheduler asks ---

    def seconds(self, kind: Kind, key: str, rows: int) -> float:
        """The cost model: the runtime's measured curves."""
        at = self._batches.keys[key]
        return self._runtime.cost(at.pipeline.name, at.component).at(rows)

    def _max_rows(self, kind: Kind, key: str) -> int:
        at = self._batches.keys[key]
        return self._runtime.max_rows(at.pipeline.name, at.component)

    # --- what generations ask ---

    def submit(self, job: Job, listener: OutputListener) -> None:
        """Takes a job; it runs when the scheduler says so."""
        output = self.output(job)
        self._batches.token_ids.update(zip(output.conditioning, job.token_ids, strict=True))
        self._batches.flights[job.output_id] = Flight(
            job.pipeline,
            job.latent_shape,
            job.table,
            job.seed,
            job.guidance_scale,
            output.conditioning,
            job.start,
            output.first_step,
        )
        self._entries[job.output_id] = _Entry(listener)
        if job.deadline is None:
            self.outage.wait_for(job.output_id)
        self.scheduler.add(output, self._clock())
        self._pump()

    def output(self, job: Job) -> Output:
        """A job as the scheduler sees it."""
        key = self._batches.key
        keys = {kind: key(job.pipeline, part, job.latent_shape) for kind, part in COMPONENTS.items()}
        encoder = job.pipeline.manifest.components[Component.TEXT_ENCODER].sha256
        return Output(
            output_id=job.output_id,
            caller=job.caller,
            priority=job.priority,
            num_steps=job.table.num_steps,
            rows_per_step=len(job.token_ids),
            keys=keys,
            conditioning=tuple(f"{encoder}:{','.join(map(str, ids))}" for ids in job.token_ids),
            deadline=job.deadline,
            first_step=job.start.step if job.start else 0,
        )

    def cancel(self, output_id: int) -> None:
        """Ends an output: it is in no later batch. Unknown ids and those of ended outputs are ignored."""
        if output_id in self._entries:
            self._apply(self.scheduler.cancel(output_id))
            self._forget(output_id)
            self._pump()

    def suspend(self, output_id: int) -> Snapshot | None:
        """Ends an output like `cancel` and returns what it needs to go on; None if it has made no step."""
        if output_id not in self._entries:
            return None
        snapshot = self._batches.snapshot(output_id)
        self.cancel(output_id)
        return snapshot

    async def preview(self, output_id: int, denoised: FloatArray, component: Component) -> FloatArray | None:
        """Decodes a denoised latent (C, h, w) between the steps; the newest of an output wins.

        Returns:
            The image (3, H, W) in [-1, 1], unclamped; None when a newer preview took its place, it failed, or the
            output has ended.
        """
        flight = self._batches.flights.get(output_id)
        if flight is None:
            return None
        key = self._batches.key(flight.pipeline, component, flight.latent_shape)
        if (older := flight.previews.get(key)) is not None:
            older.image.set_result(None)
        pending = flight.previews[key] = Preview(denoised, asyncio.get_running_loop().create_future())
        self.scheduler.want_preview(output_id, key)
        self._pump()
        return await pending.image

    def load(self) -> float:
        """Running outputs for each live instance: 0 idle, 1 all busy, more share calls."""
        return self.scheduler.num_running / max(1, self._runtime.num_live)

    async def close(self) -> None:
        """Waits for the batches in flight."""
        self.outage.close()
        if self._expiry is not None:
            self._expiry.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)

    # --- the loop ---

    def _pump(self) -> None:
        now = self._clock()
        self._apply(self.scheduler.expire(now))
        self._dispatch(now)
        if self._expiry is not None:
            self._expiry.cancel()
        deadline = self.scheduler.next_deadline()
        later = asyncio.get_running_loop().call_later
        self._expiry = None if deadline is None else later(max(0.0, deadline - now) + 1e-4, self._pump)

    def _dispatch(self, now: float, *, full_only: bool = False) -> None:
        """Hands every free instance to the scheduler and starts the batches that it returns."""
        free = self._runtime.usable(self._free)
        if not free:
            return
        for batch in self.scheduler.schedule(now, free, full_only=full_only):
            self._free.remove(batch.instance)
            call = self._batches.gather(batch)
            if batch.kind is Kind.DENOISE:
                self._announce(batch)
            task = asyncio.create_task(self._run(batch, call))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _instances_changed(self) -> None:
        self.outage.changed(self._runtime.num_live)
        self._pump()

    def _strand(self, output_id: int) -> None:
        """Ends an output for which no instance came back."""
        self._apply(self.scheduler.cancel(output_id))
        self._forget(output_id).failed(no_runtime())

    def _announce(self, batch: Batch) -> None:
        for row in batch.rows:
            entry = self._entries[row.output_id]
            if not entry.started:
                entry.started = True
                entry.listener.started()

    async def _run(self, batch: Batch, call: Call) -> None:
        """One batch, from its inputs to the dispatch of those that it made possible."""
        began = self._clock()
        try:
            results = await self._runtime.run(batch.instance, call.key.pipeline.name, call.key.component, call.inputs)
        except RuntimeFailure as failure:
            self._free.add(batch.instance)
            self._batches.returned(batch, call)
            self._batches.lost(call)
            self._fail(batch, failure)
            self._pump()
            return
        returned = self._clock()
        self._free.add(batch.instance)
        self._dispatch(returned, full_only=True)  # what fills a batch without these outputs need not wait for them
        overlapped = batch.instance not in self._free
        self._batches.returned(batch, call)
        self._batches.keep(batch, call, results)
        self._account(batch, returned - began)
        self._apply(self.scheduler.complete(batch.batch_id), call.num_outputs)
        if not overlapped:
            self._metrics.critical_seconds.inc(self._clock() - returned)
        self._pump()

    def _account(self, batch: Batch, seconds: float) -> None:
        self._metrics.batch(batch.kind.value, len(batch.rows), seconds)
        shares: dict[int, int] = defaultdict(int)
        for row in batch.rows:
            shares[row.output_id] += 1
        for output_id, rows in shares.items():
            if (entry := self._entries.get(output_id)) is not None:
                entry.num_lost = 0
                steps = rows if batch.kind is Kind.DENOISE else 0
                entry.listener.computed(seconds * rows / len(batch.rows), steps)

    def _fail(self, batch: Batch, failure: RuntimeFailure) -> None:
        log.warning("batch_failed", kind=batch.kind.value, key=batch.key, rows=len(batch.rows), error=str(failure))
        retryable = failure.retryable and self._may_run_again(batch, failure.fault)
        error = UnavailableError("the runtime failed; try again", reason="RUNTIME_FAILED", retry_after_s=1.0)
        self._apply(
            self.scheduler.fail(batch.batch_id, retryable), error=error if failure.retryable else InternalError()
        )

    def _may_run_again(self, batch: Batch, fault: Fault) -> bool:
        if fault is Fault.NOBODY:
            return True
        return self._may_try_again(batch) if fault is Fault.ROWS else self._may_go_elsewhere(batch)

    def _may_go_elsewhere(self, batch: Batch) -> bool:
        """Counts lost instances; a batch that comes back begins the count anew."""
        entries = [self._entries[i] for i in {row.output_id for row in batch.rows} if i in self._entries]
        for entry in entries:
            entry.num_lost += 1
        return all(entry.num_lost < MAX_INSTANCES_LOST for entry in entries)

    def _may_try_again(self, batch: Batch) -> bool:
        """Counts the failure against what the batch was for: prompts, outputs, or nothing for previews."""
        numbers = []
        for row in batch.rows:
            if batch.kind is Kind.ENCODE:
                self._encoding_failures[row.conditioning_id] += 1
                numbers.append(self._encoding_failures[row.conditioning_id])
        for entry in (self._entries[i] for i in {row.output_id for row in batch.rows} if i in self._entries):
            if batch.kind is not Kind.PREVIEW:
                entry.num_failures += 1
                numbers.append(entry.num_failures)
        if max(numbers, default=0) < MAX_ATTEMPTS:
            return True
        for row in batch.rows:
            self._encoding_failures.pop(row.conditioning_id, None)
        return False

    def _apply(self, events: Sequence[Event], batch_size: int = 0, error: SafelightError | None = None) -> None:
        """Carries out what became true."""
        stepped = [event for event in events if isinstance(event, Stepped)]
        if stepped:
            self._advance(stepped, batch_size)
        for event in events:
            match event:
                case Released():
                    self._batches.release(event.conditioning_id)
                    self._encoding_failures.pop(event.conditioning_id, None)
                case Decoded():
                    image = self._batches.flights[event.output_id].image
                    assert image is not None
                    self._forget(event.output_id).decoded(image)
                case Failed():
                    self._forget(event.output_id).failed(error or InternalError())
                case Expired():
                    listener = self._forget(event.output_id)
                    if self.outage.is_on:
                        listener.failed(no_runtime())
                    else:
                        listener.expired()

    def _advance(self, stepped: Sequence[Stepped], batch_size: int) -> None:
        began = self._clock()
        broken = self._batches.advance([event.output_id for event in stepped])
        self._metrics.sampler_seconds.inc(self._clock() - began)
        for event in stepped:
            listener = self._entries[event.output_id].listener
            if event.output_id in broken:
                log.error("latent_not_finite", output_id=event.output_id, step=event.step)
                self._apply(self.scheduler.cancel(event.output_id))
                self._forget(event.output_id).failed(InternalError())
                continue
            listener.stepped(event.step, batch_size)
            if not event.last and listener.wants_frame(event.step):
                listener.frame(event.step, self._batches.denoised(event.output_id))

    def _forget(self, output_id: int) -> OutputListener:
        self._batches.forget(output_id)
        self.outage.forget(output_id)
        return self._entries.pop(output_id).listener
