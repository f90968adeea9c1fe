"""Tests of the Rust client alone: its lints and unit tests, and its flow-control windows."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import safelight
from safelight.v1 import generation_pb2 as pb

from tests.clients.test_readmes import run
from tests.clients.toolchains import require
from tools.clients import rust


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "command",
    [
        "fmt --check",
        "clippy --quiet --all-targets -- -D warnings",
        "test --quiet",
        "doc --quiet --no-deps",
        "package --quiet --no-verify --allow-dirty",
    ],
    ids=lambda command: command.split()[0],
)
async def test_it_passes_its_own_checks(command: str) -> None:
    require("rust")
    environment = rust.ENVIRONMENT | {"RUSTDOCFLAGS": "-D warnings"}
    await run(rust.SOURCE, str(rust.CARGO), *command.split(), **environment)


@pytest.mark.timeout(300)
async def test_streams_that_nobody_reads_hold_up_none_and_dropped_ones_suspend(start, runners, tmp_path: Path) -> None:
    runners("rust")
    source = Path(__file__).with_name("streams.rs").read_text()
    program = await asyncio.to_thread(rust.build_program, tmp_path, source)
    async with start(runtime="simulated") as server, safelight.Client(server.address) as client:
        process = await asyncio.create_subprocess_exec(
            program, server.address, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdin is not None and process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 60) == b"read image/png\n"
        word, name = (await asyncio.wait_for(process.stdout.readline(), 60)).split()
        assert word == b"dropped"
        async with asyncio.timeout(30):
            while (await client.get(name.decode())).state != pb.Generation.STATE_SUSPENDED:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await process.communicate(b"\n")
    assert process.returncode == 0
