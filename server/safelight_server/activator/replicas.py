"""The replicas that take calls now, each with a gRPC channel and a pool of HTTP connections that all calls share.

Invariants: calls use the connections that are there, so a call costs no handshake; a replica whose address has gone
gets no new calls, and its connections are closed when its last call has ended.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from safelight_server.activator.connector import Connector
from safelight_server.activator.fleet import Fleet

LOOK_EVERY_S = 0.05


class Replica:
    """A replica and the connections to it.

    Attributes:
        address: HOST:PORT of its gRPC.
        num_calls: calls that it answers now, of those that came through here.
        turn: a number that grows with each call, of the newest one that it got.
        certificates: those with which its connections were made.
    """

    def __init__(self, address: str, connector: Connector) -> None:
        self.address = address
        self.certificates = connector.certificates
        self.channel = connector.channel(address)
        self.http = connector.http()
        self.num_calls = 0
        self.turn = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def takes_calls(self) -> bool:
        """Whether it is connected and says that it serves. Connects if it is not."""
        return self.channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY

    @contextmanager
    def call(self) -> Iterator[None]:
        """Counts a call while the block runs."""
        self.num_calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.num_calls -= 1
            if not self.num_calls:
                self._idle.set()

    async def close(self) -> None:
        """Closes the connections, which ends the calls on them."""
        await self.channel.close()
        await self.http.aclose()

    async def retire(self) -> None:
        """Closes the connections once the last call has ended."""
        await self._idle.wait()
        await self.close()


class ConnectedReplicas:
    """Connects to the replicas of a fleet, and chooses one for each call.

    Args:
        look_every_s: pause between two looks at the fleet's addresses and at the state of the connections.
    """

    def __init__(self, fleet: Fleet, connector: Connector, look_every_s: float = LOOK_EVERY_S) -> None:
        self._fleet = fleet
        self._connector = connector
        self._look_every_s = look_every_s
        self._replicas: dict[str, Replica] = {}
        self._retiring: dict[asyncio.Task[None], Replica] = {}
        self._turns = itertools.count(1)
        self._ready = asyncio.Event()

    @property
    def num_open(self) -> int:
        """Replicas to which there are connections, with those that are gone and still have calls."""
        return len(self._replicas) + len(self._retiring)

    @property
    def ready_addresses(self) -> frozenset[str]:
        """Addresses of the replicas that take calls."""
        return frozenset(address for address, replica in self._replicas.items() if replica.takes_calls)

    async def follow(self) -> None:
        """Keeps the connections up to date until it is cancelled."""
        while True:
            self.look()
            await asyncio.sleep(self._look_every_s)

    def look(self) -> None:
        """Connects to new addresses, gives up those that have gone, and wakes `wait` if a replica takes calls."""
        addresses, certificates = self._fleet.addresses, self._connector.certificates
        for replica in list(self._replicas.values()):
            if replica.address not in addresses or replica.certificates != certificates:
                self.give_up(replica)
        for address in sorted(addresses - self._replicas.keys()):
            self._replicas[address] = Replica(address, self._connector)
        # All are asked, not only up to the first: asking makes each connect.
        if any([replica.takes_calls for replica in self._replicas.values()]):
            self._ready.set()

    def some(self, but: Replica | None = None) -> Replica | None:
        """The replica with the fewest calls; of several, the one that got its last call longest ago. None: none.

        Args:
            but: one that is not wanted.
        """
        able = (replica for replica in self._replicas.values() if replica is not but and replica.takes_calls)
        found = min(able, key=lambda replica: (replica.num_calls, replica.turn), default=None)
        if found is not None:
            found.turn = next(self._turns)
        return found

    def give_up(self, replica: Replica) -> None:
        """Sends no more calls to a replica by its present connections, which are closed when their calls have ended.

        While its address is one of the fleet's, the next look connects anew: to what answers there now.
        """
        if self._replicas.get(replica.address) is replica:
            del self._replicas[replica.address]
            retiring = asyncio.create_task(replica.retire())
            self._retiring[retiring] = replica
            retiring.add_done_callback(self._retiring.pop)

    async def wait(self) -> None:
        """Waits until a look finds a replica that takes calls."""
        self._ready.clear()
        await self._ready.wait()

    async def close(self) -> None:
        """Closes all connections."""
        replicas = [*self._replicas.values(), *self._retiring.values()]
        self._replicas.clear()
        for task in self._retiring:
            task.cancel()
        for replica in replicas:
            await replica.close()
