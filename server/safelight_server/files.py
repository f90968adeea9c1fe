"""Reads the operator's files: at start, and again when they have changed.

Invariants: only a regular file of bounded size is read, so that a FIFO or a device
in its place blocks nothing; after the start, files are read in a thread, never on the
event loop; a changed file that cannot be used changes nothing.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import structlog

log = structlog.get_logger(__name__)

T = TypeVar("T")
MAX_BYTES = 32 << 20
"""Bytes of the largest file that is read; about 270,000 API keys."""
MAX_FAULTS = 20
"""Faults of a file that an error lists; a wrong file may have a fault in each entry."""
LOOK_EVERY_S = 1.0

_Stamp = tuple[int, int, int, int]


class ConfigFileError(Exception):
    """A file that cannot be used; the message lists the faults."""


def faulty(path: Path, faults: Sequence[str]) -> ConfigFileError:
    """The error of a file with faults; it lists the first `MAX_FAULTS`."""
    more = len(faults) - MAX_FAULTS
    return ConfigFileError(f"{path}: {'; '.join(faults[:MAX_FAULTS])}{f'; and {more} more' if more > 0 else ''}")


def read_regular_file(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Returns the bytes of a file. Never blocks on a FIFO without a writer.

    Raises:
        OSError: the file cannot be read, is no regular file, or has more than `max_bytes` bytes.
    """
    _check_regular(path, path.stat())  # before opening, since opening a device can have effects
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        _check_regular(path, os.fstat(descriptor))  # the path may have been replaced meanwhile
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(max_bytes + 1)
    finally:
        os.close(descriptor)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"is larger than {max_bytes} bytes", str(path))
    return data


def _check_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise OSError(errno.EINVAL, f"is {kind}, must be a regular file", str(path))


_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


class WatchedFile(Generic[T]):
    """The parsed content of a file, which is read again when it changes.

    A new file that cannot be used is logged once, and the earlier content stays in force. A faulty file is read again
    when it changes; a file that could not be read is read again at the next check.

    Args:
        parse: parses the bytes; raises ConfigFileError.
        name: the kind of its content, in the plural, for the log.

    Attributes:
        content: the parsed content.

    Raises:
        ConfigFileError: the file cannot be read or used.
    """

    def __init__(self, path: Path, parse: Callable[[bytes], T], name: str) -> None:
        self._path = path
        self._parse = parse
        self._name = name
        self._stamp = _stamp(path)
        self._unreadable = ""
        try:
            self.content = parse(read_regular_file(path))
        except OSError as error:
            raise ConfigFileError(f"{path}: {error.strerror}") from None

    async def follow(self) -> None:
        """Checks once a second whether the file has changed, in a thread. Runs until it is cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            await asyncio.to_thread(self.look)

    def look(self) -> None:
        """Reads the file again if it has changed. May block."""
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            self._unreadable = ""
            return
        try:
            self.content = self._parse(read_regular_file(self._path))
        except OSError as error:
            what = f"{self._path}: {error.strerror}"
            if what != self._unreadable:
                self._not_reloaded(what)
            self._unreadable = what
            return
        except ConfigFileError as error:
            self._not_reloaded(str(error))
        else:
            log.info(f"{self._name}_reloaded", file=str(self._path))
        self._stamp, self._unreadable = stamp, ""

    def _not_reloaded(self, error: str) -> None:
        log.error(f"{self._name}_not_reloaded", error=error)


def _stamp(path: Path) -> _Stamp | None:
    """Times, size and inode of a file, which change when it is written or replaced; None: there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino
