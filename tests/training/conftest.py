"""What all tests against torch and diffusers share."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """Makes garbage collection cheap: torch's exporter makes many objects, and each time those of all imports were visited."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
