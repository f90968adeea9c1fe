"""Runs the README's Python program and commands against a real server."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from load_tests.ports import free_port
from tests.integration.test_cache import kept

README = (Path(__file__).parent.parent.parent / "README.md").read_text()
HTTP_PAGE = (Path(__file__).parent.parent.parent / "docs/http.md").read_text()
ADDRESS, HTTP_ADDRESS = "127.0.0.1:8421", "127.0.0.1:8080"


async def run(folder: Path, *command: str, program: str = sys.executable) -> str:
    """Runs a program, Python by default, in `folder` and returns its output."""
    process = await asyncio.create_subprocess_exec(
        program, *command, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()
    return out.decode()


def python_program(package: str, text: str = README) -> str:
    """The README's program that imports a package."""
    [program] = [
        code
        for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        if f"import {package}" in code or f"from {package}" in code
    ]
    return program


@pytest.mark.timeout(180)
async def test_the_python_program_and_each_generate_command_write_their_pictures(start, tmp_path):
    program = python_program("safelight")
    commands = re.findall(r"^    \.venv/bin/safelight (generate .*)$", README, re.MULTILINE)
    assert ADDRESS in program
    assert len(commands) > 3
    generation = ""
    async with start() as running:
        assert re.match(r"step \d+: ", await run(tmp_path, "-c", program.replace(ADDRESS, running.address)))
        assert (tmp_path / "key.png").read_bytes().startswith(b"\x89PNG")
        for line in commands:
            arguments = shlex.split(line.replace("generations/ID", generation))
            said = await run(tmp_path, "-m", "safelight_server.cli.main", *arguments, "--target", running.address)
            generation = generation or re.findall(r"generations/\w+", said)[-1]
            assert (tmp_path / arguments[arguments.index("--out") + 1]).stat().st_size
            await kept(running)


@pytest.mark.timeout(120)
async def test_the_programs_and_the_command_for_http_work(start, tmp_path):
    [command] = re.findall(r"^    curl (.*)$", README, re.MULTILINE)
    async with start(http_port=free_port()) as running:
        said = await run(tmp_path, "-c", python_program("openai").replace(HTTP_ADDRESS, running.http_address))
        assert said.splitlines()[0].startswith("image_generation.partial_image ")
        assert said.splitlines()[-1].startswith("image_generation.completed ")
        await run(tmp_path, "-c", python_program("openai", HTTP_PAGE).replace(HTTP_ADDRESS, running.http_address))
        assert (tmp_path / "step0.png").stat().st_size
        assert (tmp_path / "potion.png").read_bytes().startswith(b"\x89PNG")
        said = await run(tmp_path, *shlex.split(command.replace(HTTP_ADDRESS, running.http_address)), program="curl")
        assert json.loads(said)["data"][0]["b64_json"]
