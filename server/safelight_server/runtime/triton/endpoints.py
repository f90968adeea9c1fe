"""Which servers take calls: least outstanding work, ejection on failure, probes with backoff. Pure.

An endpoint is UP (takes calls), DOWN (waits for its next probe) or PROBING.
All begin DOWN with a probe due. An instance is a place for one call on one
endpoint: instance i belongs to endpoint i // calls_each.

A server whose queue is full works: it is offered fewer calls at once
(`window`), and again more as they succeed. Only when it refuses a call that
had no company from its beginning to its end is it DOWN: calls begun together
arrive in any order, so that the first of them may be the one refused.

Invariants: only endpoints that are UP are offered, and no more calls than
their window; a failure of a call that began before its endpoint was last
ejected changes nothing; the wait for the next probe doubles until a real call
has succeeded.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection
from dataclasses import dataclass

WINDOW_GROWTH = 0.05
"""Of the calls given at once, with every success."""


class EndpointState(enum.Enum):
    """Where an endpoint is."""

    UP = "up"
    DOWN = "down"
    PROBING = "probing"


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits before probes: `first_s`, doubled with each failure in a row up to `max_s`; by chance 50-100 % of that."""

    first_s: float = 0.1
    max_s: float = 0.25

    def wait_s(self, failures: int, chance: float) -> float:
        """The wait after that many failures; `chance` in [0, 1)."""
        return min(self.max_s, self.first_s * 2.0 ** min(failures, 16)) * (0.5 + chance / 2)


@dataclass(frozen=True, slots=True)
class CallTicket:
    """A call that is under way; `number` counts the calls of its endpoint from the first."""

    endpoint: int
    epoch: int
    work_s: float
    number: int
    began_alone: bool


@dataclass(slots=True)
class _Endpoint:
    state: EndpointState = EndpointState.DOWN
    due: float = 0.0
    window: float = 1.0
    failures: int = 0
    epoch: int = 0
    num_begun: int = 0
    num_calls: int = 0
    work_s: float = 0.0


class Endpoints:
    """Chooses the server for each call, and when to probe a server that is down. Does no I/O.

    `now`, in every method, is seconds of one monotonic clock.

    Args:
        calls_each: calls that an endpoint is given at once.
        chance: numbers in [0, 1), such as `random.random`.
    """

    def __init__(self, num_endpoints: int, calls_each: int, backoff: Backoff, chance: Callable[[], float]) -> None:
        self._endpoints = [_Endpoint(window=calls_each) for _ in range(num_endpoints)]
        self._calls_each = calls_each
        self._backoff = backoff
        self._chance = chance

    # --- who takes calls ---

    @property
    def num_instances(self) -> int:
        """With all endpoints UP."""
        return len(self._endpoints) * self._calls_each

    @property
    def num_live(self) -> int:
        """Instances of endpoints that are UP."""
        return self._calls_each * sum(endpoint.state is EndpointState.UP for endpoint in self._endpoints)

    def state(self, endpoint: int) -> EndpointState:
        """Where it is."""
        return self._endpoints[endpoint].state

    def num_calls(self, endpoint: int) -> int:
        """Calls under way on it."""
        return self._endpoints[endpoint].num_calls

    def endpoint_of(self, instance: int) -> int:
        """The endpoint of an instance."""
        return instance // self._calls_each

    def usable(self, free: Collection[int]) -> list[int]:
        """Those of the free instances that take calls, in the order that gives each to the least loaded endpoint."""
        places: dict[int, list[int]] = {}
        for instance in sorted(free, reverse=True):
            at = self.endpoint_of(instance)
            if self._endpoints[at].state is EndpointState.UP:
                places.setdefault(at, []).append(instance)
        calls = sum(endpoint.num_calls for endpoint in self._endpoints)
        typical_s = sum(endpoint.work_s for endpoint in self._endpoints) / calls if calls else 1.0
        work = {at: (self._endpoints[at].work_s, self._endpoints[at].num_calls) for at in places}
        order: list[int] = []
        while places:
            least = min(places, key=lambda at: (*work[at], at))
            seconds, calls = work[least]
            if calls < int(self._endpoints[least].window):
                order.append(places[least].pop())
            else:
                places[least].clear()
            work[least] = (seconds + typical_s, calls + 1)
            if not places[least]:
                del places[least]
        return order

    # --- what becomes of calls ---

    def begin(self, instance: int, work_s: float) -> CallTicket:
        """A call that will take about `work_s` goes to the instance's endpoint."""
        at = self.endpoint_of(instance)
        endpoint = self._endpoints[at]
        endpoint.num_begun += 1
        ticket = CallTicket(at, endpoint.epoch, work_s, endpoint.num_begun, began_alone=not endpoint.num_calls)
        endpoint.num_calls += 1
        endpoint.work_s += work_s
        return ticket

    def end(self, ticket: CallTicket) -> None:
        """The call is over, or given up."""
        endpoint = self._endpoints[ticket.endpoint]
        endpoint.num_calls -= 1
        endpoint.work_s = endpoint.work_s - ticket.work_s if endpoint.num_calls else 0.0

    def succeeded(self, ticket: CallTicket) -> None:
        """The call brought results: its endpoint is trusted again."""
        endpoint = self._endpoints[ticket.endpoint]
        if ticket.epoch == endpoint.epoch:
            endpoint.failures = 0
            endpoint.window = min(float(self._calls_each), endpoint.window + WINDOW_GROWTH)

    def eject(self, ticket: CallTicket, now: float) -> bool:
        """The call showed that its endpoint cannot work.

        Returns:
            Whether the endpoint was UP until now.
        """
        endpoint = self._endpoints[ticket.endpoint]
        if ticket.epoch != endpoint.epoch or endpoint.state is not EndpointState.UP:
            return False
        endpoint.epoch += 1
        self._down(endpoint, now)
        return True

    def refused(self, ticket: CallTicket, now: float) -> bool:
        """The endpoint had no room for the call, which has ended, beside those that are under way still.

        Returns:
            Whether the call never had company, and its endpoint was UP until now: it is ejected.
        """
        endpoint = self._endpoints[ticket.endpoint]
        if ticket.epoch != endpoint.epoch:
            return False
        if ticket.began_alone and ticket.number == endpoint.num_begun:
            return self.eject(ticket, now)
        endpoint.window = float(max(1, min(int(endpoint.window), endpoint.num_calls)))
        return False

    # --- probes ---

    def next_probe(self) -> float | None:
        """When `probe` has something to do; None while all are UP or being probed."""
        return min((endpoint.due for endpoint in self._endpoints if endpoint.state is EndpointState.DOWN), default=None)

    def probe(self, now: float) -> list[int]:
        """The endpoints to be probed now; each is PROBING until `probed`."""
        due = [
            at
            for at, endpoint in enumerate(self._endpoints)
            if endpoint.state is EndpointState.DOWN and endpoint.due <= now
        ]
        for at in due:
            self._endpoints[at].state = EndpointState.PROBING
        return due

    def probed(self, at: int, works: bool, now: float) -> None:
        """What a probe found."""
        endpoint = self._endpoints[at]
        if endpoint.state is not EndpointState.PROBING:
            raise ValueError(f"endpoint {at} is {endpoint.state.value}, not being probed")
        if works:
            endpoint.state = EndpointState.UP
            endpoint.window = float(self._calls_each)
        else:
            self._down(endpoint, now)

    def _down(self, endpoint: _Endpoint, now: float) -> None:
        endpoint.state = EndpointState.DOWN
        endpoint.due = now + self._backoff.wait_s(endpoint.failures, self._chance())
        endpoint.failures += 1
