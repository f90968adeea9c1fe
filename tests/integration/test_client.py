"""The client library and the command line against a real server: caches, branches, and what they report."""

from __future__ import annotations

import asyncio
import re
import sys
from contextlib import aclosing

import grpc
import pytest
from PIL import Image
from safelight import Branch, Client, Finished, GenerationError, Picture, proxies
from safelight.v1.generation_pb2 import GenerateRequest, GenerateResponse, GenerationEvent
from safelight_server import wire
from safelight_server.cli.main import main
from safelight_server.domain.errors import QueueFullError

from tests.conftest import eventually
from tests.integration.test_cache import kept
from tests.support.draining import draining
from tests.support.relay import Relay

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
        await eventually(lambda: simulated.inspect().suspended == 2)


NOTHING = grpc.aio.Metadata()


UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


class Stub:
    """A fake server whose calls fail or succeed at once; `deadlines` are those of the calls."""

    def __init__(self, *events: GenerationEvent, lost: bool = True, code: grpc.StatusCode = UNAVAILABLE) -> None:
        self.deadlines: list[float | None] = []
        self._events = events
        self._lost = lost
        self._code = code

    def Generate(self, _request, *, timeout, metadata):  # noqa: N802  # gRPC's name
        self.deadlines.append(timeout)
        return self._call()

    def WatchGeneration(self, _request, *, timeout, metadata):  # noqa: N802  # gRPC's name
        self.deadlines.append(timeout)
        return self._call()

    def _call(self):
        return Call(list(self._events), self._lost, self._code)


class Call:
    def __init__(self, events: list[GenerationEvent], lost: bool, code: grpc.StatusCode) -> None:
        self._events = events
        self._lost = lost
        self._code = code

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self._events:
            return GenerateResponse(event=self._events.pop(0))
        await asyncio.sleep(0.01)  # so that all concurrent calls have begun
        if self._lost:
            raise grpc.aio.AioRpcError(self._code, NOTHING, NOTHING, "lost")
        raise StopAsyncIteration

    def cancel(self) -> None:
        pass


REQUEST_ID = "6f1c0a52-9b3e-4d0f-8a55-2f0c7d1e9b64"


async def lose(monkeypatch, stub: Stub, **request: str) -> GenerationError:
    """The error of a client whose patience has ended."""
    monkeypatch.setattr(Client, "_generations", lambda _client, _at: stub)
    monkeypatch.setattr("safelight.client.FIRST_WAIT_S", 0.01)
    async with Client("127.0.0.1:1", patience_s=1.0) as client:
        with pytest.raises(GenerationError) as caught:
            async for _ in client.develop(GenerateRequest(**request), timeout_s=30.0):
                pass
    return caught.value


async def test_all_connections_of_a_generation_share_one_deadline(monkeypatch):
    stub = Stub()
    await lose(monkeypatch, stub, request_id=REQUEST_ID)
    assert len(stub.deadlines) > 2
    assert stub.deadlines == sorted(set(stub.deadlines), reverse=True)
    assert all(0 < deadline <= 30.0 for deadline in stub.deadlines)


async def test_a_call_that_a_stopping_server_has_cancelled_is_sent_again(monkeypatch):
    stub = Stub(code=grpc.StatusCode.CANCELLED)
    failure = await lose(monkeypatch, stub, request_id=REQUEST_ID)
    assert len(stub.deadlines) > 2
    assert failure.code is UNAVAILABLE, "nobody has cancelled it"


async def test_a_wait_before_an_upload_ends_with_the_deadline(monkeypatch):
    """A wait beyond the deadline is not begun: the refusal, with its retry time, is raised at once."""
    full = QueueFullError(
        "as many uploads as may be",
        reason="TOO_MANY_UPLOADS",
        metadata={"bound": "uploads", "subject": "tenant", "limit": "4"},
        retry_after_s=3600.0,
    )
    asked: list[float | None] = []

    async def refuse(_channel: object, _metadata: object, _file: object, timeout_s: float | None) -> None:
        asked.append(timeout_s)
        trailers = grpc.aio.Metadata(*wire.trailing_metadata(full))
        raise grpc.aio.AioRpcError(full.status, NOTHING, trailers, full.message)

    monkeypatch.setattr("safelight.client.upload_missing", refuse)
    async with Client("127.0.0.1:1", patience_s=7200.0) as client, asyncio.timeout(30):
        with pytest.raises(GenerationError) as caught:
            await client.generate("x", init_image=b"a picture", timeout_s=5.0).picture()
    assert (caught.value.reason, len(asked)) == ("TOO_MANY_UPLOADS", 1)


async def test_what_has_no_request_id_is_never_sent_again(monkeypatch):
    stub = Stub()
    await lose(monkeypatch, stub)
    assert len(stub.deadlines) == 1


async def test_a_stream_that_ends_well_without_finished_is_resumed_then_an_error(monkeypatch):
    stub = Stub(GenerationEvent(generation="generations/a", sequence=1), lost=False)
    monkeypatch.setattr(Call, "__anext__", once(Call.__anext__))
    failure = await lose(monkeypatch, stub, request_id=REQUEST_ID)
    assert "the stream of generations/a ended before the generation had finished" in str(failure)
    assert failure.code is grpc.StatusCode.UNAVAILABLE
    assert len(stub.deadlines) > 2


def once(read):
    """Calls of which only the first has events."""
    seen: list[object] = []

    async def wrapped(call):
        if seen and call not in seen:
            raise StopAsyncIteration
        seen.append(call)
        return await read(call)

    return wrapped


async def test_generations_that_lose_a_server_together_all_ask_the_next_one(monkeypatch):
    """Otherwise each of them would move the client to the next server, past a server that works."""
    finished = Stub(GenerationEvent(generation="generations/a", sequence=1, finished={}), lost=False)
    stubs = [Stub(), finished, Stub()]
    monkeypatch.setattr(Client, "_generations", lambda _client, at: stubs[at])
    async with Client("127.0.0.1:1,127.0.0.1:2,127.0.0.1:3") as client:

        async def ask() -> list[object]:
            return [event async for event in client.develop(GenerateRequest(request_id=REQUEST_ID))]

        ended = await asyncio.gather(*(ask() for _ in range(24)))
    assert all(isinstance(events[-1], Finished) for events in ended)
    assert (len(stubs[0].deadlines), len(finished.deadlines), len(stubs[2].deadlines)) == (24, 24, 0)


async def test_who_is_refused_by_a_server_that_drains_makes_one_new_connection(simulated):
    """A load balancer leads it to another server. This works without retries, so it does not count as one."""
    async with draining() as refusing:
        relay = await Relay.start(refusing.address, simulated.address)
        async with Client(relay.address, retries=0, patience_s=20.0) as client:
            pictures = [client.generate(PROMPT, seed=seed, steps=2).picture() for seed in range(3)]
            assert [picture.seed for picture in await asyncio.gather(*pictures)] == [0, 1, 2]
        relay.cut()
    assert relay.num_connections == 2


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("127.0.0.1:8421", True),
        ("localhost:8421", True),
        ("[::1]:8421", True),
        ("dns:///localhost:8421", True),
        ("ipv4:127.0.0.2:8421", True),
        ("unix:/run/safelight.sock", True),
        ("safelight.example:8421", False),
        ("10.0.0.1:8421", False),
        ("[2001:db8::1]:8421", False),
    ],
)
def test_what_is_on_this_machine_is_asked_without_a_proxy(target, local, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://user:secret@proxy.example:3128")
    for name in ("grpc_proxy", "https_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert proxies.is_local(target) is local
    assert bool(proxies.channel_options(target)) is local
    assert proxies.proxy_of(target) == ("" if local else "http_proxy=http://proxy.example:3128")


def test_what_no_proxy_lists_is_asked_without_a_proxy(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", "safelight.example")
    assert proxies.proxy_of("safelight.example:8421") == ""


async def test_a_server_that_a_proxy_hides_is_an_error_that_names_the_proxy(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    async with Client("safelight.example:8421", patience_s=0.0) as client:
        with pytest.raises(GenerationError, match=r"through the proxy of http_proxy=http://127\.0\.0\.1:9"):
            async for _ in client.generate("x"):
                pass


async def test_a_server_on_this_machine_answers_where_a_proxy_is_set(simulated, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    async with Client(simulated.address, patience_s=0.0) as client:
        events = [event async for event in client.generate("x", steps=2)]
    assert isinstance(events[-1], Finished)


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


@pytest.mark.timeout(180)
async def test_the_command_line_starts_from_a_picture(server, tmp_path):
    running, _ = server
    init, mask, out = (tmp_path / f"{name}.png" for name in ("init", "mask", "out"))
    Image.new("RGB", (128, 128), "teal").save(init)
    half = Image.new("L", (128, 128), 0)
    half.paste(255, (0, 0, 64, 128))
    half.save(mask)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "safelight_server.cli.main", "generate", "a blue potion", "--steps", "4"),
        *(
            "--init",
            str(init),
            "--strength",
            "0.5",
            "--mask",
            str(mask),
            "--out",
            str(out),
            "--target",
            running.address,
        ),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    _, fault = await process.communicate()
    assert (process.returncode, fault) == (0, b"")
    with Image.open(out) as picture:
        assert picture.convert("RGB").crop((64, 0, 128, 128)).getcolors() == [(64 * 128, (0, 128, 128))]
        assert len(picture.convert("RGB").crop((0, 0, 64, 128)).getcolors(1 << 14)) > 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--branch", "generations/x"), "must be generations/ID@STEP"),
        (("--branch", "generations/x@-1"), "must be generations/ID@STEP"),
        (("--cache", "everything"), "everything"),
        (("--steps", "3000000000"), "--steps"),
        (("--init", "/nowhere.png"), "--init: /nowhere.png: No such file or directory"),
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
