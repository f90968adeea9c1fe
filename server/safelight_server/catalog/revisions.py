"""Which of a pipeline's revisions is the newest. Pure. Neighbours: `catalog`, `training.evaluate`."""

from __future__ import annotations

import re

Order = list[tuple[int, int, str]]


def order(revision: str) -> Order:
    """What revisions are sorted by: numbers in them by value, all else by name. 1.9 is before 1.10."""
    parts = re.split(r"([0-9]+)", revision)
    return [(1, int(part), "") if part.isascii() and part.isdigit() else (0, 0, part) for part in parts]
