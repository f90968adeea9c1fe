"""`Running.inspect()`: what a server holds in memory, while it works and afterwards."""

from __future__ import annotations

from dataclasses import asdict

import grpc
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs

from tests.conftest import eventually, serving_here
from tests.integration.test_requests import request


def numbers(running) -> dict[str, int]:
    return {name: number for name, number in asdict(running.inspect()).items() if number}


async def test_it_counts_what_is_held_and_nothing_is_left_but_results():
    slow = {"runtime": "simulated", "simulated_base_ms": 20, "num_instances": 1, "max_running_outputs": 1}
    async with serving_here(**slow) as running, grpc.aio.insecure_channel(running.address) as channel:
        assert numbers(running) == {}
        stub = stubs.GenerationServiceStub(channel)
        message = request(num_inference_steps=900)
        message.spec.outputs.extend(pb.OutputSpec(seed=seed) for seed in (1, 2))
        call = stub.Generate(message)
        name = (await call.read()).event.generation
        held = {"live": 1, "streams": 1, "outputs": 2, "running": 1, "waiting": 1, "latents": 1, "executions": 2}
        await eventually(lambda: numbers(running) == held)
        call.cancel()
        await eventually(lambda: running.inspect().suspended == 1 and not running.inspect().streams)
        await stub.CancelGeneration(pb.CancelGenerationRequest(name=name))
        await eventually(lambda: numbers(running) == {"finished": 1})
