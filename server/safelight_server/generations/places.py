"""Tells generations that wait their place in the line, and when they should start."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from safelight_server.domain.events import GenerationState, Queued
from safelight_server.generations.generation import Generation
from safelight_server.scheduler import Priority, Scheduler


def tell_places(scheduler: Scheduler, generations: Iterable[Generation]) -> None:
    """Publishes `Queued` on those that wait. A start is expected at the pace of all that is here."""
    if not scheduler.num_waiting():
        return
    places = {
        output_id: place for priority in Priority for place, output_id in enumerate(scheduler.waiting_order(priority))
    }
    pace = scheduler.backlog_s() / max(1, scheduler.num_outputs)
    now = datetime.now(UTC)
    for generation in generations:
        mine = [places[output_id] for output_id in generation.output_ids if output_id in places]
        if generation.state is GenerationState.QUEUED and mine:
            generation.log.publish(Queued(min(mine), now + timedelta(seconds=min(mine) * pace)))
