"""Runs the examples as users do: each program in a process of its own, against a real server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.integration.test_readme import run

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def example(name: str) -> str:
    """The path of an example; `test_each_example_is_run_by_a_test` looks for calls of this function."""
    return str(EXAMPLES / name)


@pytest.fixture
async def address(start):
    async with start() as running:
        yield running.address


async def test_ten_lines(address, tmp_path):
    await run(tmp_path, example("ten_lines.py"), address)
    assert (tmp_path / "key.png").read_bytes().startswith(b"\x89PNG")
    program = (EXAMPLES / "ten_lines.py").read_text()
    lines = [line for line in program.splitlines() if line and not line.startswith(('"""', "import", "from"))]
    assert len(lines) <= 10


async def test_previews_are_arrays_and_come_closer_to_the_picture(address, tmp_path):
    said = await run(tmp_path, example("previews_to_numpy.py"), address)
    shapes = re.findall(r"^(step \d+|picture): \((\d+), (\d+), 4\)", said, re.MULTILINE)
    assert len(shapes) > 2
    assert shapes[0][0].startswith("step ")
    assert shapes[-1] == ("picture", "128", "128")


async def test_a_cut_connection_is_resumed_from_its_step(address, tmp_path):
    said = await run(tmp_path, example("resume.py"), address)
    [cut] = re.findall(r"cut after step (\d+)", said)
    [step] = re.findall(r"goes on with step (\d+)", said)
    assert int(step) >= int(cut) >= 5, "it did not begin again"
    [size] = re.findall(r"a picture of (\d+) bytes", said)
    assert int(size) > 0


async def test_a_branch_begins_where_the_first_picture_was(address, tmp_path):
    said = await run(tmp_path, example("branch.py"), address)
    [skipped] = re.findall(r"^branched: (\d+) steps were not made again$", said, re.MULTILINE)
    assert int(skipped) > 0
    assert (tmp_path / "branch.png").read_bytes() != (tmp_path / "potion.png").read_bytes()


def test_each_example_is_run_by_a_test_and_listed():
    tests = Path(__file__).read_text() + (EXAMPLES.parent / "tests/redis/test_examples.py").read_text()
    listed = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'example("{path.name}")' in tests
        assert f"`{path.name}`" in listed
