"""Which cells of the comparisons with diffusers are run: all of them, or as many as show each value."""

from __future__ import annotations

import os

EVERY = bool(os.environ.get("SAFELIGHT_ALL_PARITY"))
"""`SAFELIGHT_ALL_PARITY=1 make test-training`: all cells. CI has a part, in which each value of each axis occurs."""
