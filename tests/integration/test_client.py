"""The client library and the command line against a real server: caches, branches, and what they say of them."""

from __future__ import annotations

import asyncio
import re
import sys
from contextlib import aclosing

import grpc
import pytest
from safelight import Branch, Client, Finished, GenerationError, Picture
from safelight.v1.generation_pb2 import GenerateRequest
from safelight_server.cli.main import main

from tests.conftest import eventually
from tests.integration.test_cache import kept

PROMPT = "a red potion on a dark background"


@pytest.fixture
async def server(start):
    async with start() as running, Client(running.address) as client:
        yield running, client


async def develop(client: Client, prompt: str = PROMPT, **how: object) -> tuple[Picture, Finished]:
    """The picture and the end of a short generation."""
    events = [event async for event in client.generate(prompt, **{"seed": 7, "steps": 6} | how)]
    assert isinstance(events[-2], Picture) and isinstance(events[-1], Finished)
    return events[-2], events[-1]


async def test_the_client_says_where_a_picture_came_from(server):
    running, client = server
    first, made = await develop(client)
    [origin] = made.origins
    assert (origin.disposition, origin.source, origin.num_steps_skipped) == ("miss", "", 0)
    await kept(running)
    second, again = await develop(client)
    [origin] = again.origins
    assert (origin.disposition, origin.source) == ("exact", made.generation)
    assert second.data == first.data
    _, anew = await develop(client, cache="bypass")
    assert [origin.disposition for origin in anew.origins] == ["miss"]
    _, near = await develop(client, "red potion, dark background", seed=8, cache="similar", min_similarity=0.5)
    [origin] = near.origins
    assert (origin.disposition, origin.source) == ("similar", made.generation)
    assert origin.similarity > 0.5
    _, branched = await develop(
        client, "a blue potion on a dark background", branch=Branch(generation=made.generation, step=3)
    )
    [origin] = branched.origins
    assert origin.disposition == "branched"
    assert branched.usage.num_steps == 6 - origin.num_steps_skipped < 6
    with pytest.raises(GenerationError) as caught:
        await develop(client, cache="similar", min_similarity=0.0)
    assert list(caught.value.violations) == ["cache.min_similarity"], "an explicit 0 is sent, and refused"


@pytest.fixture
async def simulated(start):
    async with start(runtime="simulated", simulated_base_ms=5.0, simulated_row_ms=0.0) as running:
        yield running


async def test_whoever_looks_away_lets_the_server_know(simulated):
    async with Client(simulated.address) as client:
        async with aclosing(client.generate("x", steps=900)) as events:
            async for _ in events:
                break
        [generation] = simulated.generations._live.values()
        await eventually(lambda: generation.state.name == "SUSPENDED")
        held = client.generate("x", steps=900)
        assert await anext(held)
        await held.aclose()
        await eventually(lambda: len(simulated.generations._suspended) == 2)


class Stub:
    """Calls that are lost at once; `deadlines` are what they were given."""

    def __init__(self) -> None:
        self.deadlines: list[float | None] = []

    def Generate(self, _request, *, timeout, metadata):  # noqa: N802  # gRPC's name
        self.deadlines.append(timeout)
        return self

    def __aiter__(self):
        return self

    async def __anext__(self):
        nothing = grpc.aio.Metadata()
        raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, nothing, nothing, "lost")

    def cancel(self) -> None:
        pass


async def lose(monkeypatch, **request: str) -> list[float | None]:
    """The deadlines of the calls that a client makes until it gives up."""
    stub = Stub()
    monkeypatch.setattr(Client, "generations", stub)
    async with Client("127.0.0.1:1") as client:
        with pytest.raises(GenerationError):
            async for _ in client.develop(GenerateRequest(**request), timeout_s=10.0):
                pass
    return stub.deadlines


async def test_all_connections_of_a_generation_share_one_deadline(monkeypatch):
    deadlines = await lose(monkeypatch, request_id="6f1c0a52-9b3e-4d0f-8a55-2f0c7d1e9b64")
    assert len(deadlines) == 6
    assert deadlines == sorted(set(deadlines), reverse=True)
    assert all(0 < deadline <= 10.0 for deadline in deadlines)


async def test_what_has_no_request_id_is_never_sent_again(monkeypatch):
    assert len(await lose(monkeypatch)) == 1


@pytest.mark.timeout(180)
async def test_the_command_line_asks_and_tells_the_same(server, tmp_path):
    running, client = server
    _, made = await develop(client)
    branch = ("--branch", f"{made.generation}@3", "--seed", "7", "--steps", "6")
    out = str(tmp_path / "picture.png")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "safelight_server.cli.main", "generate", "a blue potion on a dark background", *branch),
        *("--out", out, "--target", running.address),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    said, fault = await process.communicate()
    assert (process.returncode, fault) == (0, b"")
    assert re.search(r"generations/\w+  branched \(steps skipped \d\)", said.decode())
    assert (tmp_path / "picture.png").stat().st_size


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--branch", "generations/x"), "must be generations/ID@STEP"),
        (("--branch", "generations/x@-1"), "must be generations/ID@STEP"),
        (("--cache", "everything"), "everything"),
        (("--steps", "3000000000"), "--steps"),
        (("--model", "\udcff"), "--model: is not UTF-8"),
        (("--negative", "\udcff"), "--negative: is not UTF-8"),
        (("--sampler", "\udcff"), "--sampler: is not UTF-8"),
        (("--target", "\udcff"), "--target / SAFELIGHT_TARGET: is not UTF-8"),
        (("--target", ""), "--target / SAFELIGHT_TARGET: names no server"),
        (("--api-key", "a\rb"), "--api-key / SAFELIGHT_API_KEY: must be visible ASCII characters"),
    ],
)
def test_what_makes_no_sense_is_told_before_anyone_is_asked(arguments, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["safelight", "generate", "x", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert told in capsys.readouterr().err
