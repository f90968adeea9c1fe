"""Names of revisions: orders them, to find the newest, and tells those that are quantized. Pure."""

from __future__ import annotations

import re

Order = list[tuple[int, int, str]]


def order(revision: str) -> Order:
    """Sort key of a revision: numbers compare by value, all else as text, so that 1.9 comes before 1.10."""
    parts = re.split(r"([0-9]+)", revision)
    return [(1, int(part), "") if part.isascii() and part.isdigit() else (0, 0, part) for part in parts]


SCHEMES = ("int8",)
"""How networks are quantized. A revision that is has its scheme at the end of its name: 1.0-int8 beside 1.0."""


def scheme(revision: str) -> str:
    """The scheme of a quantized revision; empty where it is none."""
    _, dash, last = revision.rpartition("-")
    return last if dash and last in SCHEMES else ""


def served_name(name: str, revision: str) -> str:
    """What a pipeline is served as: its name, and @SCHEME where the revision is quantized."""
    return f"{name}@{found}" if (found := scheme(revision)) else name
