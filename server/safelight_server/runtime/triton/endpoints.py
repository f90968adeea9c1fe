"""Load balancing over Triton servers: least outstanding work, ejection on failure, probes with backoff. Pure.

An endpoint (one server) is UP and takes calls, DOWN and waits for its next
probe, or PROBING. All begin DOWN with a probe due. An instance is one of the
`calls_each` calls that an endpoint takes at once: instance i belongs to endpoint
i // calls_each.

A server that refuses a call because its queue is full still works: it is given
fewer calls at once (its `window`), and more again as calls succeed. It is
ejected only if it refuses a call that was alone on it from beginning to end.
Calls that begin together arrive in any order, so that a refusal of the first
one proves nothing.

Invariants:
- Only endpoints that are UP are offered, each for no more calls than its window.
- The failure of a call that began before its endpoint was last ejected changes
  nothing.
- The wait before the next probe doubles until a real call has succeeded.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection
from dataclasses import dataclass

WINDOW_GROWTH = 0.05
"""How much a success adds to an endpoint's window, in calls."""


class EndpointState(enum.Enum):
    """Whether an endpoint takes calls; see the module's docstring."""

    UP = "up"
    DOWN = "down"
    PROBING = "probing"


@dataclass(frozen=True, slots=True)
class Backoff:
    """Backoff of probes: `first_s`, doubled by each failure in a row up to `max_s`, times a random 0.5 to 1."""

    first_s: float = 0.1
    max_s: float = 0.25

    def wait_s(self, failures: int, chance: float) -> float:
        """Seconds to wait after so many failures in a row; `chance` is a random number in [0, 1)."""
        return min(self.max_s, self.first_s * 2.0 ** min(failures, 16)) * (0.5 + chance / 2)


@dataclass(frozen=True, slots=True)
class CallTicket:
    """A call that is under way on an endpoint.

    Attributes:
        epoch: how often the endpoint had been ejected when the call began.
        work_s: seconds that the call should take.
        number: 1 for the first call of the endpoint, and so on.
        began_alone: whether no other call was under way on the endpoint when it began.
    """

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
    """State and load of every endpoint. `now` is in seconds, always of the same monotonic clock.

    Args:
        calls_each: most calls that an endpoint is given at once.
        chance: returns random numbers in [0, 1), such as `random.random`.
    """

    def __init__(self, num_endpoints: int, calls_each: int, backoff: Backoff, chance: Callable[[], float]) -> None:
        self._endpoints = [_Endpoint(window=calls_each) for _ in range(num_endpoints)]
        self._calls_each = calls_each
        self._backoff = backoff
        self._chance = chance

    # --- choosing an endpoint ---

    @property
    def num_instances(self) -> int:
        """Number of instances when all endpoints are UP."""
        return len(self._endpoints) * self._calls_each

    @property
    def num_live(self) -> int:
        """Number of instances on endpoints that are UP."""
        return self._calls_each * sum(endpoint.state is EndpointState.UP for endpoint in self._endpoints)

    def state(self, endpoint: int) -> EndpointState:
        """State of an endpoint."""
        return self._endpoints[endpoint].state

    def num_calls(self, endpoint: int) -> int:
        """Number of calls under way on an endpoint."""
        return self._endpoints[endpoint].num_calls

    def endpoint_of(self, instance: int) -> int:
        """Number of the endpoint that an instance belongs to."""
        return instance // self._calls_each

    def usable(self, free: Collection[int]) -> list[int]:
        """The free instances that take calls, ordered so that each next call goes to the least loaded endpoint."""
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

    # --- calls ---

    def begin(self, instance: int, work_s: float) -> CallTicket:
        """Counts a call that should take `work_s` seconds to the endpoint of `instance`."""
        at = self.endpoint_of(instance)
        endpoint = self._endpoints[at]
        endpoint.num_begun += 1
        ticket = CallTicket(at, endpoint.epoch, work_s, endpoint.num_begun, began_alone=not endpoint.num_calls)
        endpoint.num_calls += 1
        endpoint.work_s += work_s
        return ticket

    def end(self, ticket: CallTicket) -> None:
        """Takes a call that has ended, or was given up, off its endpoint's load."""
        endpoint = self._endpoints[ticket.endpoint]
        endpoint.num_calls -= 1
        endpoint.work_s = endpoint.work_s - ticket.work_s if endpoint.num_calls else 0.0

    def succeeded(self, ticket: CallTicket) -> None:
        """Records a success: resets the endpoint's probe backoff and widens its window."""
        endpoint = self._endpoints[ticket.endpoint]
        if ticket.epoch == endpoint.epoch:
            endpoint.failures = 0
            endpoint.window = min(float(self._calls_each), endpoint.window + WINDOW_GROWTH)

    def eject(self, ticket: CallTicket, now: float) -> bool:
        """Ejects the endpoint of a call whose failure showed that the endpoint cannot work.

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
        """Narrows the window of an endpoint that was too full for a call; ejects it if the call was alone on it.

        Call `end` for the call first.

        Returns:
            Whether the endpoint was ejected.
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
        """When the next probe is due; None while every endpoint is UP or being probed."""
        return min((endpoint.due for endpoint in self._endpoints if endpoint.state is EndpointState.DOWN), default=None)

    def probe(self, now: float) -> list[int]:
        """Marks the endpoints whose probe is due as PROBING and returns them; report each result with `probed`."""
        due = [
            at
            for at, endpoint in enumerate(self._endpoints)
            if endpoint.state is EndpointState.DOWN and endpoint.due <= now
        ]
        for at in due:
            self._endpoints[at].state = EndpointState.PROBING
        return due

    def probed(self, at: int, works: bool, now: float) -> None:
        """Records the result of a probe: the endpoint is UP if it works, else DOWN until its next probe."""
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
