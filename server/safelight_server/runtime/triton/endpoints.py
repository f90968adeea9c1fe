"""Which servers take calls: least outstanding work, ejection on failure, probes with backoff. Pure.

An endpoint is UP (takes calls), DOWN (waits for its next probe) or PROBING.
All begin DOWN with a probe due. An instance is a place for one call on one
endpoint: instance i belongs to endpoint i // calls_each.

Invariants: only endpoints that are UP and not paused are offered; a failure of
a call that began before its endpoint was last ejected changes nothing; the
wait for the next probe doubles until a real call has succeeded.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection
from dataclasses import dataclass


class State(enum.Enum):
    """Where an endpoint is."""

    UP = "up"
    DOWN = "down"
    PROBING = "probing"


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits before probes: `first_s`, doubled with each failure in a row up to `max_s`; by chance 50-100 % of that."""

    first_s: float = 0.1
    max_s: float = 0.5

    def wait_s(self, failures: int, chance: float) -> float:
        """The wait after that many failures; `chance` in [0, 1)."""
        return min(self.max_s, self.first_s * 2.0 ** min(failures, 16)) * (0.5 + chance / 2)


@dataclass(frozen=True, slots=True)
class Ticket:
    """A call that is under way."""

    endpoint: int
    epoch: int
    work_s: float


@dataclass(slots=True)
class _Endpoint:
    state: State = State.DOWN
    due: float = 0.0
    paused_until: float = 0.0
    failures: int = 0
    epoch: int = 0
    num_calls: int = 0
    work_s: float = 0.0


class Endpoints:
    """See the module. `now` is any clock that does not run backwards, the same throughout.

    Args:
        calls_each: calls that an endpoint is given at once.
        chance: numbers in [0, 1), such as `random.random`.
    """

    def __init__(self, num_endpoints: int, calls_each: int, backoff: Backoff, chance: Callable[[], float]) -> None:
        self._endpoints = [_Endpoint() for _ in range(num_endpoints)]
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
        return self._calls_each * sum(endpoint.state is State.UP for endpoint in self._endpoints)

    def state(self, endpoint: int) -> State:
        """Where it is."""
        return self._endpoints[endpoint].state

    def num_calls(self, endpoint: int) -> int:
        """Calls under way on it."""
        return self._endpoints[endpoint].num_calls

    def endpoint_of(self, instance: int) -> int:
        """The endpoint of an instance."""
        return instance // self._calls_each

    def usable(self, free: Collection[int], now: float) -> list[int]:
        """Those of the free instances that take calls, in the order that gives each to the least loaded endpoint."""
        places: dict[int, list[int]] = {}
        for instance in sorted(free, reverse=True):
            endpoint = self._endpoints[self.endpoint_of(instance)]
            if endpoint.state is State.UP and endpoint.paused_until <= now:
                places.setdefault(self.endpoint_of(instance), []).append(instance)
        calls = sum(endpoint.num_calls for endpoint in self._endpoints)
        typical_s = sum(endpoint.work_s for endpoint in self._endpoints) / calls if calls else 1.0
        work = {at: (self._endpoints[at].work_s, self._endpoints[at].num_calls) for at in places}
        order: list[int] = []
        while places:
            least = min(places, key=lambda at: (*work[at], at))
            order.append(places[least].pop())
            work[least] = (work[least][0] + typical_s, work[least][1] + 1)
            if not places[least]:
                del places[least]
        return order

    # --- what becomes of calls ---

    def begin(self, instance: int, work_s: float) -> Ticket:
        """A call that will take about `work_s` goes to the instance's endpoint."""
        at = self.endpoint_of(instance)
        endpoint = self._endpoints[at]
        endpoint.num_calls += 1
        endpoint.work_s += work_s
        return Ticket(at, endpoint.epoch, work_s)

    def end(self, ticket: Ticket) -> None:
        """The call is over, or given up."""
        endpoint = self._endpoints[ticket.endpoint]
        endpoint.num_calls -= 1
        endpoint.work_s = endpoint.work_s - ticket.work_s if endpoint.num_calls else 0.0

    def succeeded(self, ticket: Ticket) -> None:
        """The call brought results: its endpoint is trusted again."""
        endpoint = self._endpoints[ticket.endpoint]
        if ticket.epoch == endpoint.epoch:
            endpoint.failures = 0

    def eject(self, ticket: Ticket, now: float) -> bool:
        """The call showed that its endpoint cannot work.

        Returns:
            Whether the endpoint was UP until now.
        """
        endpoint = self._endpoints[ticket.endpoint]
        if ticket.epoch != endpoint.epoch or endpoint.state is not State.UP:
            return False
        endpoint.epoch += 1
        self._down(endpoint, now)
        return True

    def pause(self, ticket: Ticket, now: float) -> float:
        """The endpoint works, but takes no more now; calls that it has go on.

        Returns:
            When it is offered again.
        """
        endpoint = self._endpoints[ticket.endpoint]
        endpoint.paused_until = max(endpoint.paused_until, now + self._backoff.wait_s(0, self._chance()))
        return endpoint.paused_until

    # --- probes ---

    def next_probe(self) -> float | None:
        """When `probe` has something to do; None while all are UP or being probed."""
        return min((endpoint.due for endpoint in self._endpoints if endpoint.state is State.DOWN), default=None)

    def probe(self, now: float) -> list[int]:
        """The endpoints to be probed now; each is PROBING until `probed`."""
        due = [
            at for at, endpoint in enumerate(self._endpoints) if endpoint.state is State.DOWN and endpoint.due <= now
        ]
        for at in due:
            self._endpoints[at].state = State.PROBING
        return due

    def probed(self, at: int, works: bool, now: float) -> None:
        """What a probe found."""
        endpoint = self._endpoints[at]
        if endpoint.state is not State.PROBING:
            raise ValueError(f"endpoint {at} is {endpoint.state.value}, not being probed")
        if works:
            endpoint.state = State.UP
            endpoint.paused_until = now
        else:
            self._down(endpoint, now)

    def _down(self, endpoint: _Endpoint, now: float) -> None:
        endpoint.state = State.DOWN
        endpoint.due = now + self._backoff.wait_s(endpoint.failures, self._chance())
        endpoint.failures += 1
