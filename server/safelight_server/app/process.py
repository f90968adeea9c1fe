"""Runs the server as a process: until a signal or a spot notice comes, and then until it is drained."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import time
from collections.abc import Callable

import structlog

from safelight_server.app.errors import StartError
from safelight_server.app.server import Running, serving
from safelight_server.app.spot import spot_notice
from safelight_server.settings import Settings

log = structlog.get_logger(__name__)

GC_THRESHOLDS = 1_000, 10, 100
"""Arguments of `gc.set_threshold`: net new objects before a collection of generation 0; collections of generation 0
before one of 1, and of 1 before one of 2. `settle` says why these are not the defaults."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def settle() -> None:
    """Tunes the garbage collector so that a collection does not stop the event loop for 50 ms or more.

    Objects made at start-up are exempt from collection (`gc.freeze`). A full collection visits all kept results, which
    reference counts free anyway, so it comes only after 1,000 x 10 x 100 net new objects.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


async def serve(settings: Settings, started: Callable[[Running], None]) -> None:
    """Serves until SIGTERM, SIGINT, SIGHUP or a spot notice, then drains. A second SIGTERM or SIGINT ends the drain.

    Raises:
        StartError: the server cannot start, or a signal came before it had started.
        ManifestError, ConfigFileError: see `serving`.
    """
    loop, signals = asyncio.get_running_loop(), asyncio.Queue[signal.Signals]()
    starting = asyncio.current_task()
    assert starting is not None
    under_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    handled = (signal.SIGTERM, signal.SIGINT) if under_nohup else SIGNALS
    for number in handled:
        loop.add_signal_handler(number, starting.cancel)
    async with contextlib.AsyncExitStack() as ends:
        try:
            running = await ends.enter_async_context(serving(settings))
        except asyncio.CancelledError:
            raise StartError("a signal came before the server had started") from None
        for number in handled:
            loop.add_signal_handler(number, signals.put_nowait, number)
        settle()
        started(running)
        drained = running.drain(await _reason_to_end(signals, settings))
        again = asyncio.create_task(_second_signal(signals))
        await asyncio.wait([drained, again], return_when=asyncio.FIRST_COMPLETED)
        again.cancel()


async def _reason_to_end(signals: asyncio.Queue[signal.Signals], settings: Settings) -> float:
    """Waits for a signal or a spot notice. Returns the seconds that the drain may take."""
    signalled = asyncio.create_task(signals.get())
    if settings.spot_notice == "off":
        await signalled
        return settings.drain_grace_s
    noticed = asyncio.create_task(spot_notice(settings.spot_notice_url, time.time))
    await asyncio.wait([signalled, noticed], return_when=asyncio.FIRST_COMPLETED)
    if not noticed.done():
        noticed.cancel()
        return settings.drain_grace_s
    signalled.cancel()
    notice = noticed.result()
    log.warning("spot_notice", action=notice.action, left_s=round(notice.left_s, 1))
    return notice.grace_s(settings.drain_grace_s)


async def _second_signal(signals: asyncio.Queue[signal.Signals]) -> None:
    """Returns at the next SIGTERM or SIGINT. Ignores SIGHUP, which kernel and shell both send if a terminal closes."""
    while await signals.get() is signal.SIGHUP:
        pass
