"""Estimates of how long work will take, from the measured cost curves; for admission and queue position reports."""

from __future__ import annotations

import math

from safelight_server.scheduler.lives import Lives
from safelight_server.scheduler.types import CostModel, Kind, Limits, ScheduledOutput

NO_INSTANCE_S = 86_400.0
"""The estimate while no instance is live: a day, which stands for "nobody knows" and still fits a message."""


class Estimates:
    """Estimates under the present load, in seconds; later arrivals are not foreseen."""

    def __init__(self, limits: Limits, cost: CostModel, lives: Lives) -> None:
        self._limits = limits
        self._cost = cost
        self._lives = lives

    def backlog_s(self, num_instances: int) -> float:
        """Seconds that all instances need for the steps left of all outputs, in batches of as many as have slots."""
        if not num_instances:
            return NO_INSTANCE_S if self._lives.of else 0.0
        together = min(self._limits.max_running, len(self._lives.of))
        seconds = 0.0
        for life in self._lives.of.values():
            steps = life.output.num_steps - life.step
            seconds += self._work_s(life.output, steps, math.ceil(together * life.output.rows_per_step / num_instances))
        return seconds / num_instances

    def estimate_s(self, output: ScheduledOutput, num_outputs: int, num_instances: int) -> float:
        """Seconds until `num_outputs` outputs like this one, if added now, would be finished."""
        if not num_instances:
            return NO_INSTANCE_S
        keys, max_running = output.keys, self._limits.max_running
        together = min(num_outputs, max_running)
        tally = self._lives.denoising(keys[Kind.DENOISE])
        outputs = tally.num_outputs + together
        spread = min(num_instances, outputs if outputs > 1 else output.rows_per_step)
        batch = max(1, math.ceil((tally.num_rows + together * output.rows_per_step) / spread))
        turns = math.ceil(batch / self._limits.max_rows(Kind.DENOISE, keys[Kind.DENOISE]))
        step_s = turns * self._cost.seconds(Kind.DENOISE, keys[Kind.DENOISE], math.ceil(batch / turns))
        own = (output.num_steps - output.first_step) * step_s
        own += self._cost.seconds(Kind.DECODE, keys[Kind.DECODE], math.ceil(together / num_instances))
        own += self._cost.seconds(Kind.ENCODE, keys[Kind.ENCODE], len(output.conditioning))
        own *= math.ceil(num_outputs / max_running)
        fits = len(self._lives.of) + together <= max_running
        return own + (0.0 if fits else self.backlog_s(num_instances))

    def _work_s(self, output: ScheduledOutput, steps: int, share: int) -> float:
        """Seconds of one instance for `steps` steps of an output, in calls of `share` rows, at most `max_rows`."""
        key = output.keys[Kind.DENOISE]
        rows = max(1, min(self._limits.max_rows(Kind.DENOISE, key), share))
        return steps * output.rows_per_step * self._cost.seconds(Kind.DENOISE, key, rows) / rows
