"""Fixtures: a Blender with the add-on, installed from its zip as users do."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.clients.case import ROOT
from tools import blender_addon

INSIDE = ROOT / "tests/blender/inside.py"
BOUND_S = 150.0
"""Seconds after which a Blender counts as hanging."""


@dataclass(frozen=True, slots=True)
class Blender:
    """Runs Blender with a home of its own.

    Attributes:
        home: where its preferences and add-ons are.
    """

    home: Path

    def answer(self, name: str) -> Path:
        """The file into which a function of inside.py writes its result."""
        return self.home / f"{name}.json"

    def command(self, name: str, *arguments: str | Path, background: bool = True) -> list[str | Path]:
        """The command line that calls a function of inside.py."""
        options = ["--background"] if background else []
        script = ["--python-exit-code", "1", "--python", INSIDE, "--", name, self.answer(name)]
        return ["blender", *options, *script, *arguments]

    @property
    def environment(self) -> dict[str, str]:
        folders = {"HOME": self.home, "BLENDER_USER_CONFIG": self.home, "BLENDER_USER_SCRIPTS": self.home / "scripts"}
        return os.environ | {name: str(folder) for name, folder in folders.items()}

    async def run(self, name: str, *arguments: str | Path) -> Any:
        """Calls a function of inside.py without a screen and returns its result."""
        async with self.running(*self.command(name, *arguments)) as process:
            said, _ = await asyncio.wait_for(process.communicate(), BOUND_S)
        assert process.returncode == 0, said.decode()[-8000:]
        return json.loads(self.answer(name).read_text())

    @asynccontextmanager
    async def running(self, *command: str | Path, **environment: str) -> AsyncIterator[asyncio.subprocess.Process]:
        """Starts a Blender, which is ended after the block."""
        process = await asyncio.create_subprocess_exec(
            *command,
            env=self.environment | environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


@pytest.fixture(scope="session")
def blender(tmp_path_factory: pytest.TempPathFactory) -> Blender:
    """A Blender with the add-on."""
    if shutil.which("blender") is None:
        pytest.skip("no Blender here (tools/install-system-packages blender)")
    addon = blender_addon.pack("linux", "3.11", ROOT / "out/blender")
    blender = Blender(tmp_path_factory.mktemp("blender"))
    (blender.home / "scripts").mkdir()
    done = subprocess.run(
        blender.command("install", addon),
        env=blender.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BOUND_S,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert json.loads(blender.answer("install").read_text()) == {"enabled": True}
    return blender
