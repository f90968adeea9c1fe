"""The folder in which an export is written before its files are moved to their places.

Invariant: what a killed export has left is removed by the next one. An export holds a
lock on its folder while it lives, so that no other export removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safelight_server.export.source import ExportError

PREFIX = ".export-"
OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


@contextlib.contextmanager
def staging_folder(models: Path) -> Iterator[Path]:
    """A new folder in the folder of models, removed at the end of the block.

    Raises:
        ExportError: a file cannot be written, in the block too.
    """
    try:
        models.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            with _locked(models):  # else another export could take a folder that is not locked yet for a left one
                _remove_left(models)
                place = Path(tempfile.mkdtemp(dir=models, prefix=PREFIX))
                held.callback(shutil.rmtree, place, ignore_errors=True)
                held.enter_context(_locked(place))
            yield place
    except OSError as error:
        about = Path(os.fspath(error.filename)) if isinstance(error.filename, str) else models
        is_write = about.is_relative_to(models) or error.errno in OF_WRITING
        what = "write" if is_write else "read or write"
        raise ExportError(f"--models-dir {models}: cannot {what} {about}: {error.strerror or error}") from None


def _remove_left(models: Path) -> None:
    for place in models.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), _locked(place, fcntl.LOCK_NB):
            shutil.rmtree(place)


@contextlib.contextmanager
def _locked(place: Path, more: int = 0) -> Iterator[None]:
    """Holds the lock of a folder.

    Raises:
        OSError: it has no lock here, or (`fcntl.LOCK_NB`) another process holds it.
    """
    descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | more)
        yield
    finally:
        os.close(descriptor)
