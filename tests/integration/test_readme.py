"""What the README shows works: its Python program and its commands, against a real server."""

from __future__ import annotations

import asyncio
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.integration.test_cache import kept

README = (Path(__file__).parent.parent.parent / "README.md").read_text()
ADDRESS = "127.0.0.1:8421"


async def run(folder: Path, *command: str) -> str:
    """Runs a Python program in `folder`; its output."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()
    return out.decode()


@pytest.mark.timeout(180)
async def test_the_python_program_and_each_generate_command_write_their_pictures(start, tmp_path):
    [program] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    commands = re.findall(r"^    \.venv/bin/safelight (generate .*)$", README, re.MULTILINE)
    assert ADDRESS in program
    assert len(commands) > 3
    generation = ""
    async with start() as running:
        assert (await run(tmp_path, "-c", program.replace(ADDRESS, running.address))).startswith("step 1: ")
        assert (tmp_path / "key.png").read_bytes().startswith(b"\x89PNG")
        for line in commands:
            arguments = shlex.split(line.replace("generations/ID", generation))
            said = await run(tmp_path, "-m", "safelight_server.cli.main", *arguments, "--target", running.address)
            generation = generation or re.findall(r"generations/\w+", said)[-1]
            assert (tmp_path / arguments[arguments.index("--out") + 1]).stat().st_size
            await kept(running)
