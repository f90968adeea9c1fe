"""Nothing is reported to the makers of libraries: ONNX Runtime's telemetry is off wherever it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SWITCH = 'os.environ["ORT_DISABLE_TELEMETRY"] = "1"'
PACKAGES = {"load_tests": "load_tests/__init__.py", "tests": "tests/conftest.py", "training": "training/__init__.py"}
"""The module that is imported before every other module of a folder."""


def importers() -> list[Path]:
    """Python files that import onnxruntime."""
    folders = ("server", "clients", "deploy", "tools", *PACKAGES)
    files = [file.relative_to(ROOT) for folder in folders for file in (ROOT / folder).rglob("*.py")]
    return [at for at in files if any(is_import(line) for line in (ROOT / at).read_text().splitlines())]


def is_import(line: str) -> bool:
    return line.strip().startswith(("import onnxruntime", "from onnxruntime"))


def test_some_files_import_it():
    assert {"server", "deploy", *PACKAGES} == {file.parts[0] for file in importers()}


@pytest.mark.parametrize("file", importers(), ids=str)
def test_telemetry_is_off_before_the_import(file):
    package = PACKAGES.get(file.parts[0])
    lines = (ROOT / (package or file)).read_text().splitlines()
    first = len(lines) if package else next(index for index, line in enumerate(lines) if is_import(line))
    assert SWITCH in lines[:first]


@pytest.mark.parametrize("file", ["Dockerfile", "deploy/triton/serve"])
def test_telemetry_is_off_for_processes_of_others(file):
    text = (ROOT / file).read_text()
    assert "ORT_DISABLE_TELEMETRY=1" in text or '"ORT_DISABLE_TELEMETRY": "1"' in text


@pytest.mark.parametrize(
    "module", ["cli.main", "app.server", "runtime.simulated", "runtime.triton", "catalog.catalog", "catalog.export"]
)
def test_only_the_runtime_that_needs_it_imports_it(module):
    code = f"import sys, safelight_server.{module}; sys.exit('onnxruntime' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment(Path("/nowhere")))


def test_help_and_the_runtime_leave_nothing_in_the_home_folder(tmp_path):
    for code in ("from safelight_server.cli.main import main; main()", "import safelight_server.runtime.onnx"):
        command = [sys.executable, "-c", code, "--help"]
        subprocess.run(command, check=True, cwd=ROOT, env=environment(tmp_path), stdout=subprocess.DEVNULL)
    assert list(tmp_path.rglob("*")) == []


def environment(home: Path) -> dict[str, str]:
    """The environment of a user without any settings."""
    kept = {name: value for name, value in os.environ.items() if "TELEMETRY" not in name and not name.startswith("XDG")}
    return kept | {"HOME": str(home), "PYTHONPATH": f"{ROOT / 'server'}:{ROOT / 'clients/python'}"}
