"""Forms batches: chooses the ready queue that is served next, and how many of its rows one instance takes.

The queue whose first member became ready longest ago is served first. This one
rule orders encoding, steps and decoding, and is fair across keys. Previews run
when nothing else is ready, or out of a share of instance time that other work
earns for them.

A batch of steps takes its instance's share of all rows that are denoising, not
all rows that are ready: otherwise instances drift into one huge and one tiny
batch. With fewer outputs than instances, the two rows of a step (conditional
and unconditional) are split over idle instances if the cost curve says that
this finishes sooner.
"""

from __future__ import annotations

import math

from safelight_server.scheduler.lives import Lives
from safelight_server.scheduler.ready import Queue, ReadyQueues
from safelight_server.scheduler.types import CostModel, Kind, Limits, Row

MAX_CREDIT = 10
"""The preview credit is capped at so many times the seconds of the call that earned it last."""


class Batching:
    """Forms batches from the ready queues.

    Attributes:
        num_instances: live instances.
    """

    def __init__(self, limits: Limits, cost: CostModel, lives: Lives, ready: ReadyQueues) -> None:
        self.num_instances = limits.num_instances
        self._limits = limits
        self._cost = cost
        self._lives = lives
        self._ready = ready
        self._preview_credit_s = 0.0

    def next(self, num_free: int, full_only: bool) -> tuple[Queue, tuple[Row, ...]] | None:
        """Takes the rows of the next batch out of their queue.

        Args:
            num_free: idle instances, including the one that this batch is for.
            full_only: form a batch only of steps, and only if waiting would not make it larger.

        Returns:
            The queue and the rows; None if there is nothing to run.
        """
        queue = self._next_queue(full_only)
        if queue is None:
            return None
        rows = self._take(queue, num_free)
        self._charge(queue, len(rows))
        return queue, rows

    def _next_queue(self, full_only: bool) -> Queue | None:
        work = [queue for queue in self._ready if queue[0] is not Kind.PREVIEW]
        oldest = min(work, key=self._ready.turn, default=None)
        if full_only:  # a younger line may not overtake, however full
            return oldest if oldest is not None and self._fills_a_batch(oldest) else None
        previews = [queue for queue in self._ready if queue[0] is Kind.PREVIEW]
        if previews:
            preview = min(previews, key=self._ready.turn)
            if oldest is None or self._preview_credit_s >= self._preview_s(preview):
                return preview
        return oldest

    def _fills_a_batch(self, queue: Queue) -> bool:
        """Whether waiting for steps that are in flight would not make this batch of steps larger."""
        if queue[0] is not Kind.DENOISE:
            return False
        tally, num_ready = self._lives.denoising(queue[1]), self._ready.count(queue)
        if num_ready * tally.num_rows >= self._limits.max_rows(*queue) * tally.num_outputs:
            return True
        share = math.ceil(tally.num_outputs / self.num_instances)
        return num_ready >= share and 2 * num_ready > tally.num_outputs

    def _preview_s(self, queue: Queue) -> float:
        rows = min(self._ready.count(queue), self._limits.max_rows(*queue))
        return self._cost.seconds(queue[0], queue[1], rows)

    def _charge(self, queue: Queue, num_rows: int) -> None:
        """Books a batch on the preview credit (seconds): other work adds its share, previews spend, never below 0."""
        seconds = self._cost.seconds(queue[0], queue[1], num_rows)
        if queue[0] is Kind.PREVIEW:
            self._preview_credit_s = max(0.0, self._preview_credit_s - seconds)
        else:
            share = self._limits.preview_share
            earned = self._preview_credit_s + seconds * share / (1 - share)
            self._preview_credit_s = min(earned, MAX_CREDIT * seconds)

    def _take(self, queue: Queue, num_free: int) -> tuple[Row, ...]:
        kind, key = queue
        limit = self._limits.max_rows(kind, key)
        members = self._ready.together(queue, limit)
        if kind is Kind.DENOISE:
            return self._take_steps(queue, members, *self._share(key, num_free, limit), limit)
        rows = []
        for member in members:
            self._ready.discard(queue, member)
            if kind is Kind.ENCODE:
                rows.append(Row(-1, conditioning_id=str(member)))
                continue
            if kind is Kind.PREVIEW:
                self._lives.preview_taken(int(member), key)
                rows.append(Row(int(member)))
                continue
            life = self._lives.of[int(member)]
            life.todo.clear()
            life.in_flight.add(0)
            rows.append(Row(int(member), life.step))
        return tuple(rows)

    def _take_steps(
        self, queue: Queue, members: list[int | str], share: int, whole: bool, limit: int
    ) -> tuple[Row, ...]:
        """Rows of the next steps of `members`, in order, up to `share` rows; `whole`: all rows of a step or none."""
        rows: list[Row] = []
        for member in members:
            output_id = int(member)
            life = self._lives.of[output_id]
            if rows and len(rows) + (len(life.todo) if whole else 1) > share:
                break
            parts = life.todo[: max(1, min(len(life.todo), (limit if whole else share) - len(rows)))]
            life.todo = life.todo[len(parts) :]
            life.in_flight.update(parts)
            rows += [Row(output_id, life.step, part) for part in parts]
            if not life.todo:
                self._ready.discard(queue, output_id)
            if len(rows) >= share:
                break
        return tuple(rows)

    def _share(self, key: str, num_free: int, limit: int) -> tuple[int, bool]:
        """Rows for one instance, and whether all rows of an output's step go into the same batch."""
        tally = self._lives.denoising(key)
        outputs, rows = tally.num_outputs, tally.num_rows
        instances = self.num_instances
        if outputs >= instances:
            per_output = math.ceil(rows / outputs)
            return max(per_output, min(limit, math.ceil(outputs / instances) * per_output)), limit >= per_output
        split = math.ceil(rows / instances)
        gains = self._cost.seconds(Kind.DENOISE, key, split) < self._cost.seconds(Kind.DENOISE, key, min(rows, limit))
        if num_free > 1 and gains:
            return min(limit, split), False
        return min(limit, rows), limit >= 2
