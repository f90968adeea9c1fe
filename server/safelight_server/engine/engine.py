"""The loop around the scheduler: schedule → runtime → complete, on every instance of the runtime.

The engine decides nothing about order, which the scheduler does, and knows nothing
of generations: it reports to one `ExecutionObserver` per output. `batches.py` has the
tensors.

Invariants: an instance runs one batch at a time; an output that was cancelled,
suspended or has expired is in no later batch; a batch whose instance was lost
is run again elsewhere, from the same step; every output that was submitted
ends in exactly one of `decoded`, `failed`, `expired`, or by `cancel` or
`suspend`. Runs on one event loop and takes no locks; the work between a
batch's return and the next dispatch is the critical path and is counted. So
observers get their reports after the dispatch, while the next batch runs: in order,
and before the next step of any output is made.
"""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import Context
from typing import Any

import structlog

from safelight_server.catalog.pipeline import Pipeline
from safelight_server.domain.component import Component
from safelight_server.domain.errors import InternalError, SafelightError, UnavailableError
from safelight_server.domain.tensors import Embedding, FloatArray
from safelight_server.engine.batches import Batches, OutputTensors, PreparedCall
from safelight_server.engine.deferred import DeferredCallbacks
from safelight_server.engine.embeddings import EmbeddingWaiters
from safelight_server.engine.jobs import Job, prompt_name
from safelight_server.engine.latents import Snapshot
from safelight_server.engine.observer import ExecutionObserver
from safelight_server.engine.outage import Outage, no_runtime
from safelight_server.engine.retries import RetryCounter
from safelight_server.runtime.base import FaultOrigin, Runtime, RuntimeFailure
from safelight_server.scheduler import (
    Batch,
    EmbeddingReady,
    EmbeddingReleased,
    Event,
    Kind,
    Limits,
    OutputDecoded,
    OutputExpired,
    OutputFailed,
    Priority,
    ScheduledOutput,
    Scheduler,
    StepCompleted,
)
from safelight_server.telemetry import UNTRACED, Metrics, Tracing, tracing
from safelight_server.telemetry.trail import NO_CALL

log = structlog.get_logger(__name__)


LATE_S = 1e-4
"""Added to the time of an alarm, so that the deadline has passed when it rings, whatever the clocks' resolution."""


class Alarm:
    """A timer for the next deadline. Moving it to a later time is cheap, as the running timer is kept.

    Args:
        ring: called at the time that was set, or earlier if that was moved to a later time; it must call `set` again.
    """

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._timer: asyncio.Handle | None = None
        self._at = 0.0

    def set(self, in_s: float | None) -> None:
        """Rings in `in_s` seconds at the latest; None changes nothing."""
        if in_s is None:
            return
        loop = asyncio.get_running_loop()
        at = loop.time() + max(0.0, in_s) + LATE_S
        if self._timer is not None:
            if self._at <= at:
                return
            self._timer.cancel()
        self._timer, self._at = loop.call_at(at, self._rings), at  # uvloop's handles do not always know when

    def stop(self) -> None:
        """Stops the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _rings(self) -> None:
        self._timer = None
        self._ring()


class Engine:
    """Runs jobs to their pictures.

    Args:
        runtime: started.
        clock: monotonic seconds.
        max_running: outputs that take steps at once.
        max_parked: outputs that keep their latents while others have their slots.
        preview_share: share of instance time that previews may take from other work.
        runtime_wait_s: how long an output without a deadline waits while no instance is live.
        runtime_grace_s: how long new work is accepted while no instance is live.
    """

    def __init__(
        self,
        runtime: Runtime,
        clock: Callable[[], float],
        metrics: Metrics,
        *,
        max_running: int,
        max_parked: int = 256,
        preview_share: float = 0.1,
        runtime_wait_s: float = 60.0,
        runtime_grace_s: float = 5.0,
        tracer: Tracing = UNTRACED.tracing,
    ) -> None:
        self._runtime = runtime
        self._clock = clock
        self._metrics = metrics
        self._tracing = tracer
        self._batches = Batches(max_running * 2 + max_parked + runtime.num_instances * 128)
        self._observers: dict[int, ExecutionObserver] = {}
        self._followed: set[int] = set()
        self._unstarted: set[int] = set()
        self._attempts = RetryCounter()
        self._instances = frozenset(range(runtime.num_instances))
        self._busy: dict[int, int] = {}  # batches by the instance that runs them
        self._tasks: set[asyncio.Task[None]] = set()
        self._expiry = Alarm(self._pump)
        self._deferred = DeferredCallbacks()
        self._embedding_waiters = EmbeddingWaiters()
        limits = Limits(max_running, self._max_rows, runtime.num_instances, preview_share, max_parked)
        self.scheduler = Scheduler(limits, self)
        self.outage = Outage(clock, runtime_wait_s, runtime_grace_s, self._strand)
        runtime.watch(self._instances_changed)
        self._instances_changed()

    # --- called by the scheduler ---

    def seconds(self, kind: Kind, key: str, rows: int) -> float:
        """The cost model: the runtime's measured curves."""
        at = self._batches.keys[key]
        return self._runtime.cost(at.pipeline.name, at.component).at(rows)

    def _max_rows(self, kind: Kind, key: str) -> int:
        at = self._batches.keys[key]
        return self._runtime.max_rows(at.pipeline.name, at.component)

    @property
    def num_latents(self) -> int:
        """Slots of latents in use."""
        return self._batches.num_latents

    # --- called by executions ---

    def submit(self, job: Job, observer: ExecutionObserver) -> None:
        """Queues a job. The scheduler decides when it runs; `observer` gets its progress and its end."""
        output = self.output(job)
        inputs = job.encoder_inputs
        self._batches.encoder_inputs.update((needed, inputs[needed]) for needed in output.conditioning)
        self._batches.outputs[job.output_id] = OutputTensors(
            job.pipeline,
            job.latent_shape,
            job.table,
            job.seed,
            job.guidance_scale,
            job.conditioning,
            job.known,
            job.start,
            output.first_step,
            output.keys[Kind.DENOISE],
            job.image if job.encoded_image else None,
            guided_steps=job.guided_steps,
            guidance_rescale=job.guidance_rescale,
            adapters=job.adapters,
            controls=job.controls,
            image_prompt_scale=0.0 if job.image_prompt is None else job.image_prompt.scale,
            masked_image=job.image if job.encoded_masked_image else None,
        )
        self._observers[job.output_id] = observer
        self._unstarted.add(job.output_id)
        if job.deadline is None:
            self.outage.wait_for(job.output_id)
        self.scheduler.add(output, self._clock())
        self._pump()

    def output(self, job: Job) -> ScheduledOutput:
        """Converts a job to the scheduler's form."""
        return job.as_output(self._batches.key)

    def cancel(self, output_id: int) -> None:
        """Ends an output: it is in no later batch. Ids that are unknown, or of ended outputs, are ignored."""
        self._deferred.run()
        if output_id in self._observers:
            self._apply(self.scheduler.cancel(output_id))
            self._forget(output_id)
            self._pump()

    def reschedule(self, output_id: int, priority: Priority, deadline: float | None) -> None:
        """Changes the class and the deadline of an output. Unknown ids are ignored."""
        self.scheduler.set_priority(output_id, priority)
        self.scheduler.set_deadline(output_id, deadline)
        if deadline is None and output_id in self._observers:
            self.outage.wait_for(output_id)
        else:
            self.outage.forget(output_id)
        self._pump()

    def suspend(self, output_id: int) -> Snapshot | None:
        """Ends an output like `cancel`, and returns the state to continue from; None if it has made no step."""
        self._deferred.run()
        if output_id not in self._observers:
            return None
        snapshot = self._batches.snapshot(output_id)
        self.cancel(output_id)
        return snapshot

    async def preview(self, job: Job, denoised: FloatArray, component: Component) -> FloatArray | None:
        """Decodes a denoised latent (C, h, w) between the steps; the newest of a job wins.

        Returns:
            The image (3, H, W) in [-1, 1], unclamped; None if a newer preview replaced it, it failed, or the output has
            ended.
        """
        if job.output_id not in self._observers and job.output_id not in self._followed:
            return None
        key = self._batches.key(job.pipeline, component, job.latent_shape)
        image = self._batches.want_preview(job.output_id, key, denoised, tracing.current())
        self.scheduler.want_preview(job.output_id, key)
        self._pump()
        return await image

    def follow(self, output_id: int) -> None:
        """Lets `preview` decode latents of an output that another replica develops, until `unfollow`."""
        self._followed.add(output_id)

    def unfollow(self, output_id: int) -> None:
        """Ends `follow`; gives up the previews of the output that are not in a batch yet."""
        self._followed.remove(output_id)
        self.scheduler.drop_previews(output_id)
        self._batches.drop_previews(output_id)

    async def encode(self, pipeline: Pipeline, token_ids: Sequence[int]) -> Embedding:
        """The embedding of a prompt, encoded between the steps. Concurrent calls for the same prompt share it.

        Raises:
            UnavailableError: the runtime cannot encode it.
        """
        self.outage.check()  # otherwise prompts would pile up while no instance can encode them
        size = pipeline.manifest.sizes[0]
        key = self._batches.key(pipeline, Component.TEXT_ENCODER, pipeline.latent_shape(size.width_px, size.height_px))
        name = prompt_name(pipeline, token_ids)
        if name not in self._embedding_waiters:
            self._embedding_waiters.add(name)
            self.outage.wait_for(name)
            asyncio.get_running_loop().call_soon(self._want_embedding, name, tuple(token_ids), key)
        return await self._embedding_waiters.get(name)

    def _want_embedding(self, name: str, token_ids: tuple[int, ...], key: str) -> None:
        self._batches.encoder_inputs[name] = token_ids  # not earlier: another user of the prompt might have released it
        self._apply(self.scheduler.want_embedding(name, key))
        self._pump()

    def load(self) -> float:
        """Running outputs for each live instance: 0 idle, 1 all busy, more share calls."""
        return self.scheduler.num_running / max(1, self._runtime.num_live)

    async def close(self) -> None:
        """Stops the timers and waits for the batches in flight."""
        self.outage.close()
        self._expiry.stop()
        while self._tasks:
            await asyncio.wait(self._tasks)

    # --- the loop ---

    def _pump(self) -> None:
        now = self._clock()
        self._apply(self.scheduler.expire(now))
        self._dispatch(now)
        deadline = self.scheduler.next_deadline()
        self._expiry.set(None if deadline is None else deadline - now)
        self._deferred.run_soon()

    def _dispatch(self, now: float, *, full_only: bool = False) -> None:
        """Hands every free instance to the scheduler and starts the batches that it returns."""
        free = self._runtime.usable(self._instances - self._busy.keys())
        if not free and full_only:
            return
        for batch in self.scheduler.schedule(now, free, full_only=full_only):
            self._busy[batch.instance] = batch.batch_id
            try:
                self._begin(batch)
            except Exception:  # most likely there is no memory for its latents
                log.exception("bug", **_about(batch))
                asyncio.get_running_loop().call_soon(self._broke, batch)

    def _begin(self, batch: Batch) -> None:
        call = self._batches.gather(batch)
        spans = (
            self._batches.spans(batch, call, self._runtime.name, lambda at: self._observers[at].trails())
            if self._tracing.num_trails
            else NO_CALL
        )
        task = asyncio.create_task(self._run(batch, call, spans), context=Context())  # of no single request
        self._tasks.add(task)
        task.add_done_callback(functools.partial(self._ran, batch, call))
        if batch.kind is Kind.DENOISE:
            self._announce(batch)

    def _instances_changed(self) -> None:
        """Handles a changed number of live instances. Batches in flight on lost instances fail by themselves."""
        self.scheduler.set_instances(self._runtime.num_live)
        self.outage.changed(self._runtime.num_live)
        self._pump()

    def _strand(self, who: int | str) -> None:
        """Ends an output, or the wait for an embedding, for which no instance came back."""
        if isinstance(who, str):
            self._embedding_waiters.refuse(who, no_runtime())
            return
        self._apply(self.scheduler.cancel(who))
        self._deferred.defer(functools.partial(self._forget(who).failed, no_runtime()))
        self._pump()

    def _announce(self, batch: Batch) -> None:
        for row in batch.rows:
            if row.output_id in self._unstarted:
                self._unstarted.remove(row.output_id)
                self._deferred.defer(self._observers[row.output_id].started)

    async def _run(self, batch: Batch, call: PreparedCall, spans: AbstractContextManager[object]) -> None:
        """One batch, from its inputs to the dispatch of those that it made possible."""
        began, at = self._clock(), call.key
        try:
            with spans:
                results = await self._runtime.run(batch.instance, at.pipeline.name, at.component, call.inputs)
        except RuntimeFailure as failure:
            self._deferred.run()
            del self._busy[batch.instance]
            self._batches.returned(batch, call)
            self._batches.lost(call)
            self._fail(batch, failure)
            self._pump()
            return
        returned = self._clock()
        self._deferred.run()
        del self._busy[batch.instance]
        # Outputs that fill a batch without those of this one need not wait for its sampler step. Measured on the
        # simulated runtime (one instance, batches of 64, latents 4x64x64): without this the instance is idle for
        # 14 % of the time instead of 7 % with 128 and 192 outputs, and makes 7 and 6 % fewer steps a second.
        # After an ENCODE batch this is not done: its outputs are about to take their first step, and would wait for a
        # whole call of others. Measured: half of all first previews came 0.24 s later at 0.27 s a step.
        if batch.kind is not Kind.ENCODE:
            self._dispatch(returned, full_only=True)
        if overlapped := batch.instance in self._busy:
            await asyncio.sleep(0)  # the call that was just dispatched starts before the work on these results
        self._batches.returned(batch, call)
        self._batches.keep(batch, call, results)
        if batch.kind is Kind.ENCODE:
            self._report_embeddings(batch)
        self._account(batch, returned - began)
        self._attempts.succeeded(batch)
        self._apply(self.scheduler.complete(batch.batch_id), call.num_outputs)
        self._pump()
        if not overlapped:
            self._metrics.critical_seconds.inc(self._clock() - returned)

    def _ran(self, batch: Batch, call: PreparedCall, task: asyncio.Task[None]) -> None:
        """Called when the task of a batch has ended. A bug in it is logged and ends the outputs of the batch."""
        self._tasks.discard(task)
        if not task.cancelled() and (bug := task.exception()) is not None:
            log.error("bug", **_about(batch), exc_info=bug)
            self._broke(batch, call)

    def _broke(self, batch: Batch, call: PreparedCall | None = None) -> None:
        """Ends the outputs of a batch in which there was a bug, the runtime's or ours, and nothing else."""
        if self._busy.get(batch.instance) == batch.batch_id:
            del self._busy[batch.instance]
        if call is not None:
            self._batches.returned(batch, call)
            self._batches.lost(call)
        self._apply(self.scheduler.fail(batch.batch_id, batch.members))
        self._pump()

    def _account(self, batch: Batch, seconds: float) -> None:
        self._metrics.batch(batch.kind.value, len(batch.rows), seconds)
        for output_id, rows in Counter(row.output_id for row in batch.rows).items():
            if (observer := self._observers.get(output_id)) is not None:
                steps = rows if batch.kind is Kind.DENOISE else 0
                observer.computed(seconds * rows / len(batch.rows), steps)

    def _fail(self, batch: Batch, failure: RuntimeFailure) -> None:
        self._metrics.failed_call(batch.kind.value, failure.fault.value)
        log.warning("batch_failed", **_about(batch), error=str(failure))
        given_up = self._attempts.failed(batch, failure.fault, retryable=failure.retryable)
        error = UnavailableError("the runtime failed; try again", reason="RUNTIME_FAILED", retry_after_s=1.0)
        events = self.scheduler.fail(batch.batch_id, given_up, suspect=failure.fault is not FaultOrigin.NOBODY)
        self._apply(events, error=error if failure.retryable else InternalError())

    def _apply(self, events: Sequence[Event], batch_size: int = 0, error: SafelightError | None = None) -> None:
        """Carries out the scheduler's events, and defers the reports to the observers."""
        stepped = [event for event in events if isinstance(event, StepCompleted)]
        if stepped:
            self._advance(stepped, batch_size)
        for event in events:
            match event:
                case EmbeddingReady():
                    self._answer(event)
                case EmbeddingReleased():
                    self._batches.release(event.conditioning_id)
                    self._attempts.forget(event.conditioning_id)
                case OutputDecoded():
                    image = self._batches.outputs[event.output_id].image
                    assert image is not None
                    self._deferred.defer(functools.partial(self._forget(event.output_id).decoded, image))
                case OutputFailed():
                    self._deferred.defer(
                        functools.partial(self._forget(event.output_id).failed, error or InternalError())
                    )
                case OutputExpired():
                    observer = self._forget(event.output_id)
                    in_outage = functools.partial(observer.failed, no_runtime())
                    self._deferred.defer(in_outage if self.outage.is_on else observer.expired)

    def _answer(self, event: EmbeddingReady) -> None:
        """Answers the calls of `encode` for a prompt."""
        name = event.conditioning_id
        self.outage.forget(name)
        if name not in self._embedding_waiters:
            return  # no instance came in time
        if event.failed:
            error = UnavailableError("the prompt could not be encoded; try again", retry_after_s=1.0)
            self._embedding_waiters.refuse(name, error)
        else:
            self._embedding_waiters.answer(name, self._batches.embedding(name))

    def _advance(self, stepped: Sequence[StepCompleted], batch_size: int) -> None:
        began = self._clock()
        broken = self._batches.advance([event.output_id for event in stepped])
        self._metrics.sampler_seconds.inc(self._clock() - began)
        for event in stepped:
            if event.output_id in broken:
                log.error("latent_not_finite", output_id=event.output_id, step=event.step)
                self._apply(self.scheduler.cancel(event.output_id))
                self._deferred.defer(functools.partial(self._forget(event.output_id).failed, InternalError()))
        self._deferred.defer(functools.partial(self._report_steps, stepped, batch_size))

    def _forget(self, output_id: int) -> ExecutionObserver:
        self._batches.forget(output_id)
        self._attempts.forget(output_id)
        self.outage.forget(output_id)
        self._unstarted.discard(output_id)
        return self._observers.pop(output_id)

    # --- reports to observers ---

    def _report_steps(self, stepped: Sequence[StepCompleted], batch_size: int) -> None:
        for event in stepped:
            if (observer := self._observers.get(event.output_id)) is not None:  # otherwise it has ended since
                observer.stepped(event.step, batch_size)
                if event.step >= observer.next_due and not event.last:
                    observer.frame(event.step, self._batches.denoised(event.output_id))
                if not event.last and observer.wants_checkpoint(event.step):
                    snapshot = self._batches.snapshot(event.output_id)
                    assert snapshot is not None
                    observer.checkpoint(snapshot)

    def _report_embeddings(self, batch: Batch) -> None:
        encoded = {row.conditioning_id for row in batch.rows}
        for output_id, observer in self._observers.items():
            output = self._batches.outputs[output_id]
            for row, name in enumerate(output.conditioning):
                if name in encoded and name in self._batches.encoder_inputs:
                    embedding = self._batches.embedding(name)
                    self._deferred.defer(functools.partial(observer.encoded, row, embedding))


def _about(batch: Batch) -> dict[str, Any]:
    """The fields of log lines about a batch."""
    return {"kind": batch.kind.value, "key": batch.key, "rows": len(batch.rows)}
