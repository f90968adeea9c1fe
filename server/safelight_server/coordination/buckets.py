"""Token buckets, in this process or shared by the replicas through Redis.

A bucket holds up to `burst` tokens, gets `per_s` of them back each second, and
begins full. What is taken from several buckets is taken from all or from none.
A cost may leave a bucket in debt; what is admitted waits until it is out of it.
Invariant: in any time t, what is needed and costs one token is admitted at most
`per_s` * t + `burst` times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from safelight_server.storage.breaker import Breaker
from safelight_server.storage.redis import RedisConnection, translated

PREFIX = "safelight:bucket:"
SLACK_S = 0.001
"""Added to waiting times against rounding: a client that waits so long must not be refused for the last digit."""


@dataclass(frozen=True, slots=True)
class BucketRate:
    """How fast a bucket fills, in tokens a second, and how many it holds at most."""

    per_s: float
    burst: float

    def wait_s(self, tokens: float, needed: float) -> float:
        """Seconds until a bucket with `tokens` has `needed` tokens, if nobody takes any; 0: it has them."""
        return 0.0 if tokens >= needed else math.ceil((needed - tokens) / self.per_s * 1000) / 1000 + SLACK_S


@dataclass(frozen=True, slots=True)
class BucketDemand:
    """What is needed from one bucket.

    Attributes:
        needed: tokens that the bucket must have; with the default nothing is required.
        cost: tokens to take.
    """

    bucket: str
    rate: BucketRate
    needed: float = -1e300
    cost: float = 0.0


class LocalTokenBuckets:
    """Token buckets of this process. Pure apart from the clock. A bucket that is found full uses no memory."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._held: dict[str, tuple[float, float]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def spend(self, demands: Sequence[BucketDemand]) -> tuple[bool, list[float]]:
        """Takes all costs if every bucket has what is needed, otherwise none.

        Returns:
            Whether they were taken, and the tokens of each bucket after that.
        """
        now = self._clock()
        tokens = [self._tokens(demand, now) for demand in demands]
        enough = all(held >= demand.needed for held, demand in zip(tokens, demands, strict=True))
        if enough:
            tokens = [held - demand.cost for held, demand in zip(tokens, demands, strict=True)]
        for held, demand in zip(tokens, demands, strict=True):
            self._hold(demand, held, now)
        return enough, tokens

    def put(self, demands: Sequence[BucketDemand], tokens: Sequence[float]) -> None:
        """Sets the tokens of the buckets that the demands name."""
        now = self._clock()
        for held, demand in zip(tokens, demands, strict=True):
            self._hold(demand, held, now)

    def _tokens(self, demand: BucketDemand, now: float) -> float:
        held, at = self._held.get(demand.bucket, (demand.rate.burst, now))
        return min(demand.rate.burst, held + (now - at) * demand.rate.per_s)

    def _hold(self, demand: BucketDemand, tokens: float, now: float) -> None:
        if tokens >= demand.rate.burst:
            self._held.pop(demand.bucket, None)
        else:
            self._held[demand.bucket] = tokens, now


class SharedTokenBuckets:
    """Token buckets in Redis, which all replicas share. A full bucket is no key there.

    Args:
        connection: the connection to Redis, shared with the coordinator.
        breaker: the breaker of that connection.
    """

    def __init__(self, connection: RedisConnection, breaker: Breaker) -> None:
        client: Any = connection.client
        self._script = client.register_script(files(__package__).joinpath("scripts", "spend.lua").read_text())
        self._breaker = breaker

    async def spend(self, demands: Sequence[BucketDemand]) -> tuple[bool, list[float]]:
        """Takes all costs or none, as `LocalTokenBuckets.spend` does.

        Raises:
            StoreError: Redis does not answer. The costs may have been taken.
        """
        keys = [PREFIX + demand.bucket for demand in demands]
        rows = [(demand.rate.per_s, demand.rate.burst, demand.needed, demand.cost) for demand in demands]

        async def run() -> list[Any]:
            with translated():
                found: list[Any] = await self._script(keys=keys, args=[repr(value) for row in rows for value in row])
                return found

        enough, *tokens = await self._breaker.call(run)
        return bool(enough), [float(held) for held in tokens]
