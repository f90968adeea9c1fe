"""An execution: one output that is developed once for all identical requests for it (single flight).

An execution observes the engine and passes its reports on to its members, which are
outputs of generations. It runs while it has members, with their highest priority and
latest deadline. When the last member leaves, the execution stops after its step; it
goes on from there when a member comes back. Previews, pixels and encodings are made
once for all members. Invariants: a member gets no report after it left; work counts
for the oldest member that is still there, so that nothing counts twice.
"""

from __future__ import annotations

import asyncio
import itertools
import weakref
from collections.abc import Callable, Coroutine, Hashable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Protocol

import structlog

from safelight_server.catalog.pixels import NotFiniteError
from safelight_server.domain.component import Component
from safelight_server.domain.errors import InternalError, SafelightError
from safelight_server.domain.picture import FinishedPicture, Pixels
from safelight_server.domain.tensors import Embedding, FloatArray
from safelight_server.engine.engine import Engine
from safelight_server.engine.jobs import Job
from safelight_server.engine.latents import Snapshot
from safelight_server.engine.observer import ExecutionObserver
from safelight_server.preview import Decode, FrameFeed
from safelight_server.quality import DevelopmentSample, QualityProbe
from safelight_server.scheduler import Priority
from safelight_server.telemetry import Trail

log = structlog.get_logger(__name__)

_OUTPUT_IDS = itertools.count(1)


class Member(ExecutionObserver):
    """An output of a generation that takes part in an execution."""

    @property
    def priority(self) -> Priority:
        """The class of its generation."""
        raise NotImplementedError

    @property
    def deadline(self) -> float | None:
        """The deadline of its generation, on the engine's clock; None: it has no deadline."""
        raise NotImplementedError

    @property
    def trail(self) -> Trail | None:
        """Its part of the trace of its generation; None: the generation is not traced."""
        raise NotImplementedError

    def joined(self, step: int) -> None:
        """The member has joined after `step` steps were made."""

    def used(self, seconds: float, rows: int, steps: int, rows_skipped: int) -> None:
        """Adds compute that counts for this member and for no other.

        Args:
            rows_skipped: denoiser rows that the steps did not need, as they lie outside the guidance interval.
        """

    def developed(self, picture: FinishedPicture) -> None:
        """Takes the finished picture: the execution has ended."""


class Runner(Protocol):
    """What runs a job: the engine, or a leased runner, whose job another replica may run."""

    def submit(self, job: Job, observer: ExecutionObserver, /) -> None:
        """Takes a job."""

    def suspend(self, output_id: int) -> Snapshot | None:
        """Stops a job and returns the state to go on from; None if no step was made."""

    def reschedule(self, output_id: int, priority: Priority, deadline: float | None) -> None:
        """Changes the priority and the deadline of a job."""

    async def preview(self, job: Job, denoised: FloatArray, component: Component) -> FloatArray | None:
        """Decodes between the steps; None where there is no such preview."""

    def load(self) -> float:
        """How busy the instances are: 0 idle, 1 all busy."""


class Execution(ExecutionObserver):
    """One output that is developed, its members, and its results.

    Args:
        runner: runs the job.
        job: the work. The execution chooses its id, class and deadline.
        key: equal for identical outputs; None: no other output may join.
        recorder: keeps embeddings, checkpoints and the picture; None: nothing is kept.
        on_end: called once, when the execution will never run again.
        tasks: the set that holds the running tasks of all executions, which convert and keep pictures.
        sample: measures what the picture looks like; None: it is not sampled.
    """

    def __init__(
        self,
        job: Job,
        runner: Runner,
        pool: Executor,
        key: Hashable,
        recorder: ExecutionObserver | None,
        on_end: Callable[[Execution], None],
        tasks: set[asyncio.Task[None]],
        sample: DevelopmentSample | None = None,
    ) -> None:
        self.key = key
        self.step = job.first_step
        seen = None if sample is None else sample.preview
        composite = None if job.image is None or job.image.mask is None else job.image.finish
        self.feed = FrameFeed(job.pipeline, _decoding(weakref.ref(self)), runner.load, pool, seen, composite)
        self.job = job
        self._runner = runner
        self._pool = pool
        self._recorder = recorder or ExecutionObserver()
        self._on_end = on_end
        self._tasks = tasks
        self._sample = sample
        self.compute_s = 0.0
        self._members: list[Member] = []
        self._num_away = 0
        self._running = False
        self._started = False
        self._ended = False
        self._snapshot: Snapshot | None = job.start
        self._outcome: FinishedPicture | SafelightError | None = None
        self._finishing = False

    # --- members ---

    def join(self, member: Member, *, again: bool = False) -> None:
        """Adds a member and reports to it what has happened so far; `again`: it left with `back` and returns."""
        self._num_away -= again
        if isinstance(self._outcome, SafelightError):
            member.failed(self._outcome)
            return
        if self._started:
            member.started()
        if self.step:
            member.joined(self.step)
        if self._outcome is not None:
            member.developed(self._outcome)
            return
        self._members.append(member)
        if self._running:
            self._reschedule()
        elif not self._finishing:
            self._submit()

    def leave(self, member: Member, *, back: bool = False) -> None:
        """Removes a member; `back`: it may return, so the state after the last step is kept for it."""
        if self._running and self._members == [member]:
            snapshot = self._runner.suspend(self.job.output_id)  # may first report a step, or the end of the job
            if self._running:
                self._snapshot, self._running = snapshot, False
        if member in self._members:
            self._members.remove(member)
        self._num_away += back
        if self._members:
            self._reschedule()
        elif not self._num_away and not self._finishing:
            self._end()

    def give_up(self) -> None:
        """Drops what is kept for a member that left with `back` and will not return."""
        self._num_away -= 1
        if not self._members and not self._num_away and not self._finishing:
            self._end()

    def reschedule(self) -> None:
        """Takes over the changed priority or deadline of a member."""
        if self._running:
            self._reschedule()

    def _submit(self) -> None:
        self.job = replace(
            self.job,
            output_id=next(_OUTPUT_IDS),
            priority=self._priority(),
            deadline=self._deadline(),
            start=self._snapshot,
        )
        self._running = True
        self._runner.submit(self.job, self)

    def _reschedule(self) -> None:
        if self._running:
            self._runner.reschedule(self.job.output_id, self._priority(), self._deadline())

    def _priority(self) -> Priority:
        return min(member.priority for member in self._members)

    def _deadline(self) -> float | None:
        deadlines = [member.deadline for member in self._members]
        known = [deadline for deadline in deadlines if deadline is not None]
        return max(known) if len(known) == len(deadlines) else None

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._on_end(self)

    async def preview(self, denoised: FloatArray, component: Component) -> FloatArray | None:
        """Decodes between the steps; None where there is no such preview."""
        return await self._runner.preview(self.job, denoised, component)

    # --- as the observer of the engine ---

    def trails(self) -> Sequence[Trail]:
        """The traces of all members that are traced."""
        return [member.trail for member in self._members if member.trail is not None]

    def started(self) -> None:
        """Reports to all members that the first batch is in flight."""
        self._started = True
        for member in list(self._members):
            member.started()

    def computed(self, seconds: float, rows: int) -> None:
        """Counts the compute for the member that came first, so that nothing counts twice."""
        self.compute_s += seconds
        self._members[0].used(seconds, rows, 0, 0)

    def stepped(self, step: int, batch_size: int) -> None:
        """Reports a step to all members. It counts for the first member only."""
        self.step = step
        self._members[0].used(0.0, 0, 1, self.job.num_rows_skipped(range(step - 1, step)))
        for member in list(self._members):
            member.stepped(step, batch_size)

    @property
    def next_due(self) -> float:
        """The first step whose frame a stream of a member needs."""
        return self.feed.next_due

    def frame(self, step: int, denoised: FloatArray) -> None:
        """Hands a frame to the feed, from which the streams of all members pull."""
        self.feed.frame(step, denoised)

    def wants_checkpoint(self, step: int) -> bool:
        """Whether the recorder keeps the state after this step."""
        return self._recorder.wants_checkpoint(step)

    def checkpoint(self, snapshot: Snapshot) -> None:
        """Gives the recorder the state after a step."""
        self._recorder.checkpoint(snapshot)

    def encoded(self, row: int, embedding: Embedding) -> None:
        """Gives the recorder an embedding."""
        self._recorder.encoded(row, embedding)

    def heard(self, step: int, batch_size: int, denoised: FloatArray | None) -> None:
        """Reports steps that another replica has made. They count for no member."""
        if not self._started:
            self.started()
        self.step = step
        for member in list(self._members):
            member.stepped(step, batch_size)
        if denoised is not None and step >= self.next_due:
            self.frame(step, denoised)

    def found(self, pixels: Pixels) -> None:
        """Gives the finished picture to all members, whichever replica developed it."""
        if self._outcome is None and not self._ended:
            self._running = False
            self._run_task(self._publish(pixels))

    def decoded(self, image: FloatArray) -> None:
        """Converts the image to pixels in a thread, then gives the finished picture to all members."""
        self._running = False
        self._run_task(self._finish(image))

    def _run_task(self, work: Coroutine[None, None, None]) -> None:
        self._finishing = True
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    async def _finish(self, image: FloatArray) -> None:
        try:
            pixels = await asyncio.get_running_loop().run_in_executor(self._pool, self.job.finish, image)
        except NotFiniteError:
            log.error("image_not_finite", output_id=self.job.output_id)
            self.failed(InternalError())
        else:
            if self._sample is not None:
                self._sample.finish(pixels)
            await self._publish(pixels)

    async def _publish(self, pixels: Pixels) -> None:
        self._outcome = picture = FinishedPicture(pixels, self._pool)
        members, self._members = self._members, []
        for member in members:
            member.developed(picture)
        await self._recorder.keep(picture, self.compute_s)
        self._end()

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            log.error("bug", exc_info=fault)
            if self._outcome is None:
                self.failed(InternalError())
            self._end()

    def failed(self, error: SafelightError) -> None:
        """Ends the execution without a picture, and reports the error to all members."""
        self._running = False
        self._outcome = error
        self._end()
        members, self._members = self._members, []
        for member in members:
            member.failed(error)

    def expired(self) -> None:
        """Ends the execution, since the latest deadline has passed, and reports that to all members."""
        self._running = False
        self._end()
        members, self._members = self._members, []
        for member in members:
            member.expired()


def _decoding(execution: weakref.ref[Execution]) -> Decode:
    """The decoder of an execution's feed.

    It has a weak reference: in a reference cycle the pixels would stay until the garbage collector runs.
    """

    async def decode(denoised: FloatArray, component: Component) -> FloatArray | None:
        running = execution()
        return None if running is None else await running.preview(denoised, component)

    return decode


class Executions:
    """The executions that identical outputs can join, by key (single flight)."""

    def __init__(self, engine: Engine, pool: Executor, probe: QualityProbe | None = None) -> None:
        self._engine = engine
        self._pool = pool
        self._probe = probe
        self._by_key: dict[Hashable, Execution] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._by_key)

    @property
    def num_ending(self) -> int:
        """Executions whose pixels are computed and whose picture is not yet made and kept."""
        return len(self._tasks)

    def find(self, key: Hashable) -> Execution | None:
        """The execution of a key, if one is under way; None for the key None."""
        return None if key is None else self._by_key.get(key)

    def create(
        self,
        job: Job,
        key: Hashable,
        recorder: ExecutionObserver | None = None,
        runner: Runner | None = None,
        prompt: str = "",
    ) -> Execution:
        """Makes a new execution, which does not run before a member joins.

        Args:
            key: identical outputs find the execution by it once it is published; None: no other output finds it.
            recorder: keeps embeddings, checkpoints and the picture for later; None: nothing is kept.
            runner: runs the job; None: the engine.
            prompt: the words of the request, for the measures of its picture.
        """
        sample = None
        if self._probe is not None:
            sample = self._probe.begin(job.pipeline.name, job.table.num_steps, (job.seed, job.token_ids), prompt)
        return Execution(job, runner or self._engine, self._pool, key, recorder, self._forget, self._tasks, sample)

    def publish(self, execution: Execution) -> None:
        """Lets identical outputs find an execution until it has ended."""
        if execution.key is not None:
            self._by_key[execution.key] = execution

    async def close(self) -> None:
        """Waits until all finished pictures are stored."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _forget(self, execution: Execution) -> None:
        if execution.key is not None and self._by_key.get(execution.key) is execution:
            del self._by_key[execution.key]
