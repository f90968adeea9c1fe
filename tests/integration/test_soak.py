"""Two hundred rude clients at once: afterwards nothing of theirs is left, and the scheduler's state is consistent."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import uuid
from dataclasses import asdict

import grpc
import pytest
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight_server.runtime.base import RuntimeFailure

from tests.conftest import eventually

CLIENTS, ROUNDS, CONNECTIONS = 200, 5, 10
GENERATE = "/safelight.v1.GenerationService/Generate"
EXPECTED = {
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.UNAVAILABLE,
}
SETTINGS = {
    "runtime": "simulated",
    "num_instances": 2,
    "simulated_base_ms": 2.0,
    "simulated_row_ms": 0.02,
    "max_running_outputs": 24,
    "max_waiting_per_caller": 60,
    "max_streams_per_caller": 220,
    "max_lost": 40,
    "watcher_stall_s": 0.5,
    "resume_grace_s": 0.3,
    "idempotency_ttl_s": 5.0,
}
MEDIA_TYPES = ("image/jpeg", "image/webp", "image/png", "application/x-raw-rgba8")
METHODS = (
    pb.PREVIEW_METHOD_AUTO,
    pb.PREVIEW_METHOD_LINEAR,
    pb.PREVIEW_METHOD_TINY_DECODER,
    pb.PREVIEW_METHOD_FULL_DECODER,
)
MODES = (pb.CachePolicy.MODE_DEFAULT, pb.CachePolicy.MODE_BYPASS, pb.CachePolicy.MODE_ALLOW_SIMILAR)


class Rude:
    """A client that misbehaves at random."""

    def __init__(self, channel: grpc.aio.Channel, names: list[str], seed: int) -> None:
        self._channel = channel
        self._stub = stubs.GenerationServiceStub(channel)
        self._names = names
        self._dice = random.Random(seed)
        self.codes: list[grpc.StatusCode] = []

    async def round(self) -> None:
        """One call, ended in one of many ways."""
        try:
            await self._dice.choice((self._generate, self._generate, self._generate, self._watch, self._speak))()
        except grpc.aio.AioRpcError as error:
            self.codes.append(error.code())
        except asyncio.CancelledError:  # its own call, which it cancelled
            self.codes.append(grpc.StatusCode.CANCELLED)

    async def _generate(self) -> None:
        await self._read(self._stub.Generate(self._request(), timeout=self._timeout()))

    async def _watch(self) -> None:
        policy = self._policy()
        request = pb.WatchGenerationRequest(name=self._name(), after_sequence=self._dice.choice((0, 0, 1)))
        request.preview.CopyFrom(policy)
        await self._read(self._stub.WatchGeneration(request, timeout=self._timeout()))

    async def _speak(self) -> None:
        """Makes unary calls and senseless requests."""
        dice, name = self._dice, self._name()
        match dice.randrange(4):
            case 0:
                await self._stub.CancelGeneration(pb.CancelGenerationRequest(name=name))
            case 1:
                update = pb.UpdateGenerationRequest(name=name, preview=self._policy())
                update.scheduling.priority = dice.choice((1, 2, 3))
                await self._stub.UpdateGeneration(update)
            case 2:
                await self._stub.GetGeneration(pb.GetGenerationRequest(name=name))
            case 3:
                async for _ in self._channel.unary_stream(GENERATE)(dice.randbytes(dice.randrange(200))):
                    pass

    async def _read(self, call: grpc.aio.UnaryStreamCall) -> None:
        """Reads a stream to its end, slowly, or in part; then leaves, pauses reading, or cancels."""
        dice = self._dice
        leave_after, pause_s = dice.choice((0, 1, 3, 10, 1000, 1000)), dice.choice((0.0, 0.0, 0.02))
        if leave_after == 0:
            await asyncio.sleep(dice.random() * 0.02)
            call.cancel()
            return
        count = 0
        async for response in call:
            self._names.append(response.event.generation)
            count += 1
            if count == leave_after:
                if dice.random() < 0.2:
                    await asyncio.sleep(0.8)  # long enough to be ended as stalled, where buffers are full
                call.cancel()
                return
            await asyncio.sleep(pause_s * dice.random())

    def _timeout(self) -> float | None:
        return self._dice.choice((None, 0.005, 0.3 * self._dice.random(), 2.0))

    def _name(self) -> str:
        return self._dice.choice(self._names[-50:] or ["generations/nobody"])

    def _policy(self) -> pb.PreviewPolicy:
        dice = self._dice
        if dice.random() < 0.1:
            return pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE)
        encoding = pb.PixelEncoding(media_type=dice.choice(MEDIA_TYPES))
        return pb.PreviewPolicy(accept=[encoding], method=dice.choice(METHODS), every_n_steps=dice.choice((1, 1, 4)))

    def _request(self) -> pb.GenerateRequest:
        dice = self._dice
        outputs = [pb.OutputSpec(seed=dice.randrange(4)) for _ in range(dice.choice((1, 1, 1, 3)))]
        request = pb.GenerateRequest(
            spec=pb.GenerationSpec(
                prompt=f"picture {dice.randrange(6)}",
                num_inference_steps=dice.choice((1, 4, 20, 60)),
                guidance_scale=dice.choice((1.0, 3.0)),
                outputs=outputs,
            ),
            preview=self._policy(),
            encoding=pb.PixelEncoding(media_type=dice.choice(MEDIA_TYPES)),
            scheduling=pb.Scheduling(priority=dice.choice((1, 2, 3))),
            cache=pb.CachePolicy(mode=dice.choice(MODES)),
        )
        if dice.random() < 0.2:
            request.request_id = str(uuid.UUID(int=dice.randrange(40), version=4))
        if dice.random() < 0.2:
            request.disconnect.action = pb.DisconnectPolicy.ACTION_DETACH
        if dice.random() < 0.1 and len(outputs) == 1:
            request.branch.CopyFrom(pb.Branch(generation=self._name(), step=dice.randrange(1, 20)))
        return request


@pytest.mark.timeout(180)
async def test_nothing_is_left_of_two_hundred_rude_clients(start, capfd):
    async with start(**SETTINGS) as running, contextlib.AsyncExitStack() as connections:
        quiet = _tasks()
        _fail_now_and_then(running.runtime)
        channels = []
        for _ in range(CONNECTIONS):
            channel = grpc.aio.insecure_channel(running.address, [("grpc.use_local_subchannel_pool", 1)])
            channels.append(await connections.enter_async_context(channel))
        names: list[str] = []
        clients = [Rude(channels[number % CONNECTIONS], names, number) for number in range(CLIENTS)]
        checking = asyncio.create_task(_check_often(running.generations._engine.scheduler))
        for _ in range(ROUNDS):
            await asyncio.gather(*(client.round() for client in clients))
            assert not checking.done(), checking.exception()
        checking.cancel()
        codes = {code for client in clients for code in client.codes}
        assert codes <= EXPECTED, "no bug, whatever they do"
        assert len(codes) > 4, "they do many things"
        await connections.aclose()
        await eventually(lambda: not running.inspect().live, 60)
        await eventually(lambda: len(running.streams) == 0)
        await eventually(lambda: _tasks() == quiet)
        _nothing_is_left(running)
    gc.collect()
    printed = "".join(capfd.readouterr())
    assert "Traceback" not in printed
    assert "never retrieved" not in printed


def _tasks() -> set[str]:
    """Names of running tasks; an idle server has one of each."""
    return {task.get_coro().__qualname__ for task in asyncio.all_tasks()}


async def _check_often(scheduler) -> None:
    while True:
        scheduler.check_invariants()
        await asyncio.sleep(0.002)


def _fail_now_and_then(runtime) -> None:
    run, dice = runtime.run, random.Random(0)

    async def run_or_fail(*what):
        if dice.random() < 0.02:
            raise RuntimeFailure("unplugged", retryable=True)
        return await run(*what)

    runtime.run = run_or_fail


def _nothing_is_left(running) -> None:
    generations, engine = running.generations, running.generations._engine
    engine.scheduler.check_invariants()
    held = {name for name, number in asdict(running.inspect()).items() if number}
    assert held <= {"finished", "keeping"}
    assert (
        not engine._observers
        and not engine._unstarted
        and not engine._tasks
        and not engine._deferred
        and not engine._embedding_waiters
    )
    batches = engine._batches
    assert not batches.outputs and not batches.encoder_inputs and not batches._embeddings and not batches._departed
    for latents in batches._latents.values():
        assert sorted(latents._free) == list(range(len(latents._in_flight)))
        assert not latents._abandoned and not any(latents._in_flight)
    for ended in generations._finished.values():
        assert not ended.log.watchers and not ended.log._feeds and not ended._encode_tasks
        assert all(output.output_id == 0 for output in ended.outputs), "a member of nothing"
        assert all(output.reason is not None for output in ended.outputs)
