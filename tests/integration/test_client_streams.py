"""The Python client beyond the loop over events: shorthands, watching, cancelling, retries, use without asyncio."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from safelight import Accepted, Client, Finished, GenerationError, Picture, Preview, Progress, SyncClient
from safelight.v1 import generation_pb2 as pb

from tests.conftest import eventually


@pytest.fixture
async def simulated(start):
    async with start(runtime="simulated", simulated_base_ms=5.0, simulated_row_ms=0.0) as running:
        yield running


async def test_whoever_wants_only_the_pictures_awaits_them(simulated):
    async with Client(simulated.address) as client:
        image = await client.generate("x", seed=1, steps=2).image()
        assert image.size == (128, 128)
        assert (await client.generate("x", seed=1, steps=2).picture()).image().tobytes() == image.tobytes()
        pictures = await client.generate("x", seeds=[1, 2, 3], steps=2, previews=False).pictures()
        assert [(picture.output_index, picture.seed) for picture in pictures] == [(0, 1), (1, 2), (2, 3)]
        with pytest.raises(GenerationError) as caught:
            await client.generate("x", width=1, height=1).image()
        assert "spec.width_px" in caught.value.violations


async def test_accepted_comes_first_and_names_the_generation(simulated):
    async with Client(simulated.address) as client:
        first, *_, last = [event async for event in client.generate("x" * 100, steps=2)]
        assert isinstance(first, Accepted) and isinstance(last, Finished)
        assert first.generation == last.generation
        assert len(first.seeds) == 1 and not first.durable
        assert list(first.warnings) == ["PROMPT_TRUNCATED"]
        again = [event async for event in client.watch(first.generation, previews=False)]
        assert [type(event) for event in again] == [Accepted, Picture, Finished]
        assert (first.width_px, first.height_px) == (again[1].width_px, again[1].height_px)
        assert (await client.get(first.generation)).state == pb.Generation.STATE_SUCCEEDED
        with pytest.raises(GenerationError) as caught:
            await client.get("generations/none")
        assert caught.value.reason == "GENERATION_NOT_FOUND"


async def test_a_cancel_is_answered_with_the_step(simulated):
    async with Client(simulated.address) as client:
        name, ended = "", None
        with pytest.raises(GenerationError) as caught:
            async for event in client.generate("x", steps=900):
                if isinstance(event, Accepted):
                    name = event.generation
                elif isinstance(event, Progress) and ended is None:
                    ended = await client.cancel(name)
        assert caught.value.reason == "GENERATION_CANCELLED"
        assert ended is not None and ended.state == pb.Generation.STATE_CANCELLED
        assert 0 < ended.outputs[0].step < 900


async def test_a_program_without_asyncio(simulated):
    def program() -> None:
        with SyncClient(simulated.address) as client:
            assert client.generate("x", seed=1, steps=2).image().size == (128, 128)
            assert [model.name for model in client.models()] == ["models/simulated"]
            events = list(client.generate("x", seed=2, steps=100))
            assert isinstance(events[0], Accepted) and isinstance(events[-1], Finished)
            assert any(isinstance(event, Preview) for event in events)
            assert [type(event) for event in client.watch(events[0].generation)][-1] is Finished
            assert client.get(events[0].generation).state == pb.Generation.STATE_SUCCEEDED
            with client.generate("x", steps=900) as endless:
                for event in endless:
                    if isinstance(event, Progress):
                        break
            with pytest.raises(GenerationError) as caught:
                list(client.generate("x", steps=0))
            assert list(caught.value.violations) == ["spec.num_inference_steps"]

    await asyncio.to_thread(program)
    await eventually(lambda: simulated.inspect().suspended == 1)


NOTHING = grpc.aio.Metadata()


class Full:
    """A fake server whose queue is full for a number of calls; then the generation finishes at once."""

    def __init__(self, refusals: int, retry_after_s: float) -> None:
        self.asked_at: list[float] = []
        self._refusals = refusals
        self._retry_after_s = retry_after_s

    def Generate(self, _request, *, timeout, metadata):  # noqa: N802  # gRPC's name
        self.asked_at.append(asyncio.get_running_loop().time())
        return self

    def cancel(self) -> None:
        pass

    async def __aiter__(self):
        if len(self.asked_at) <= self._refusals:
            raise grpc.aio.AioRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, NOTHING, self._trailers(), "full")
        yield pb.GenerateResponse(event=pb.GenerationEvent(generation="generations/a", sequence=1, finished={}))

    def _trailers(self) -> grpc.aio.Metadata:
        details = [any_pb2.Any(), any_pb2.Any()]
        details[0].Pack(error_details_pb2.ErrorInfo(reason="QUEUE_FULL"))
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(int(1e3 * self._retry_after_s))
        details[1].Pack(retry)
        status = status_pb2.Status(code=8, details=details)
        return grpc.aio.Metadata(("grpc-status-details-bin", status.SerializeToString()))


@pytest.mark.parametrize(
    ("refusals", "retries", "timeout_s", "asked"),
    [
        (2, 3, None, 3),
        (3, 3, 60.0, 4),
        (4, 3, None, None),  # one refusal too many
        (1, 0, None, None),
        (1, 3, 0.1, None),  # the deadline would have passed
    ],
)
async def test_a_refusal_is_retried_when_the_server_said(monkeypatch, refusals, retries, timeout_s, asked):
    stub = Full(refusals, 0.2)
    monkeypatch.setattr(Client, "_generations", lambda _client, _at: stub)
    async with (
        Client("127.0.0.1:1", retries=retries) as client,
        aclosing(client.generate("x", timeout_s=timeout_s)) as events,
    ):
        if asked is None:
            with pytest.raises(GenerationError) as caught:
                await anext(events)
            assert (caught.value.reason, caught.value.retry_after_s) == ("QUEUE_FULL", 0.2)
            assert len(stub.asked_at) == (retries + 1 if timeout_s is None else 1)
        else:
            assert isinstance(await anext(events), Finished)
            assert len(stub.asked_at) == asked
    waits = [after - before for before, after in zip(stub.asked_at, stub.asked_at[1:], strict=False)]
    assert all(wait >= 0.2 for wait in waits), "never before"
