"""Tells generations that wait in the queue their position, and when they are estimated to start."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from safelight_server.domain.events import GenerationState, Queued
from safelight_server.generations.generation import Generation
from safelight_server.scheduler import Priority, Scheduler


def publish_queue_positions(scheduler: Scheduler, generations: Iterable[Generation], now: float) -> None:
    """Publishes to each queued generation the position of its first output, and its estimated start.

    Args:
        now: Unix seconds.
    """
    if not scheduler.num_waiting():
        return
    positions = {
        output_id: position
        for priority in Priority
        for position, output_id in enumerate(scheduler.waiting_order(priority))
    }
    seconds_each = scheduler.backlog_s() / max(1, scheduler.num_outputs)  # at the pace of all that is here
    at = datetime.fromtimestamp(now, UTC)
    for generation in generations:
        first = min((positions[number] for number in generation.output_ids if number in positions), default=None)
        if generation.state is GenerationState.QUEUED and first is not None:
            generation.log.publish(Queued(first, at + timedelta(seconds=first * seconds_each)))
