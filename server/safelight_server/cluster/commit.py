"""Ends an execution that ran here: stores the picture, commits it with its bill, then hands it to the watchers.

Invariants: a picture is in a shared tier before it is committed; a result is
billed once; while Redis cannot be reached the watchers of this replica still get
the picture, and it is committed later or discarded.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

import structlog

from safelight_server.cluster.bills import BilledWork, sealed_bill
from safelight_server.cluster.leased_runners import ExecutionTicket, LeasedRunners
from safelight_server.coordination.base import CommitOutcome
from safelight_server.coordination.leadership import Leadership
from safelight_server.domain.picture import Pixels
from safelight_server.storage.base import StoreError

log = structlog.get_logger(__name__)

COMMIT_WAIT_S = 1.0
"""How long a finished picture waits for its commit before the watchers of this replica get it without."""
GIVE_UP_S = 120.0
"""How long a result is kept while Redis cannot be reached; then it is discarded and not billed."""
MAX_LATE = 256
"""Bound on the results that wait for Redis."""
RETRY_S = 0.5

KeepPicture = Callable[[Pixels, float], Awaitable[bool]]
"""Stores pixels where the ticket points, with their compute in seconds. Returns whether a shared tier has them."""


async def committed_picture(leased_runners: LeasedRunners, name: str) -> Pixels | None:
    """Returns the picture of a committed result, or None.

    A result whose picture is gone is removed, so that the picture is computed anew.

    Raises:
        StoreError: Redis does not answer.
    """
    result = await leased_runners.coordinator.result(name)
    if result is None:
        return None
    kept = await leased_runners.pictures.at(result.pointer, sure=True)
    if kept is None:
        await leased_runners.coordinator.forget(name, result)
        return None
    return kept[0]


async def commit_result(
    leased_runners: LeasedRunners,
    ticket: ExecutionTicket,
    keep: KeepPicture,
    pixels: Pixels,
    work: BilledWork,
    leader: Leadership | None,
) -> Pixels:
    """Commits a picture, in the background if that takes longer than `COMMIT_WAIT_S`.

    Returns:
        The picture that counts: that of another replica if it was committed first and this is known in time.
    """
    decided: asyncio.Future[Pixels | None] = asyncio.get_running_loop().create_future()
    leased_runners.start(_commit(leased_runners, ticket, keep, pixels, work, leader, decided))
    try:
        async with asyncio.timeout(COMMIT_WAIT_S):
            theirs = await asyncio.shield(decided)
    except TimeoutError:
        return pixels
    return pixels if theirs is None else theirs


async def _commit(
    leased_runners: LeasedRunners,
    ticket: ExecutionTicket,
    keep: KeepPicture,
    pixels: Pixels,
    work: BilledWork,
    leader: Leadership | None,
    decided: asyncio.Future[Pixels | None],
) -> None:
    """Commits, and sets `decided` to another replica's picture that counts, or to None if this one does or on delay.

    The holder of the lease may be dead, or an earlier attempt whose answer was lost. So this waits until there is a
    result or the lease is free. The bill is the same at each attempt: if the answer to a commit was lost and its
    result was removed since, the bill is not written again.
    """
    until, late, bill = time.monotonic() + GIVE_UP_S, False, sealed_bill(leased_runners.sealer, ticket, work)
    try:
        while time.monotonic() < until:
            with contextlib.suppress(StoreError):
                leader = leader or await Leadership.take(leased_runners.coordinator, ticket.name, leased_runners.ttl_s)
                if leader is not None and await keep(pixels, work.compute_s):
                    outcome = await leader.commit(ticket.pointer, bill, COMMIT_WAIT_S)
                    if outcome is CommitOutcome.COMMITTED:
                        return
                theirs = await committed_picture(leased_runners, ticket.name)
                if theirs is not None:  # another replica has committed before
                    _decide(decided, theirs)
                    return
            if not late and leased_runners.num_late >= MAX_LATE:
                break
            leased_runners.num_late += not late
            late = True
            _decide(decided, None)
            if leader is not None:  # without the lease, followers need not wait for this
                await leader.close()
                leader = None
            await asyncio.sleep(RETRY_S)
        log.warning("a result was not committed in time and is discarded", generation=ticket.generation)
    finally:
        leased_runners.num_late -= late
        _decide(decided, None)
        if leader is not None:
            await leader.close()


def _decide(decided: asyncio.Future[Pixels | None], pixels: Pixels | None) -> None:
    if not decided.done():
        decided.set_result(pixels)
