"""Which replica owns a generation: written down by its owner, shown by others, taken over when the owner is gone.

    enroll, record   before Accepted: the lease of its name, its request id, its record           (owner)
    settle, let_go   it has ended; or another replica has a stream and nobody watches it here     (owner)
    find, attend     shows a generation of another replica from its record and events             (mirror)
    adopt            the owner's lease has ended: the mirror becomes the owner             (mirror → owner)

Ownership follows the streams: a generation that waits for a stream is handed to
the replica that has one. Invariants: only the holder of the lease writes; the record
of a generation is in Redis before it is accepted as REPLICATED. Without Redis there is
no ownership to share, and this package is not used. `owners.py` has the owner's side,
`mirrors.py` that of other replicas, `context.py` what both use.
"""

from __future__ import annotations

import asyncio
import secrets

from safelight_server.generations.ownership.context import CANCEL, PRIORITY, WANT, ClusterContext, GenerationHost
from safelight_server.generations.ownership.mirrors import Mirrors
from safelight_server.generations.ownership.owners import Owners
from safelight_server.generations.planner import Planner

__all__ = ["CANCEL", "PRIORITY", "WANT", "ClusterContext", "GenerationHost", "Ownership"]


class Ownership:
    """Both sides for this replica. Run `mirrors.sweep` as a task."""

    def __init__(self, context: ClusterContext, host: GenerationHost, planner: Planner) -> None:
        replica_id = secrets.token_hex(8)
        self.bulletin = context.bulletin
        self.owners = Owners(context, host, planner, replica_id)
        self.mirrors = Mirrors(context, host, planner, self.owners, replica_id)
        self._tasks = context.tasks
        self.bulletin.subscribe(WANT, self.owners.hear_want)

    async def close(self) -> None:
        """Releases all owned generations and cancels the background tasks."""
        await self.owners.close()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
