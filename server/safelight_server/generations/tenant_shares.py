"""Bounds what all tenants hold, max-min fair: beyond the bound the tenant that holds most loses its oldest. Pure.

When the bound is exceeded and n tenants hold something, the tenant that holds
most has more than bound / n. So a tenant that holds at most bound / n never loses
anything because of others. `add`, `remove` and `loser` cost O(log n), amortised.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Collection, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class TenantShares(Generic[Key]):
    """What each tenant holds: keys in the order in which they were added, each with an amount.

    Args:
        bound: the most that all amounts may sum up to. After an `add` the caller must drop keys of `loser` until
            it is None.

    Attributes:
        total: the sum of all amounts.
    """

    def __init__(self, bound: int) -> None:
        self.total = 0
        self._bound = bound
        self._held: dict[str, OrderedDict[Key, int]] = {}
        self._totals: dict[str, int] = {}
        self._largest: list[tuple[int, str]] = []  # a heap of (-total, tenant); entries of an older total are skipped

    def __len__(self) -> int:
        return sum(map(len, self._held.values()))

    def add(self, tenant: str, key: Key, amount: int = 1) -> None:
        """Adds a key of a tenant as its newest. A key that is there already becomes the newest, with the new amount."""
        self.remove(tenant, key)
        self._held.setdefault(tenant, OrderedDict())[key] = amount
        self._change(tenant, amount)

    def remove(self, tenant: str, key: Key) -> None:
        """Removes a key of a tenant. Unknown keys are ignored."""
        if (held := self._held.get(tenant)) is None or (amount := held.pop(key, None)) is None:
            return
        if not held:
            del self._held[tenant]
        self._change(tenant, -amount)

    def amount(self, tenant: str) -> int:
        """The sum of the amounts of a tenant."""
        return self._totals.get(tenant, 0)

    def held(self, tenant: str) -> Collection[Key]:
        """The keys of a tenant, the oldest first."""
        return self._held.get(tenant, {}).keys()

    def loser(self) -> str | None:
        """The tenant that has to lose its oldest; None: the bound is kept."""
        if self.total <= self._bound:
            return None
        while -self._largest[0][0] != self._totals.get(self._largest[0][1]):
            heapq.heappop(self._largest)
        return self._largest[0][1]

    def take_beyond(self) -> Key | None:
        """Removes and returns the key that has to go; None: the bound is kept."""
        if (tenant := self.loser()) is None:
            return None
        key = next(iter(self._held[tenant]))
        self.remove(tenant, key)
        return key

    def _change(self, tenant: str, amount: int) -> None:
        self.total += amount
        if tenant not in self._held:
            del self._totals[tenant]
            return
        self._totals[tenant] = self._totals.get(tenant, 0) + amount
        heapq.heappush(self._largest, (-self._totals[tenant], tenant))
        if len(self._largest) > 4 * len(self._totals) + 16:
            self._largest = [(-total, name) for name, total in self._totals.items()]
            heapq.heapify(self._largest)
