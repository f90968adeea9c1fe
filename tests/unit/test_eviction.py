"""Eviction policies never exceed their bound, and evict the entries that the policy defines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safelight_server.cache.approximate.eviction import Eviction, LeastBenefit, LeastRecentlyUsed

MAX_BYTES = 100
POLICIES = [LeastRecentlyUsed, LeastBenefit, lambda most: LeastBenefit(most, ageing=False)]
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from("abcdefgh"), st.integers(0, 120), st.integers(1, 20)),
        st.tuples(st.just("hit"), st.sampled_from("abcdefgh")),
        st.tuples(st.just("remove"), st.sampled_from("abcdefgh")),
    ),
    max_size=200,
)


@pytest.mark.parametrize("policy", POLICIES)
@given(operations=OPERATIONS)
def test_counts_and_bound_hold_whatever_happens(policy, operations):
    eviction: Eviction = policy(MAX_BYTES)
    kept: dict[str, int] = {}
    for what, key, *rest in operations:
        if what == "add":
            size, benefit = rest
            kept[key] = size
            gone = eviction.add(key, size, float(benefit))
            assert len(set(gone)) == len(gone)
            assert (key in gone) == (size > MAX_BYTES)
            for each in gone:
                del kept[each]
        elif what == "hit":
            eviction.hit(key)
        else:
            eviction.remove(key)
            kept.pop(key, None)
        assert eviction.num_bytes == sum(kept.values()) <= MAX_BYTES
        assert len(eviction) == len(kept)
        assert all((key in eviction) == (key in kept) for key in "abcdefgh")


@given(operations=OPERATIONS)
def test_what_goes_was_not_used_for_longest(operations):
    eviction = LeastRecentlyUsed(MAX_BYTES)
    used: list[str] = []
    for what, key, *rest in operations:
        if what == "add":
            used = [other for other in used if other != key]
            gone = eviction.add(key, rest[0], 1.0)
            if gone != [key]:
                assert gone == used[: len(gone)]
                used = [*used[len(gone) :], key]
        elif what == "hit" and key in used:
            eviction.hit(key)
            used = [other for other in used if other != key] + [key]
        elif what == "remove":
            eviction.remove(key)
            used = [other for other in used if other != key]


def test_what_goes_has_the_least_benefit_times_uses_per_byte():
    eviction = LeastBenefit(40, ageing=False)
    for key, benefit in (("a", 4), ("b", 2), ("c", 3), ("d", 9)):
        assert eviction.add(key, 10, benefit) == []
    for _ in range(4):
        eviction.hit("b")
    assert eviction.add("e", 10, 5) == ["c"]
    assert eviction.add("f", 20, 12) == ["a", "e"]


def test_what_was_popular_once_goes_in_the_end_where_scores_age():
    for ageing, stays in ((False, True), (True, False)):
        eviction = LeastBenefit(20, ageing=ageing)
        eviction.add("old", 10, 1)
        for _ in range(20):
            eviction.hit("old")
        for number in range(100):
            eviction.add(f"new {number}", 10, 1)
        assert ("old" in eviction) == stays


def test_an_entry_that_is_made_anew_keeps_its_uses():
    eviction = LeastBenefit(20, ageing=False)
    eviction.add("a", 10, 1)
    for _ in range(5):
        eviction.hit("a")
    eviction.add("a", 10, 1)
    eviction.add("b", 10, 2)
    assert eviction.add("c", 10, 1) == ["b"]
