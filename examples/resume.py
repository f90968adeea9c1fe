"""Lose the connection in the middle of a generation, and continue from the same step over a new connection.

`Client.generate` does this by itself when a connection is lost. This example does it by hand, with plain gRPC calls, as
a client in another language would: remember the generation's name and the last sequence number, then call
WatchGeneration.
"""

import asyncio
import sys
import uuid

import safelight
from safelight.v1 import generation_pb2 as pb


async def begin(target: str) -> tuple[str, int]:
    """Starts a generation and cuts the connection after some steps; returns its name and last sequence number."""
    request = pb.GenerateRequest(request_id=str(uuid.uuid4()), spec=pb.GenerationSpec(prompt="a green leaf"))
    name, sequence = "", 0
    async with safelight.Client(target) as client:
        async for response in client.generations.Generate(request):
            event = response.event
            name, sequence = event.generation, max(sequence, event.sequence)
            if event.progress.step >= 5:  # a client that reads slowly does not hear of every step
                print(f"{name}: cut after step {event.progress.step}")
                break
    return name, sequence


async def resume(target: str, name: str, sequence: int) -> bytes:
    """Watches the rest of a generation and returns its picture."""
    picture, first = b"", True
    async with safelight.Client(target) as client:
        watch = pb.WatchGenerationRequest(name=name, after_sequence=sequence)
        async for response in client.generations.WatchGeneration(watch):
            event = response.event
            if event.HasField("progress") and first:
                print(f"{name}: goes on with step {event.progress.step}")
                first = False
            picture += event.artifact_chunk.data
    return picture


async def main(target: str = "127.0.0.1:8421") -> None:
    name, sequence = await begin(target)
    picture = await resume(target, name, sequence)
    print(f"{name}: a picture of {len(picture)} bytes")


asyncio.run(main(*sys.argv[1:]))
