"""Whether there is room and time for a request. It only bounds; the scheduler orders. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from safelight_server.errors import DeadlineUnreachableError, QueueFullError
from safelight_server.scheduler import Output, Priority, Scheduler


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Outputs that may wait, by class and by caller."""

    max_waiting: Mapping[Priority, int]
    max_waiting_per_caller: int


def admit(
    scheduler: Scheduler, limits: AdmissionLimits, output: Output, num_outputs: int, time_left_s: float | None
) -> float:
    """Lets `num_outputs` outputs like `output` in, or raises.

    Returns:
        Seconds until they are expected to be finished.

    Raises:
        QueueFullError: no room; with the time in which the real backlog makes some.
        DeadlineUnreachableError: they cannot be finished in `time_left_s`.
    """
    estimate = scheduler.estimate_s(output)
    if time_left_s is not None and estimate > time_left_s:
        raise DeadlineUnreachableError(
            f"about {estimate:.2f} s are needed, the deadline leaves {max(0.0, time_left_s):.2f} s",
            metadata={"needed_s": f"{estimate:.3f}", "available_s": f"{max(0.0, time_left_s):.3f}"},
        )
    for bound, waiting, most in (
        (f"class {output.priority.name}", scheduler.num_waiting(output.priority), limits.max_waiting[output.priority]),
        (f"caller {output.caller}", scheduler.num_waiting_of(output.caller), limits.max_waiting_per_caller),
    ):
        if waiting + num_outputs > most:
            drained = scheduler.backlog_s() * num_outputs / max(1, scheduler.num_outputs)
            raise QueueFullError(
                f"{waiting} of {most} outputs of {bound} wait already",
                metadata={"bound": bound, "waiting": str(waiting), "limit": str(most)},
                retry_after_s=max(0.1, math.ceil(drained * 10) / 10),
            )
    return estimate
