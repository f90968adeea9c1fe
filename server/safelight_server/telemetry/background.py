"""Background tasks whose exceptions are logged; work that must go on is started again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

log = structlog.get_logger(__name__)

RESTART_S = 1.0
"""Pause before work that has raised an exception begins again."""


async def keep_running(work: Callable[[], Awaitable[None]], name: str) -> None:
    """Runs `work` until it returns. An exception is logged as a bug, and `work` is called again.

    Args:
        work: starts from the beginning at each call, so it may miss what happened in between.
        name: the name of the work in the log.
    """
    while True:
        try:
            return await work()
        except Exception:
            log.exception("bug", work=name)
        await asyncio.sleep(RESTART_S)


def log_failure(task: asyncio.Task[None]) -> None:
    """Logs the exception with which a task has ended, if any; for `Task.add_done_callback`."""
    if not task.cancelled() and (fault := task.exception()) is not None:
        log.error("bug", work=task.get_name(), exc_info=fault)
