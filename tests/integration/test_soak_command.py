"""The soak test runs for seconds: good callers are served, and every hostile caller has an effect."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from load_tests.soak.__main__ import main
from load_tests.soak.hostile import ATTACKS


@pytest.mark.timeout(240)
async def test_a_short_soak(tmp_path: Path) -> None:
    await main(0.25, tmp_path, [attack.__name__ for attack in ATTACKS])
    found = json.loads((tmp_path / "soak.json").read_text())
    assert set(found["failures"]) <= {"no preview"}, "a short picture may come before its first preview"
    assert found["good_requests"]["beside INTERACTIVE"] > 5
    assert found["resident_mib"]
    tried = {what.partition(":")[0] for what in found["hostile"]}
    assert tried >= {"flood", "leaver", "nonsense"}
