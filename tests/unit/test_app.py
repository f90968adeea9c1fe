"""The composition root, as far as it needs no server."""

from __future__ import annotations

import gc

from safelight_server.app import settle


def test_what_start_up_made_is_spared_from_garbage_collection() -> None:
    try:
        settle()
        assert gc.get_freeze_count() > 10_000
    finally:
        gc.unfreeze()
