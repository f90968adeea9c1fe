"""`safelight fetch`: copied files, refused files, and files that remain after a failure."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
from safelight_server.cli.fetch import FetchError, fetch, parse_sums


@pytest.fixture
def source(tmp_path):
    """A folder with a file of two pieces and one in a folder, and its list of digests."""
    folder = tmp_path / "bucket"
    (folder / "repository").mkdir(parents=True)
    (folder / "repository" / "model.onnx").write_bytes(b"weights" * 2_000_000)
    (folder / "pipeline.json").write_bytes(b"{}")
    paths = ("repository/model.onnx", "pipeline.json")
    lines = [f"{hashlib.sha256((folder / path).read_bytes()).hexdigest()}  {path}" for path in paths]
    sums = tmp_path / "SHA256SUMS"
    sums.write_text("\n".join(lines) + "\n")
    return folder, sums


def test_files_are_copied_once(source, tmp_path, capsys):
    folder, sums = source
    out = tmp_path / "models"
    fetch(folder.as_uri(), sums, out)
    assert (out / "repository/model.onnx").read_bytes() == (folder / "repository/model.onnx").read_bytes()
    (folder / "pipeline.json").unlink()
    (out / "repository/model.onnx").write_bytes(b"half")
    capsys.readouterr()
    fetch(folder.as_uri(), sums, out)
    assert capsys.readouterr().out == "fetched  repository/model.onnx\nis there  pipeline.json\n"


def test_a_file_with_another_digest_is_not_left_under_its_name(source, tmp_path):
    folder, sums = source
    (folder / "repository/model.onnx").write_bytes(b"weights of somebody else")
    with pytest.raises(FetchError, match=r"repository/model.onnx: has SHA-256 .* and should have"):
        fetch(folder.as_uri(), sums, tmp_path / "models")
    assert list((tmp_path / "models").rglob("*.*")) == []


def test_what_cannot_be_fetched_is_named(source, tmp_path):
    folder, sums = source
    (folder / "pipeline.json").unlink()
    with pytest.raises(FetchError, match=r"pipeline.json: "):
        fetch(folder.as_uri(), sums, tmp_path / "models")
    with pytest.raises(FetchError, match=r"^nowhere://x: "):
        fetch("nowhere://x", sums, tmp_path / "models")
    with pytest.raises(FetchError, match=r"^--sums "):
        fetch(folder.as_uri(), tmp_path / "none", tmp_path / "models")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "lists no file"),
        ("abc  x\n", "line 1: must be DIGEST"),
        (f"{'0' * 64}  ../x\n", "line 1: ../x: must be a path below"),
        (f"{'0' * 64}  /x\n", "line 1: /x: must be a path below"),
        (f"{'0' * 64}  x\n{'1' * 64}  ./x\n", "line 2: ./x: has two digests"),
    ],
)
def test_faulty_lists_are_refused(text, fault):
    with pytest.raises(FetchError, match=fault):
        parse_sums(text)


def test_sums_are_those_of_sha256sum():
    assert parse_sums(f"{'0' * 64}  ./a b\n\n{'1' * 64}  c/d\n") == {"a b": "0" * 64, "c/d": "1" * 64}


def test_the_command_says_in_one_line_what_is_wrong(source, tmp_path):
    folder, sums = source
    (folder / "pipeline.json").write_bytes(b"{ }")
    command = [sys.executable, "-m", "safelight_server", "fetch", folder.as_uri()]
    ended = subprocess.run([*command, "--sums", sums, "--out", tmp_path / "models"], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "pipeline.json: has SHA-256" in ended.stderr
