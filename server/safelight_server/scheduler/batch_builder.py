"""Forms batches: chooses the ready queue that is served next, and how many of its rows one instance takes.

The class that has had the least instance time for its weight is served first
(start-time fair queueing; Goyal, Vin & Cheng 1996). INTERACTIVE may be ahead of
its weight by a few calls (the "warp" of Duda & Cheriton 1999), so that encoding,
first step and first preview follow each other. Within a class it is the
queue whose first member became ready longest ago. This one rule orders
encoding, steps and decoding, and is fair across keys. Previews run when nothing
else of their class or a higher one is ready, or out of a share of instance time
that other work earns for them.

Rows of other classes fill up a batch: those of higher classes as far as there is
room, those of lower classes only until the call takes twice as long. So a
batch is as large as it can be at little cost, and an interactive step next to
any amount of other work takes at most twice as long as it does alone.

A batch of steps takes its instance's share of all rows that are denoising, not
all rows that are ready: otherwise instances drift into one huge and one tiny
batch. With fewer outputs than instances, the two rows of a step (conditional
and unconditional) are split over idle instances if the cost curve says that
this finishes sooner.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

from safelight_server.scheduler.output_table import OutputTable
from safelight_server.scheduler.ready import Queue, ReadyQueues
from safelight_server.scheduler.types import WEIGHTS, CostModel, Kind, Limits, Member, Priority, Row
from safelight_server.scheduler.waiting import WaitingQueue

MAX_CREDIT = 10
"""The preview credit is capped at so many times the seconds of the call that earned it last."""
HEAD_START_CALLS = 4
"""How many of the longest calls INTERACTIVE may be ahead of its weight: encoding, step and preview of a newcomer."""
MAX_STRETCH = 2.0
"""Rows of lower classes may make a call so many times as long as it would be without them."""


class BatchBuilder:
    """Forms batches from the ready queues.

    Attributes:
        num_instances: live instances.
    """

    def __init__(
        self, limits: Limits, cost: CostModel, table: OutputTable, ready: ReadyQueues, waiting: WaitingQueue
    ) -> None:
        self.num_instances = limits.num_instances
        self._limits = limits
        self._cost = cost
        self._table = table
        self._ready = ready
        self._waiting = waiting
        self._preview_credit_s = 0.0
        self._passes = dict.fromkeys(Priority, 0.0)
        self._virtual_time = 0.0  # the least pass of those classes that had work, when last one was chosen
        self._longest_s = 0.0
        self._classes: set[Priority] = set()

    def next(self, num_free: int, full_only: bool) -> tuple[Queue, tuple[Row, ...]] | None:
        """Takes the rows of the next batch out of their queues.

        Args:
            num_free: idle instances, including the one that this batch is for.
            full_only: form a batch only of steps, and only if waiting would not make it larger.

        Returns:
            The queue that is served, and the rows, its own first; None if there is nothing to run.
        """
        queue = self._next_queue(full_only)
        if queue is None:
            return None
        rows, num_own = self._take(queue, num_free)
        self._charge(queue, len(rows), num_own)
        return queue, rows

    def _next_queue(self, full_only: bool) -> Queue | None:
        work = [queue for queue in self._ready if queue.kind is not Kind.PREVIEW]
        previews = [] if full_only else [queue for queue in self._ready if queue.kind is Kind.PREVIEW]
        for priority in self._by_turn({queue.priority for queue in (*work, *previews)}):
            oldest = min((queue for queue in work if queue.priority is priority), key=self._ready.turn, default=None)
            if full_only:  # a younger queue may not overtake, however full it is
                return oldest if oldest is not None and self._fills_a_batch(oldest) else None
            mine = [queue for queue in previews if queue.priority is priority]
            if mine:
                preview = min(mine, key=self._ready.turn)
                has_rival = any(queue.priority <= priority for queue in work)
                if not has_rival or self._preview_credit_s >= self._preview_s(preview):
                    return preview
            if oldest is not None:
                return oldest
        return None

    def _by_turn(self, classes: set[Priority]) -> list[Priority]:
        """Classes in the order in which they are served. A class that had nothing ready has earned no advantage."""
        for priority in classes - self._classes:
            self._passes[priority] = max(self._passes[priority], self._virtual_time)
        self._classes = classes
        self._virtual_time = min((self._passes[priority] for priority in classes), default=self._virtual_time)
        ahead = HEAD_START_CALLS * self._longest_s / WEIGHTS[Priority.INTERACTIVE]
        start = {Priority.INTERACTIVE: -ahead}
        return sorted(classes, key=lambda priority: (self._passes[priority] + start.get(priority, 0.0), priority))

    def _fills_a_batch(self, queue: Queue) -> bool:
        """Whether waiting for steps that are in flight would not make this batch of steps larger.

        Nor may it keep the instance from a higher class, whose next rows may be about to become ready.
        """
        if queue.kind is not Kind.DENOISE:
            return False
        if any(self._waiting.count(one) or self._table.num_running(one) for one in Priority if one < queue.priority):
            return False
        tally, num_ready = self._table.denoising(queue.key), self._ready.count(queue)
        if num_ready * tally.num_rows >= self._limits.max_rows(queue.kind, queue.key) * tally.num_outputs:
            return True
        share = math.ceil(tally.num_outputs / self.num_instances)
        return num_ready >= share and 2 * num_ready > tally.num_outputs

    def _preview_s(self, queue: Queue) -> float:
        rows = min(self._ready.count(queue), self._limits.max_rows(queue.kind, queue.key))
        return self._cost.seconds(queue.kind, queue.key, rows)

    def _charge(self, queue: Queue, num_rows: int, num_own: int) -> None:
        """Charges a batch to its class for that class's own rows; rows of other classes that fill it up are free.

        Other work than previews adds its share to the preview credit (seconds), previews spend it, never below 0.
        """
        seconds = self._cost.seconds(queue.kind, queue.key, num_rows)
        own = seconds if num_own == num_rows else self._cost.seconds(queue.kind, queue.key, num_own)
        self._longest_s = max(self._longest_s, own)
        self._passes[queue.priority] += own / WEIGHTS[queue.priority]
        if queue.kind is Kind.PREVIEW:
            self._preview_credit_s = max(0.0, self._preview_credit_s - seconds)
        else:
            share = self._limits.preview_share
            earned = self._preview_credit_s + seconds * share / (1 - share)
            self._preview_credit_s = min(earned, MAX_CREDIT * seconds)

    def _take(self, queue: Queue, num_free: int) -> tuple[tuple[Row, ...], int]:
        """Takes the rows of a batch out of the queues. Returns them and how many of them are the queue's own."""
        limit = self._limits.max_rows(queue.kind, queue.key)
        share, whole = limit, True
        if queue.kind is Kind.DENOISE:
            share, whole = self._share(queue.key, num_free, limit)
        alone = self._ready.suspected(queue)
        rows = self._take_from(queue, [], share, whole, limit)
        num_own = len(rows)
        if alone or num_own >= share:
            return tuple(rows), num_own
        for other in sorted(Priority):
            beside = queue._replace(priority=other)
            if other is queue.priority or not self._ready.count(beside) or self._ready.suspected(beside):
                continue
            if other > queue.priority:
                share = min(share, self._stretched(queue, len(rows), share))
            rows += self._take_from(beside, rows, share, whole, limit)
        return tuple(rows), num_own

    def _stretched(self, queue: Queue, num_rows: int, limit: int) -> int:
        """The most rows, from `num_rows` to `limit`, with which a call takes at most `MAX_STRETCH` times as long."""
        longest_s = MAX_STRETCH * self._cost.seconds(queue.kind, queue.key, num_rows)
        sizes = range(num_rows, limit + 1)
        fitting = bisect.bisect_right(sizes, longest_s, key=lambda n: self._cost.seconds(queue.kind, queue.key, n))
        return num_rows + max(0, fitting - 1)

    def _take_from(self, queue: Queue, before: Sequence[Row], share: int, whole: bool, limit: int) -> list[Row]:
        """Rows of a queue for a batch that holds the rows `before` already."""
        room = (share if queue.kind is Kind.DENOISE else min(share, limit)) - len(before)
        if room <= 0:
            return []
        members = self._ready.together(queue, limit)
        if queue.kind is Kind.DENOISE:
            return self._take_steps(queue, members, before, share, whole, limit)
        return [self._take_one(queue, member) for member in members[:room]]

    def _take_one(self, queue: Queue, member: Member) -> Row:
        self._ready.discard(queue, member)
        if queue.kind is Kind.ENCODE:
            return Row(-1, conditioning_id=str(member))
        output_id = int(member)
        if queue.kind is Kind.PREVIEW:
            self._table.preview_taken(output_id, queue.key)
            return Row(output_id)
        entry = self._table.of[output_id]
        entry.todo.clear()
        entry.in_flight.add(0)
        return Row(output_id, entry.step)

    def _take_steps(
        self, queue: Queue, members: list[Member], before: Sequence[Row], share: int, whole: bool, limit: int
    ) -> list[Row]:
        """Rows of the next steps of `members`, in order, up to `share` rows; `whole`: all rows of a step or none."""
        rows: list[Row] = []
        for member in members:
            output_id, taken = int(member), len(before) + len(rows)
            entry = self._table.of[output_id]
            if taken and taken + (len(entry.todo) if whole else 1) > share:
                break
            parts = entry.todo[: max(1, min(len(entry.todo), (limit if whole else share) - taken))]
            entry.todo = entry.todo[len(parts) :]
            entry.in_flight.update(parts)
            rows += [Row(output_id, entry.step, part) for part in parts]
            if not entry.todo:
                self._ready.discard(queue, output_id)
            if len(before) + len(rows) >= share:
                break
        return rows

    def _share(self, key: str, num_free: int, limit: int) -> tuple[int, bool]:
        """Rows for one instance, and whether all rows of an output's step go into the same batch."""
        tally = self._table.denoising(key)
        outputs, rows = tally.num_outputs, tally.num_rows
        instances = self.num_instances
        if outputs >= instances:
            per_output = math.ceil(rows / outputs)  # where some have one row and others two, counted as two
            share = math.ceil(rows / (instances * per_output)) * per_output
            return max(per_output, min(limit, share)), limit >= per_output
        split = math.ceil(rows / instances)
        gains = self._cost.seconds(Kind.DENOISE, key, split) < self._cost.seconds(Kind.DENOISE, key, min(rows, limit))
        if num_free > 1 and gains:
            return min(limit, split), False
        return min(limit, rows), limit >= 2
