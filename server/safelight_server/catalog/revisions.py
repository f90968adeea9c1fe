"""Orders the revisions of a pipeline, to find the newest. Pure."""

from __future__ import annotations

import re

Order = list[tuple[int, int, str]]


def order(revision: str) -> Order:
    """Sort key of a revision: numbers compare by value, all else as text, so that 1.9 comes before 1.10."""
    parts = re.split(r"([0-9]+)", revision)
    return [(1, int(part), "") if part.isascii() and part.isdigit() else (0, 0, part) for part in parts]
