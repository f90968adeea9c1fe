"""The command line: its help, how quickly it starts, and its one line and exit code where a command fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safelight_server.cli import main
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent.parent
NOBODY = "unix:/nowhere/socket"
"""A target at which nothing listens."""


def failed(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    """The exit code and the error of a command."""
    monkeypatch.setattr(sys, "argv", ["safelight", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main.main()
    return int(ended.value.code or 0), capsys.readouterr().err.strip()


def test_a_client_s_command_imports_no_server():
    """It would take twice as long to start."""
    code = (
        "import sys, safelight_server.cli.main\n"
        "heavy = {'safelight_server.app.server', 'safelight_server.catalog.catalog', 'redis', 'starlette', 'numpy'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert done.stderr == ""
    assert done.returncode == 0


def test_the_help_lists_each_command_the_common_ones_first():
    said = CliRunner().invoke(main.app, ["--help"])
    assert said.exit_code == 0, said.output
    listed = [line.split()[0] for line in said.output.partition("Commands:")[2].splitlines() if line[:3].strip()]
    assert listed[: len(main.ORDER)] == list(main.ORDER)
    assert set(main.IMPORTED_WHEN_NAMED) <= set(listed)
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("command", main.IMPORTED_WHEN_NAMED)
def test_a_command_that_is_imported_when_named_has_its_help(command):
    said = CliRunner().invoke(main.app, [command, "--help"])
    assert said.exit_code == 0, said.output
    assert said.output.startswith("Usage: ")
    assert f" {command} [OPTIONS]" in said.output


def test_a_picture_that_could_not_be_written_is_not_asked_for(monkeypatch, capsys, tmp_path):
    missing = tmp_path / "missing" / "picture.png"
    asked = failed(monkeypatch, capsys, "generate", "x", "--target", NOBODY, "--out", missing)
    assert asked == (2, f"safelight: --out {missing}: there is no folder {missing.parent}; make it first")
    folder = tmp_path / "folder.png"
    folder.mkdir()
    asked = failed(monkeypatch, capsys, "generate", "x", "--target", NOBODY, "--out", folder)
    assert asked == (2, f"safelight: --out {folder}: is a folder; add the name of a file")


def test_a_server_that_cannot_be_reached_is_a_line_with_what_to_check(monkeypatch, capsys):
    code, said = failed(monkeypatch, capsys, "models", "--target", NOBODY)
    assert code == 1
    assert said.startswith("safelight: UNAVAILABLE: ")
    assert said.endswith("; check --target, and whether `safelight serve` runs there")
    assert "\n" not in said


def test_a_health_check_fails_with_1(monkeypatch, capsys):
    """Docker reserves 2."""
    code, said = failed(monkeypatch, capsys, "health", "--target", NOBODY)
    assert code == 1
    assert said.startswith(f"safelight: {NOBODY}: ")


def test_a_demo_that_cannot_write_develops_nothing(tmp_path):
    file = tmp_path / "file"
    file.touch()
    command = [sys.executable, "-m", "safelight_server.cli.main", "demo", "--out", str(file / "demo")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)  # apart, as it configures logs
    assert (done.returncode, done.stderr) == (2, f"safelight: {file / 'demo'}: Not a directory\n")
    assert "listens" not in done.stdout
