"""Takes turns at sending: in one turn of the event loop only a few streams hand a message to gRPC, tenant by tenant.

A message costs the loop about 0.1 ms. Where 63 streams watch fast steps, all of
them have one to send in every turn, and whatever else happens on the loop, such
as the first preview of a neighbour, would wait for all of those again and again.
Streams that wait for their turn get fewer and newer previews.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque

PER_TURN = 2
"""Messages in one turn of the loop. Record 0005 has what other numbers cost."""


class SendTurns:
    """The turns of all streams of a server. One alone never waits.

    Args:
        per_turn: messages that may be sent in one turn of the loop.
    """

    def __init__(self, per_turn: int = PER_TURN) -> None:
        self._per_turn = per_turn
        self._left = per_turn
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # by tenant; the next is first
        self._will_turn = False

    async def take(self, tenant: str) -> None:
        """Waits until a stream of a tenant may send a message."""
        if self._left and not self._waiting:
            self._left -= 1
            self._turn_soon()
            return
        mine = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(mine)
        self._turn_soon()
        await mine

    def _turn_soon(self) -> None:
        if not self._will_turn:
            self._will_turn = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._will_turn = False
        self._left = self._per_turn
        while self._left and self._waiting:
            tenant, line = self._waiting.popitem(last=False)
            mine = line.popleft()
            if line:
                self._waiting[tenant] = line  # behind the other tenants
            if not mine.done():  # else its client has left
                mine.set_result(None)
                self._left -= 1
        if self._left < self._per_turn:
            self._turn_soon()
