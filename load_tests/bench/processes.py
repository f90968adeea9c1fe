"""Servers and clients in processes of their own, so that their CPU time and lateness can be measured separately.

A child runs one coroutine on uvloop, as the server does in production. It answers
each message on its pipe with one object. Reading from the pipe fails with
EOFError if the child has died. Invariant: a child does not outlive its block.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvloop
from safelight_server.app.process import settle
from safelight_server.app.server import serving
from safelight_server.settings import load
from safelight_server.telemetry import configure_logging

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
CHILD_STARTS_S = 120.0
CHILD_ANSWERS_S = 300.0


class ChildError(Exception):
    """A child failed or did not answer in time."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Resources that a process has used so far, with all its threads."""

    resident_bytes: int
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Child:
    """The parent's end of the pipe to a child process."""

    pipe: Connection

    def first(self, timeout_s: float = CHILD_STARTS_S) -> Any:
        """Waits for the first message of the child, which it sends when it is ready."""
        return self._receive(timeout_s)

    def ask(self, *question: object) -> Any:
        """Sends a question and waits for the answer."""
        self.pipe.send(question)
        return self._receive(CHILD_ANSWERS_S)

    def _receive(self, timeout_s: float) -> Any:
        if not self.pipe.poll(timeout_s):
            raise ChildError(f"a benchmark process said nothing for {timeout_s:.0f} s")
        answer = self.pipe.recv()
        if isinstance(answer, ChildError):
            raise answer
        return answer


@contextlib.contextmanager
def child(main: Callable[..., Coroutine[Any, Any, None]], *args: object) -> Iterator[Child]:
    """Runs `main(pipe, *args)` in a new interpreter during the block."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_run, args=(main, theirs, *args), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Child(ours)
    finally:
        process.kill()
        process.join()
        ours.close()


def _run(main: Callable[..., Coroutine[Any, Any, None]], *args: object) -> None:
    uvloop.run(main(*args))


async def answer(pipe: Connection, work: Callable[..., Awaitable[object]]) -> None:
    """Answers every question with `work(*question)`, until the parent ends the process."""
    while True:
        question = await asyncio.to_thread(pipe.recv)
        try:
            pipe.send(await work(*question))
        except BaseException as error:  # the parent must get every error
            pipe.send(ChildError(repr(error)))
            raise


async def serve(pipe: Connection, settings: dict[str, object]) -> None:
    """A Safelight server: sends its address, then answers every question with its usage."""
    configure_logging("json", "error")
    async with serving(load(**{"port": 0, "log_level": "error"} | settings)) as running:
        settle()
        pipe.send(running.address)
        await answer(pipe, usage)


async def obey(pipe: Connection) -> None:
    """A process that runs the coroutine functions it is sent with their arguments."""
    pipe.send("ready")
    await answer(pipe, _call)


async def _call(function: Callable[..., Awaitable[object]], *args: object) -> object:
    return await function(*args)


async def usage() -> Usage:
    """CPU and memory use of this process."""
    return Usage(_resident_bytes(), time.process_time())


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
