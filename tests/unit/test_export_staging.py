"""The folder in which an export is written: what a killed one has left, and folders that cannot be written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safelight_server.export.source import ExportError
from safelight_server.export.staging import staging_folder

KILLED = """
import os, pathlib, sys
from safelight_server.export.staging import staging_folder

with staging_folder(pathlib.Path(sys.argv[1])) as place:
    (place / "weights").write_bytes(b"x" * 1000)
    os._exit(9)
"""


def test_what_a_killed_export_has_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "models"], env={"PYTHONPATH": ":".join(sys.path)})
    assert ended.returncode == 9
    [left] = (tmp_path / "models").iterdir()
    with staging_folder(tmp_path / "models") as place:
        assert list((tmp_path / "models").iterdir()) == [place]
    assert not left.exists()
    assert not list((tmp_path / "models").iterdir())


def test_what_another_export_is_writing_stays(tmp_path: Path) -> None:
    with staging_folder(tmp_path) as first:
        (first / "weights").write_bytes(b"x")
        with staging_folder(tmp_path) as second:
            assert {*tmp_path.iterdir()} == {first, second}
        assert (first / "weights").read_bytes() == b"x"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = pytest.raises(ExportError, match=r"--models-dir .*file/models: cannot write .*file.*: Not a directory")
    with refused, staging_folder(tmp_path / "file" / "models"):
        pass
    refused = pytest.raises(ExportError, match=r"--models-dir .*: cannot write /dev/full: No space left on device")
    with refused, staging_folder(tmp_path / "models"):
        raise OSError(28, "No space left on device", "/dev/full")
    assert not list((tmp_path / "models").iterdir())
