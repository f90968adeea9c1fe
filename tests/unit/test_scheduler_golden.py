"""The scheduler's golden scripts: `REWRITE=1 pytest tests/unit/test_scheduler_golden.py` writes them anew; review the diff."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.scheduler_script import rewritten

SCRIPTS = sorted((Path(__file__).parent.parent / "golden" / "scheduler").glob("*.txt"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_leaves_its_trace(script: Path) -> None:
    trace = rewritten(script.read_text())
    if os.environ.get("REWRITE"):
        script.write_text(trace)
    assert trace == script.read_text()


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) > 8
