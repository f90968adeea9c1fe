"""Revisions are in natural order: 1.10 after 1.9."""

from __future__ import annotations

import pytest
from safelight_server.catalog import revisions


@pytest.mark.parametrize(
    "ordered",
    [
        ["1.0", "1.9", "1.10", "2.0"],
        ["1", "1.0", "1.0-rc.2", "1.0-rc.10"],
        ["interim", "trained", "trained-2"],
        ["0.9", "a1", "a2", "a10", "b"],
        ["1", "1²", "2"],  # a digit that is no number
    ],
)
def test_numbers_count_by_value_and_all_else_by_name(ordered):
    assert sorted(reversed(ordered), key=revisions.order) == ordered
