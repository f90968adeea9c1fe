"""The rules of ownership: golden scripts (`REWRITE=1` writes their traces again), the table, and forbidden results."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safelight_server.generations.ownership.rules import (
    ABSENT_LEASES,
    OTHERS_FIRST_LEASES,
    OWNER_TRANSITIONS,
    PATIENCE_S,
    ClaimAction,
    ClaimSeen,
    ListedAction,
    ListedSeen,
    MirrorAction,
    OwnerAction,
    OwnerInput,
    OwnerState,
    decide_claim,
    decide_leased,
    decide_listed,
    decide_unowned,
)

from tests.support.ownership_script import rewritten

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = sorted((ROOT / "tests/golden/ownership").glob("*.txt"))
LEASE_S = 2.0
CLAIMS = st.builds(
    ClaimSeen,
    mine=st.booleans(),
    readable=st.booleans(),
    same_request=st.booleans(),
    recorded=st.sampled_from([None, True, False]),
    leased=st.sampled_from([None, True, False]),
    waited_s=st.floats(0, 2 * PATIENCE_S),
)
LISTED = st.builds(ListedSeen, *[st.booleans()] * 6, st.floats(0, 2 * OTHERS_FIRST_LEASES * LEASE_S))


def record() -> str:
    return (ROOT / "docs/decisions/0015-ownership.md").read_text()


def test_the_table_of_the_record_is_that_of_the_code() -> None:
    states = "|".join({at.name: at for at, _ in OWNER_TRANSITIONS})
    rows = re.findall(rf"^\| ({states}) \| ([^|]+) \| (\w+) \| ([^|]+) \|$", record(), re.MULTILINE)
    table = [(at.name, what.value, then.name, do.value) for (at, what), (then, do) in OWNER_TRANSITIONS.items()]
    assert [row for row in rows if row[1] in {what.value for what in OwnerInput}] == table


def test_the_diagram_of_the_record_is_that_of_the_code() -> None:
    [drawn] = re.findall(r"```mermaid\nstateDiagram-v2\n(    \[\*\] --> CLAIMED.*?)```", record(), re.DOTALL)
    arrows = re.findall(r"^    (\w+) --> (\w+): ([^\n]+)$", drawn, re.MULTILINE)
    table = [(at.name, then.name, what.value) for (at, what), (then, _) in OWNER_TRANSITIONS.items()]
    assert arrows == table


def test_who_is_no_owner_any_more_never_is_one_again() -> None:
    left = {OwnerState.SETTLING, OwnerState.RELEASED, OwnerState.LOST, OwnerState.FORGOTTEN}
    for (state, _), (then, _) in OWNER_TRANSITIONS.items():
        assert state not in left or then in left


def test_each_way_out_gives_the_lease_back_once() -> None:
    gives_back = {
        OwnerAction.FORGET,
        OwnerAction.SETTLE,
        OwnerAction.SETTLE_AFTER_JOURNAL,
        OwnerAction.RELEASE,
        OwnerAction.RELEASE_AFTER_JOURNAL,
    }
    holding = {OwnerState.CLAIMED, OwnerState.OWNED}
    for (state, what), (then, action) in OWNER_TRANSITIONS.items():
        leaves = state in holding and then not in holding
        assert (action in gives_back) is (leaves and what is not OwnerInput.REPLACED)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_leaves_its_trace(script: Path) -> None:
    trace = rewritten(script.read_text())
    if os.environ.get("REWRITE"):
        script.write_text(trace)
    assert trace == script.read_text()


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) >= 10


@given(CLAIMS)
def test_a_request_id_is_taken_only_from_what_was_never_accepted_and_never_can_be(seen: ClaimSeen) -> None:
    if decide_claim(seen) is ClaimAction.REPLACE:
        assert not seen.readable or (seen.leased and seen.recorded is False)


@given(st.booleans(), st.booleans(), st.floats(0, 3 * LEASE_S))
def test_a_mirror_takes_no_lease_of_what_may_be_written_again_and_adopts_only_what_is_recorded(
    can_develop: bool, recorded: bool, gone_s: float
) -> None:
    action = decide_unowned(can_develop=can_develop, recorded=recorded, gone_s=gone_s, lease_s=LEASE_S)
    assert (action is MirrorAction.TAKE_LEASE) is (can_develop and recorded)
    assert action is not MirrorAction.ADOPT
    if action is MirrorAction.GIVE_UP:
        assert not recorded and gone_s >= LEASE_S
    leased = decide_leased(recorded=recorded, gone_s=gone_s, lease_s=LEASE_S)
    assert (leased is MirrorAction.ADOPT) is recorded
    assert leased is not MirrorAction.GIVE_UP or gone_s >= LEASE_S


@given(LISTED)
def test_of_what_is_registered_only_what_is_over_is_unregistered(seen: ListedSeen) -> None:
    match decide_listed(seen, LEASE_S):
        case ListedAction.UNREGISTER:
            assert not seen.owned_here
            assert seen.ended or (not seen.stored and seen.unowned_s >= ABSENT_LEASES * LEASE_S)
        case ListedAction.FOLLOW:
            assert seen.stored and seen.readable and seen.can_develop and not seen.owned_here
            assert seen.same_numerics or seen.unowned_s >= OTHERS_FIRST_LEASES * LEASE_S
        case ListedAction.PASS_OVER:
            assert seen.owned_here or seen.stored or seen.unowned_s < ABSENT_LEASES * LEASE_S
