"""Suspended generations: each has lost its last stream, and is cancelled unless a new stream comes within its grace."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from safelight_server.domain.errors import GenerationCancelledError
from safelight_server.domain.events import GenerationState
from safelight_server.generations.generation import DECIDE_RETRY_S, Generation
from safelight_server.generations.tenant_shares import TenantShares


class SuspendedGenerations:
    """Suspended generations by id, the oldest first. Invariant: each has a running timer.

    Args:
        max_entries: bound on their number; one more cancels the oldest of the tenant that has most.
    """

    def __init__(self, max_entries: int) -> None:
        self._shares: TenantShares[str] = TenantShares(max_entries)
        self._waiting: dict[str, tuple[Generation, asyncio.TimerHandle]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[str]:
        return iter(self._waiting)

    def suspend(self, generation: Generation) -> None:
        """Stops a generation until `resume`, and cancels it after its grace. Its own timer may end it earlier."""
        generation.suspend()
        if generation.ended:
            return  # suspending made an execution report what had just ended it
        grace_s = generation.request.disconnect.resume_grace_s
        self._abandon_in(grace_s, generation)
        if (beyond := self._shares.take_beyond()) is not None:
            self.abandon(self._waiting[beyond][0], "too many generations of its tenant have lost their last stream")

    def _abandon_in(self, seconds: float, generation: Generation) -> None:
        timer = asyncio.get_running_loop().call_later(seconds, self.abandon, generation)
        self._waiting[generation.identifier] = (generation, timer)
        self._shares.add(generation.caller.tenant, generation.identifier)

    def abandon(self, generation: Generation, why: str = "its last stream was lost and not resumed in time") -> None:
        """Cancels a generation. While another replica may own it, this is tried again after `DECIDE_RETRY_S`."""
        if generation.state is not GenerationState.SUSPENDED:
            return
        if not generation.may_decide:  # this process may have been frozen while another replica took it over
            self.forget(generation)
            self._abandon_in(DECIDE_RETRY_S, generation)
            return
        generation.stop(GenerationCancelledError(why))

    def by_tenant(self) -> dict[str, list[Generation]]:
        """The generations of each tenant, the oldest first."""
        held: dict[str, list[Generation]] = {}
        for generation, _ in self._waiting.values():
            held.setdefault(generation.caller.tenant, []).append(generation)
        return held

    def resume(self, generation: Generation) -> None:
        """Resumes a generation, since a stream has come."""
        self.forget(generation)
        generation.resume()

    def forget(self, generation: Generation) -> None:
        """Removes a generation and stops its timer. Unknown generations are ignored."""
        known, timer = self._waiting.get(generation.identifier, (None, None))
        if known is generation and timer is not None:
            self._shares.remove(generation.caller.tenant, generation.identifier)
            timer.cancel()
            del self._waiting[generation.identifier]
