"""The rules of the journal: golden scripts (`REWRITE=1` writes their traces anew; review the diff), and the table."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safelight_server.cluster.journal_rules import TRANSITIONS, JournalInput, JournalLines, JournalState

from tests.support.journal_script import rewritten

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = sorted((ROOT / "tests/golden/journal").glob("*.txt"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_leaves_its_trace(script: Path) -> None:
    trace = rewritten(script.read_text())
    if os.environ.get("REWRITE"):
        script.write_text(trace)
    assert trace == script.read_text()


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) >= 6


def test_the_table_of_the_record_is_that_of_the_code() -> None:
    text = (ROOT / "docs/decisions/0015-ownership.md").read_text()
    states = "|".join(JournalState.__members__)
    rows = re.findall(rf"^\| ({states}) \| ([^|]+) \| (\w+) \| ([^|]+) \|$", text, re.MULTILINE)
    assert rows == [
        (state.name, what.value, then.name, action.value) for (state, what), (then, action) in TRANSITIONS.items()
    ]


def test_what_another_replica_owns_is_never_owned_again() -> None:
    assert {then for (state, _), (then, _) in TRANSITIONS.items() if state is JournalState.LOST} == {JournalState.LOST}
    known = set(JournalInput) - {JournalInput.FAILED, JournalInput.FAILED_CERTAIN, JournalInput.GIVEN_UP}
    for state in JournalState:
        assert {what for at, what in TRANSITIONS if at is state} >= known


@given(st.lists(st.sampled_from(["take", "written", "failed", "failed sleeping", "forgotten", "end", "replaced"])))
def test_lines_are_written_in_order_and_nothing_is_shown_after_the_loss_but_what_was_written(commands) -> None:
    lines: JournalLines[int] = JournalLines()
    now_s, count, accepted = 0.0, 0, []
    for command in commands:
        now_s += 1.0
        held = command != "failed sleeping"
        lost = lines.state is JournalState.LOST
        match command.split()[0]:
            case "take":
                count += 1
                shown = lines.take(count, now_s, held=held, replaceable=False)
                assert not (lost and shown)
            case "written" if (first := lines.first) is not None:
                assert lines.written(first) == [first]
                accepted.append(first)
            case "failed" if lines.first is not None:
                shown = lines.failed(now_s - 2.0, now_s, held=held)
                assert shown == (list(lines.waiting) if held else [])
            case "forgotten":
                if lines.forgotten():
                    accepted = []
            case "end":
                lines.end(now_s)
            case "replaced":
                lines.replaced()
                assert lines.first is None
    assert accepted == list(range(1, len(accepted) + 1))
