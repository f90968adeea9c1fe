"""The composition root, as far as it needs no server."""

from __future__ import annotations

import gc

from safelight_server.app.process import GC_THRESHOLDS, settle


def test_what_start_up_made_is_spared_from_garbage_collection() -> None:
    before = gc.get_threshold()
    try:
        settle()
        assert gc.get_freeze_count() > 10_000
        assert gc.get_threshold() == GC_THRESHOLDS
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)
