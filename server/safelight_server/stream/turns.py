"""Limits sending: in one iteration of the event loop only a few streams hand a message to gRPC, tenant by tenant.

A message costs the loop about 0.1 ms. When 63 streams watch fast steps, all of them
have a message to send in every iteration. All other work on the loop, such as the
first preview of another client, would wait for all of those messages again and again.
Streams that wait for their turn get fewer and newer previews.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque

PER_TURN = 2
"""Messages in one iteration of the loop. Decision record 0005 has measurements of other values."""


class SendTurns:
    """Shares sending among all streams of a server. A single stream never waits.

    Args:
        per_turn: messages that may be sent in one iteration of the loop.
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
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        self._turn_soon()
        await turn

    def _turn_soon(self) -> None:
        if not self._will_turn:
            self._will_turn = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._will_turn = False
        self._left = self._per_turn
        while self._left and self._waiting:
            tenant, queue = self._waiting.popitem(last=False)
            turn = queue.popleft()
            if queue:
                self._waiting[tenant] = queue  # behind the other tenants
            if not turn.done():  # otherwise its client has left
                turn.set_result(None)
                self._left -= 1
        if self._left < self._per_turn:
            self._turn_soon()
