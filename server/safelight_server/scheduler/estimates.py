"""Estimates of how long work will take, from the measured cost curves; for admission and queue position reports."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

from safelight_server.scheduler.batch_builder import MAX_STRETCH
from safelight_server.scheduler.output_table import Denoising, OutputEntry, OutputTable
from safelight_server.scheduler.slots import entitlements
from safelight_server.scheduler.types import WEIGHTS, CostModel, Kind, Limits, Priority, ScheduledOutput

NO_INSTANCE_S = 86_400.0
"""The estimate while no instance is live: a day, which stands for "unknown" and still fits a Duration."""


class Estimates:
    """Estimates under the present load, in seconds; later arrivals are not foreseen."""

    def __init__(self, limits: Limits, cost: CostModel, table: OutputTable) -> None:
        self._limits = limits
        self._cost = cost
        self._table = table

    def backlog_s(self, num_instances: int) -> float:
        """Seconds that all instances need for the steps left of all outputs, in batches of as many as have slots."""
        return self._left_s(self._table.of.values(), num_instances)

    def estimate_s(self, output: ScheduledOutput, num_outputs: int, num_instances: int) -> float:
        """Seconds until `num_outputs` outputs like this one, if added now, would be finished.

        Only what its caller has left in its class comes first. Other callers of the class take their equal parts of the
        slots, other classes their weight of instance time, a higher one no more than it has left.
        """
        if not num_instances:
            return NO_INSTANCE_S
        keys, priority = output.keys, output.priority
        entries = self._table.of.values()
        classes = {one: [entry for entry in entries if entry.priority is one] for one in Priority}
        higher = [one for one in Priority if one < priority and classes[one]]
        lower = [one for one in Priority if one > priority and classes[one]]

        wanted = {one: len(classes[one]) for one in Priority}
        wanted[priority] += num_outputs
        slots = max(1, entitlements(wanted, self._limits.max_running)[priority])
        callers = {entry.output.caller for entry in classes[priority]} | {output.caller}
        own_slots = max(1, slots // len(callers))
        own = [entry for entry in classes[priority] if entry.output.caller == output.caller]
        together = min(num_outputs, own_slots)

        all_beside, own_beside = (self._table.denoising(keys[Kind.DENOISE], one) for one in (None, priority))
        seconds = 0.0
        for num_rows, num_steps in output.steps_by_rows(output.first_step):
            joint_s = self._step_s(output, num_rows, together, all_beside, num_instances)
            own_s = self._step_s(output, num_rows, together, own_beside, num_instances)
            seconds += num_steps * min(joint_s, own_s * (MAX_STRETCH if lower else 1.0))
        seconds += self._cost.seconds(Kind.DECODE, keys[Kind.DECODE], math.ceil(together / num_instances))
        for key, count in self._encodings(output).items():
            seconds += self._cost.seconds(Kind.ENCODE, key, count)
        seconds *= math.ceil(num_outputs / own_slots) * math.ceil(len(callers) / slots)
        if len(own) + num_outputs > own_slots:
            seconds += min(
                self._left_s(own, num_instances) * len(callers), self._left_s(classes[priority], num_instances)
            )
        seconds *= 1 + sum(WEIGHTS[one] for one in lower) / WEIGHTS[priority]
        ahead = (entry for one in higher for entry in classes[one])
        share_of_higher = seconds * sum(WEIGHTS[one] for one in higher) / WEIGHTS[priority]
        return seconds + min(share_of_higher, self._left_s(ahead, num_instances))

    def compute_s(self, output: ScheduledOutput, step: int = 0) -> float:
        """Seconds of one instance, in full batches, for an output's prompts, its steps after `step`, and its decoding.

        What a loaded server spends on it: `num_instances` such seconds are done in a second.
        """
        calls = {
            (Kind.DENOISE, output.keys[Kind.DENOISE]): sum(math.prod(pair) for pair in output.steps_by_rows(step)),
            (Kind.DECODE, output.keys[Kind.DECODE]): 1,
        }
        if step == output.first_step:
            calls |= {(Kind.ENCODE, key): count for key, count in self._encodings(output).items()}
        seconds = 0.0
        for (kind, key), num_rows in calls.items():
            full = max(1, self._limits.max_rows(kind, key))
            seconds += num_rows * self._cost.seconds(kind, key, full) / full
        return seconds

    @staticmethod
    def _encodings(output: ScheduledOutput) -> Counter[str]:
        """How many embeddings an output needs under each batch key."""
        return Counter(map(output.encoder_key, output.conditioning))

    def left_by_class_s(self) -> Mapping[Priority, float]:
        """Seconds of one instance, in full batches, for what is left of all outputs, by class."""
        left = dict.fromkeys(Priority, 0.0)
        for entry in self._table.of.values():
            left[entry.priority] += self.compute_s(entry.output, entry.step)
        return left

    def left_due_s(self, output_ids: Iterable[int]) -> float:
        """Seconds of one instance, in full batches, for what is left of some outputs."""
        entries = map(self._table.of.__getitem__, output_ids)
        return sum(self.compute_s(entry.output, entry.step) for entry in entries)

    def _left_s(self, entries: Iterable[OutputEntry], num_instances: int) -> float:
        """Seconds that all instances need for the steps left of some outputs."""
        entries = list(entries)
        if not num_instances:
            return NO_INSTANCE_S if entries else 0.0
        together = min(self._limits.max_running, len(self._table.of))
        seconds = 0.0
        for entry in entries:
            for num_rows, num_steps in entry.output.steps_by_rows(entry.step):
                share = math.ceil(together * num_rows / num_instances)
                seconds += self._work_s(entry.output, num_steps * num_rows, share)
        return seconds / num_instances

    def _step_s(
        self, output: ScheduledOutput, num_rows: int, together: int, beside: Denoising, num_instances: int
    ) -> float:
        """Seconds, over all instances, of a step of so many outputs like this one and of those `beside` them.

        Args:
            num_rows: the rows of a step of each output.
        """
        key = output.keys[Kind.DENOISE]
        outputs = beside.num_outputs + together
        spread = min(num_instances, outputs if outputs > 1 else num_rows)
        batch = max(1, math.ceil((beside.num_rows + together * num_rows) / spread))
        turns = math.ceil(batch / self._limits.max_rows(Kind.DENOISE, key))
        return turns * self._cost.seconds(Kind.DENOISE, key, math.ceil(batch / turns))

    def _work_s(self, output: ScheduledOutput, num_rows: int, share: int) -> float:
        """Seconds of one instance for `num_rows` rows of an output, in calls of `share` rows, at most `max_rows`."""
        key = output.keys[Kind.DENOISE]
        rows = max(1, min(self._limits.max_rows(Kind.DENOISE, key), share))
        return num_rows * self._cost.seconds(Kind.DENOISE, key, rows) / rows
