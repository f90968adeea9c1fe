"""The operator's files: only regular ones are read, and again when they change, off the loop."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest
import structlog
from safelight_server import files
from safelight_server.app.backends import CredentialsError, _credentials
from safelight_server.files import ConfigFileError, WatchedFile, read_regular_file
from safelight_server.storage.keyring import Keyring, KeyringError

from tests.conftest import eventually


def parse(data: bytes) -> str:
    text = data.decode()
    if "!" in text:
        raise ConfigFileError("no exclamations")
    return text


def write(file: Path, text: str) -> Path:
    """Replaces the file as an editor or a secret mount does: a new inode under the old name."""
    new = file.with_suffix(".new")
    new.write_text(text)
    return new.replace(file)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "words.txt", "one")


def put_something_else(path: Path, kind: str) -> str:
    """Replaces a file by something that is not a regular file. Returns its description."""
    path.unlink(missing_ok=True)
    match kind:
        case "FIFO":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "socket":
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(str(path))
        case "large":
            path.write_bytes(b"")
            os.truncate(path, files.MAX_BYTES + 1)
            return f"is larger than {files.MAX_BYTES} bytes"
    return f"is a {kind}, must be a regular file"


KINDS = ("FIFO", "directory", "device", "socket", "large")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    """Opening a FIFO would wait for its writer; reading a device might never end."""
    path = tmp_path / "thing"
    what = put_something_else(path, kind)
    with pytest.raises(OSError, match="thing") as refused:
        read_regular_file(path)
    assert refused.value.strerror == what
    with pytest.raises(ConfigFileError, match=what):
        WatchedFile(path, parse, "words")
    with pytest.raises(KeyringError, match=what):
        Keyring.load(path)
    with pytest.raises(CredentialsError, match=what):
        _credentials(path)


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_in_its_place_changes_nothing_and_is_logged_once(file: Path, kind: str) -> None:
    watched = WatchedFile(file, parse, "words")
    what = put_something_else(file, kind)
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            watched.look()
    assert watched.content == "one"
    assert logs == [{"event": "words_not_reloaded", "error": f"{file}: {what}", "log_level": "error"}]


def test_a_fifo_that_comes_after_the_check_is_not_waited_for(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []

    def check(path: Path, status: os.stat_result) -> None:
        checked.append(status)
        if len(checked) == 1:
            put_something_else(path, "FIFO")
        else:
            real(path, status)

    real = files._check_regular
    monkeypatch.setattr(files, "_check_regular", check)
    with pytest.raises(OSError, match="is a FIFO"):
        read_regular_file(file)


def test_a_file_of_the_largest_size_is_read(file: Path) -> None:
    file.write_bytes(b"x" * 10)
    assert read_regular_file(file, 10) == b"x" * 10
    with pytest.raises(OSError, match="is larger than 9 bytes"):
        read_regular_file(file, 9)


@pytest.mark.parametrize("broken", ["no!", None])
def test_a_broken_file_is_logged_once_and_the_old_content_stays(file: Path, broken: str | None) -> None:
    watched = WatchedFile(file, parse, "words")
    if broken is None:
        file.unlink()
    else:
        write(file, broken)
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            watched.look()
            assert watched.content == "one"
    assert [line["event"] for line in logs] == ["words_not_reloaded"]
    write(file, "three")
    watched.look()
    assert watched.content == "three"


def test_a_file_that_could_not_be_read_is_tried_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example if no file descriptor is free: a revoked key must not stay valid. Each failure is logged once."""
    watched = WatchedFile(file, parse, "words")

    def look(error: int | None) -> None:
        with monkeypatch.context() as patched:
            if error is not None:
                patched.setattr(files, "read_regular_file", Mock(side_effect=OSError(error, os.strerror(error))))
            watched.look()

    write(file, "two")
    with structlog.testing.capture_logs() as logs:
        for error in (errno.EMFILE, errno.EMFILE, errno.EIO, errno.EIO, None, None):
            look(error)
    assert [line["event"] for line in logs] == ["words_not_reloaded", "words_not_reloaded", "words_reloaded"]
    assert watched.content == "two"
    write(file, "three")
    with structlog.testing.capture_logs() as logs:
        look(errno.EIO)
    assert [line["event"] for line in logs] == ["words_not_reloaded"], "it is a new failure"


async def test_a_changed_file_is_read_off_the_loop(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hanging disk must not block the event loop."""
    monkeypatch.setattr(files, "LOOK_EVERY_S", 0.001)
    watched = WatchedFile(file, parse, "words")
    reading, answer = threading.Event(), threading.Event()

    def hanging(path: Path) -> bytes:
        reading.set()
        answer.wait(5)
        return path.read_bytes()

    monkeypatch.setattr(files, "read_regular_file", hanging)
    write(file, "two")
    following = asyncio.create_task(watched.follow())
    await eventually(reading.is_set)
    assert watched.content == "one"
    answer.set()
    await eventually(lambda: watched.content == "two")
    following.cancel()
    await asyncio.wait([following])
