"""The benchmark that needs Redis, on a tiny plan."""

from __future__ import annotations

from load_tests.bench import tiers


def test_tiers() -> None:
    entries, agreed = tiers.measure(tiers.SMOKE).tables.values()
    assert [row["tier"] for row in entries] == ["memory", "disk", "redis"]
    assert [row["what"] for row in agreed] == ["lease", "event of 2 KiB", "commit"]
