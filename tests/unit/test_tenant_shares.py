"""Shares of tenants: the bound holds, and a tenant with at most its fair share loses nothing to others."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from safelight_server.generations.tenant_shares import TenantShares

TENANTS = st.sampled_from(["acme", "evil", "lab", "studio"])
KEYS = st.integers(0, 40)
BOUND = 100


class Machine(RuleBasedStateMachine):
    """Compares with a simple model: for each tenant a list of keys, the oldest first."""

    @initialize()
    def start(self) -> None:
        self.shares: TenantShares[int] = TenantShares(BOUND)
        self.model: dict[str, list[tuple[int, int]]] = {}

    def amount(self, tenant: str) -> int:
        return sum(amount for _, amount in self.model.get(tenant, []))

    def forget(self, tenant: str, key: int) -> None:
        self.model[tenant] = [held for held in self.model.get(tenant, []) if held[0] != key]
        if not self.model[tenant]:
            del self.model[tenant]

    @rule(tenant=TENANTS, key=KEYS, amount=st.integers(0, 2 * BOUND))
    def add(self, tenant: str, key: int, amount: int) -> None:
        self.shares.add(tenant, key, amount)
        self.forget(tenant, key)
        self.model.setdefault(tenant, []).append((key, amount))
        while (loser := self.shares.loser()) is not None:
            assert sum(map(self.amount, self.model)) > BOUND
            assert self.amount(loser) > BOUND / len(self.model), "it held no more than its fair share"
            assert self.amount(loser) == max(map(self.amount, self.model))
            oldest = self.model[loser][0][0]
            assert self.shares.take_beyond() == oldest
            self.forget(loser, oldest)

    @rule(tenant=TENANTS, key=KEYS)
    def remove(self, tenant: str, key: int) -> None:
        self.shares.remove(tenant, key)
        self.forget(tenant, key)

    @invariant()
    def agrees(self) -> None:
        assert self.shares.total == sum(map(self.amount, self.model)) <= BOUND
        assert len(self.shares) == sum(map(len, self.model.values()))
        for tenant in ("acme", "evil", "lab", "studio"):
            assert self.shares.amount(tenant) == self.amount(tenant)
            assert list(self.shares.held(tenant)) == [key for key, _ in self.model.get(tenant, [])]


TestMachine = Machine.TestCase
TestMachine.settings = settings(deadline=None, max_examples=100)


@given(shares=st.lists(st.integers(1, 50), min_size=2, max_size=10), rude=st.integers(0, 400))
def test_who_holds_at_most_its_fair_share_keeps_all_of_it(shares: list[int], rude: int) -> None:
    """Whatever the first tenant adds, and whatever the sizes of the others' entries."""
    fair = BOUND // len(shares)
    held: TenantShares[tuple[int, int]] = TenantShares(BOUND)
    polite = [min(share, fair) for share in shares[1:]]
    for number, share in enumerate(polite):
        for key in range(share):
            held.add(str(number), (number, key))
    for key in range(rude):
        held.add("rude", (-1, key))
        while (beyond := held.take_beyond()) is not None:
            assert beyond[0] == -1
    assert [held.amount(str(number)) for number in range(len(polite))] == polite
    assert held.total <= BOUND


def test_the_next_loser_costs_no_walk_over_all_tenants() -> None:
    """With a thousand tenants and ten thousand evictions, the heap that finds the largest stays in proportion."""
    shares: TenantShares[int] = TenantShares(2_000)
    for tenant in range(1_000):
        shares.add(str(tenant), -1)
    gone = []
    for key in range(11_000):
        shares.add("rude", key)
        if (beyond := shares.take_beyond()) is not None:
            gone.append(beyond)
        assert len(shares._largest) <= 4 * 1_001 + 17
    assert gone == list(range(10_000))
