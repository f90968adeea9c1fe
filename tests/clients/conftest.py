"""The runners of all languages, each built once."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients import cpp
from tests.clients.case import ROOT

CLIENTS = ROOT / "clients"
WEB = "typescript-web"
"""The TypeScript client for pages, run by Node."""
LANGUAGES = ("python", "go", "typescript", WEB, "cpp")
TSC = ROOT / "node_modules/.bin/tsc"


def is_here(language: str) -> bool:
    """Whether the machine has the toolchain of a language."""
    match language:
        case "python":
            return True
        case "typescript" | "typescript-web":
            return shutil.which("node") is not None and TSC.exists()
        case "cpp":
            return cpp.is_here()
        case _:
            return shutil.which(language) is not None


def require_go() -> None:
    """Skips the test where there is no Go."""
    if not is_here("go"):
        pytest.skip("no Go on this machine")


def require_typescript() -> None:
    """Skips the test where Node or its packages are missing."""
    if not is_here("typescript"):
        pytest.skip("no Node with the packages of package.json here (make node_modules/.installed)")


@pytest.fixture(scope="session")
def runners(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """The command of a language's runner. Skips the test where the machine lacks the toolchain."""

    @functools.cache
    def command(language: str) -> list[str]:
        match language:
            case "python":
                return [sys.executable, str(CLIENTS / "python/conformance.py")]
            case "go":
                require_go()
                return [str(build_go(tmp_path_factory.mktemp("go") / "conformance"))]
            case "typescript":
                require_typescript()
                subprocess.run([TSC, "--project", CLIENTS / "typescript"], check=True)
                return ["node", str(CLIENTS / "typescript/dist/conformance.js")]
            case "typescript-web":
                return [*command("typescript"), "--web"]
            case "cpp":
                cpp.require()
                return [str(cpp.build() / "conformance")]
            case _:
                raise ValueError(language)

    def build_go(program: Path) -> Path:
        subprocess.run(["go", "build", "-o", program, "./internal/conformance"], cwd=CLIENTS / "go", check=True)
        return program

    return command
