"""The loop around the scheduler: schedule → runtime → complete, on every instance of the runtime.

Owns the tensors of all outputs in flight (`latents.py`) and the tasks that run
batches. It never decides who is next: `scheduler` does. It never knows what a
generation is: it reports to an `OutputListener` per output.

Invariants: an instance runs one batch at a time; an output that was cancelled,
suspended or expired is in no later batch and its slot is free as soon as no
batch in flight reads it; every output that was submitted ends in exactly one
of `decoded`, `failed`, `expired`, or in `cancel` or `suspend` by the caller.

Runs on one event loop and takes no locks. Work between a batch's return and
the next dispatch is the critical path: its share is reported.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import structlog

from safelight_server.catalog import Pipeline
from safelight_server.errors import InternalError, SafelightError, UnavailableError
from safelight_server.latents import Latents, Slots, Snapshot
from safelight_server.pipeline import decoder_latent
from safelight_server.runtime.base import Array, Component, FloatArray, Runtime, RuntimeFailure
from safelight_server.sampler import SamplerTable
from safelight_server.scheduler import (
    Batch,
    Decoded,
    Encoded,
    Event,
    Failed,
    Kind,
    Limits,
    Output,
    Previewed,
    Priority,
    Released,
    Row,
    Scheduler,
    Stepped,
)
from safelight_server.telemetry import EngineMetrics

log = structlog.get_logger(__name__)

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
        """`rows` of it were in a batch; `seconds` is its share of the batch's run time."""

    def stepped(self, step: int, batch_size: int) -> None:
        """`step` steps are made; the last was shared by `batch_size` outputs."""

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
    deadline: float | None
    listener: OutputListener
    start: Snapshot | None = None


@dataclass(slots=True)
class _Running:
    job: Job
    keys: dict[Kind, str]
    conditioning: tuple[str, ...]
    step: int
    slot: int | None = None
    num_failures: int = 0
    previews: dict[str, _PendingPreview] = field(default_factory=dict)


@dataclass(slots=True)
class _PendingPreview:
    latent: FloatArray
    image: asyncio.Future[FloatArray | None]


@dataclass(frozen=True, slots=True)
class _Key:
    """What a scheduler key stands for."""

    pipeline: Pipeline
    component: Component
    latent_shape: tuple[int, int, int]

    def __str__(self) -> str:
        return f"{self.pipeline.name}/{self.component}/{'x'.join(map(str, self.latent_shape))}"


class Engine:
    """Runs jobs to their pictures.

    Args:
        runtime: started.
        clock: monotonic seconds.
        max_running: outputs that hold latents.
        max_attempts: tries of a batch whose failure is retryable, per output and step.
    """

    def __init__(
        self,
        runtime: Runtime,
        clock: Callable[[], float],
        metrics: EngineMetrics,
        *,
        max_running: int,
        max_attempts: int = 3,
    ) -> None:
        self._runtime = runtime
        self._clock = clock
        self._metrics = metrics
        self._max_running = max_running
        self._max_attempts = max_attempts
        self._keys: dict[str, _Key] = {}
        self._latents: dict[str, Latents] = {}
        self._outputs: dict[int, _Running] = {}
        self._token_ids: dict[str, tuple[int, ...]] = {}
        self._embeddings: dict[str, FloatArray] = {}
        self._free = set(range(runtime.num_instances))
        self._tasks: set[asyncio.Task[None]] = set()
        self._expiry: asyncio.TimerHandle | None = None
        self._busy_s = 0.0
        self.scheduler = Scheduler(
            Limits(max_running=max_running, max_rows=self._max_rows, num_instances=runtime.num_instances), self
        )

    # --- what the scheduler asks ---

    def seconds(self, kind: Kind, key: str, rows: int) -> float:
        """The scheduler's cost model: the runtime's measured curves."""
        at = self._keys[key]
        return self._runtime.cost(at.pipeline.name, at.component).at(rows)

    def _max_rows(self, kind: Kind, key: str) -> int:
        at = self._keys[key]
        return self._runtime.max_rows(at.pipeline.name, at.component)

    # --- what generations ask ---

    def submit(self, job: Job) -> None:
        """Takes a job; it runs when the scheduler says so."""
        keys = self.keys(job.pipeline, job.latent_shape)
        encoder = str(keys[Kind.ENCODE])
        conditioning = tuple(f"{encoder}:{','.join(map(str, ids))}" for ids in job.token_ids)
        self._token_ids.update(zip(conditioning, job.token_ids, strict=True))
        first_step = job.start.step if job.start else 0
        self._outputs[job.output_id] = _Running(job, keys, conditioning, first_step)
        self.scheduler.add(
            Output(
                output_id=job.output_id,
                caller=job.caller,
                priority=job.priority,
                num_steps=job.table.num_steps,
                rows_per_step=len(job.token_ids),
                keys=keys,
                conditioning=conditioning,
                deadline=job.deadline,
                first_step=first_step,
            ),
            self._clock(),
        )
        self._pump()

    def cancel(self, output_id: int) -> None:
        """Ends an output: it is in no later batch. Unknown and ended ids are ignored."""
        if output_id in self._outputs:
            self._apply(self.scheduler.cancel(output_id))
            self._forget(output_id)
            self._pump()

    def suspend(self, output_id: int) -> Snapshot | None:
        """Ends an output like `cancel` and returns what it needs to go on; None if it has not started."""
        running = self._outputs.get(output_id)
        if running is None:
            return None
        snapshot = running.job.start
        if running.slot is not None:
            snapshot = self._latents[running.keys[Kind.DENOISE]].snapshot(running.slot, running.step)
        self.cancel(output_id)
        return snapshot

    def set_priority(self, output_id: int, priority: Priority) -> None:
        """Changes the class of an output from the next batch on."""
        if output_id in self._outputs:
            self.scheduler.set_priority(output_id, priority)

    async def preview(self, output_id: int, denoised: FloatArray, component: Component) -> FloatArray | None:
        """Decodes a denoised latent (C, h, w) between the steps; newest wins.

        Returns:
            The image (3, H, W) in [-1, 1], unclamped, or None when a newer preview took its place, it failed, or the
            output ended first.
        """
        running = self._outputs.get(output_id)
        if running is None:
            return None
        key = self._key(running.job.pipeline, component, running.job.latent_shape)
        if (older := running.previews.pop(key, None)) is not None:
            older.image.set_result(None)
        pending = _PendingPreview(denoised, asyncio.get_running_loop().create_future())
        running.previews[key] = pending
        self.scheduler.want_preview(output_id, key, self._clock())
        self._pump()
        return await pending.image

    def load(self) -> float:
        """Work ahead of the instances in units of what they do side by side: 0 idle, 1 all busy, more queued."""
        busy = self._runtime.num_instances - len(self._free)
        return max(busy, self.scheduler.num_active) / self._runtime.num_instances

    def keys(self, pipeline: Pipeline, latent_shape: tuple[int, int, int]) -> dict[Kind, str]:
        """The scheduler's batch keys of a pipeline at a latent shape, by kind."""
        keys = {kind: self._key(pipeline, component, latent_shape) for kind, component in COMPONENTS.items()}
        return keys

    async def close(self) -> None:
        """Waits for the batches in flight. Outputs that are left stay where they are."""
        if self._expiry is not None:
            self._expiry.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- the loop ---

    def _pump(self) -> None:
        """Hands the scheduler every free instance and starts the batches that it returns."""
        now = self._clock()
        for event in self.scheduler.expire(now):
            running = self._outputs[event.output_id]
            self._forget(event.output_id)
            running.job.listener.expired()
        self._dispatch(now)
        self._watch_deadlines(now)

    def _dispatch(self, now: float, *, full_only: bool = False) -> None:
        if not self._free:
            return
        for batch in self.scheduler.schedule(now, sorted(self._free), full_only=full_only):
            self._free.remove(batch.instance)
            task = asyncio.create_task(self._run(batch), name=f"batch-{batch.batch_id}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _watch_deadlines(self, now: float) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        deadline = self.scheduler.next_deadline()
        if deadline is not None:
            self._expiry = asyncio.get_running_loop().call_later(max(0.0, deadline - now), self._pump)

    async def _run(self, batch: Batch) -> None:
        """One batch from its inputs to the next dispatch."""
        call = _RUNS[batch.kind](self, batch)
        started = self._clock()
        try:
            results = await self._runtime.run(batch.instance, call.model, call.component, call.inputs)
        except RuntimeFailure as failure:
            call.returned()
            self._failed(batch, failure)
            self._free.add(batch.instance)
            self._pump()
            return
        returned = self._clock()
        self._account(batch, returned - started)
        self._free.add(batch.instance)
        self._dispatch(returned, full_only=True)  # what fills a batch without these outputs need not wait for them
        call.returned()
        call.keep(results)
        self._apply(self.scheduler.complete(batch.batch_id, returned), call.batch_size)
        self._metrics.critical_path(self._clock() - returned)
        self._pump()

    def _account(self, batch: Batch, seconds: float) -> None:
        self._busy_s += seconds
        self._metrics.batch(batch.kind.name, len(batch.rows), seconds)
        shares: dict[int, int] = defaultdict(int)
        for row in batch.rows:
            if row.output_id >= 0:
                shares[row.output_id] += 1
        for output_id, rows in shares.items():
            if (running := self._outputs.get(output_id)) is not None:
                running.job.listener.computed(
                    seconds * rows / len(batch.rows), rows if batch.kind is Kind.DENOISE else 0
                )

    def _failed(self, batch: Batch, failure: RuntimeFailure) -> None:
        log.warning("batch_failed", kind=batch.kind.name, key=batch.key, error=str(failure), rows=len(batch.rows))
        retryable = failure.retryable
        for output_id in {row.output_id for row in batch.rows}:
            if (running := self._outputs.get(output_id)) is not None and batch.kind is not Kind.PREVIEW:
                running.num_failures += 1
                retryable = retryable and running.num_failures < self._max_attempts
        self._apply(self.scheduler.fail(batch.batch_id, retryable, self._clock()), retryable=failure.retryable)

    def _apply(self, events: Sequence[Event], batch_size: int = 0, retryable: bool = False) -> None:
        """Carries out what became true."""
        stepped = [event for event in events if isinstance(event, Stepped)]
        if stepped:
            self._advance(stepped, batch_size)
        for event in events:
            match event:
                case Decoded(output_id) | Previewed(output_id):
                    pass  # `keep` has handed the images over
                case Released(conditioning_id):
                    self._token_ids.pop(conditioning_id, None)
                    self._embeddings.pop(conditioning_id, None)
                case Failed(output_id):
                    running = self._outputs[output_id]
                    self._forget(output_id)
                    running.job.listener.failed(
                        UnavailableError("the runtime failed; try again", reason="RUNTIME_FAILED")
                        if retryable
                        else InternalError()
                    )
                case Encoded() | Stepped():
                    pass
