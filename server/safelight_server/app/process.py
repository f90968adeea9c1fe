"""Runs the server as a process: until a signal comes, and then until it is drained."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
from collections.abc import Callable

from safelight_server.app.server import Running, StartError, serving
from safelight_server.settings import Settings

GC_THRESHOLDS = 1_000, 10, 100
"""`gc.set_threshold`: net new objects before a collection of generation 0; collections of 0 before one of 1, of 1
before one of 2. `settle` says why they are not the defaults."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def settle() -> None:
    """Tunes the garbage collector so that a collection does not stop the event loop for 50 ms and more.

    Objects made at start-up are exempt from collection (`gc.freeze`). Full collections, which would walk all kept
    results although reference counts free those, come only after 1,000 x 10 x 100 net new objects.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


async def serve(settings: Settings, started: Callable[[Running], None]) -> None:
    """Serves until SIGTERM, SIGINT or SIGHUP, then drains; a second SIGTERM or SIGINT ends the drain.

    Raises:
        StartError: the server cannot start, or a signal came before it had started.
        ManifestError, ConfigFileError: as for `serving`.
    """
    loop, signals = asyncio.get_running_loop(), asyncio.Queue[signal.Signals]()
    starting = asyncio.current_task()
    assert starting is not None
    under_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    heard = (signal.SIGTERM, signal.SIGINT) if under_nohup else SIGNALS
    for number in heard:
        loop.add_signal_handler(number, starting.cancel)
    async with contextlib.AsyncExitStack() as ends:
        try:
            running = await ends.enter_async_context(serving(settings))
        except asyncio.CancelledError:
            raise StartError("a signal has ended it before it had started") from None
        for number in heard:
            loop.add_signal_handler(number, signals.put_nowait, number)
        settle()
        started(running)
        await signals.get()
        drained = running.drain(settings.drain_grace_s)
        again = asyncio.create_task(_asked_again(signals))
        await asyncio.wait([drained, again], return_when=asyncio.FIRST_COMPLETED)
        again.cancel()


async def _asked_again(signals: asyncio.Queue[signal.Signals]) -> None:
    """Returns at the next SIGTERM or SIGINT. When a terminal closes, both the kernel and the shell send a SIGHUP."""
    while await signals.get() is signal.SIGHUP:
        pass
