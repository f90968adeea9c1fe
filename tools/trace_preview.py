"""Counts the modules and calls between a sampler step and the bytes of the preview that it leads to.

One generation on the simulated runtime (or `--runtime onnx`), with one stream of linear previews, in a real server of
this process. `sys.setprofile` sees every call of a function of `safelight_server` on the event loop's thread, from the
beginning of the first sampler step (`Latents.advance`) to the return of the serialized preview. What the loop does
beside the preview meanwhile (the next batch) counts too. Usage: .venv/bin/python tools/trace_preview.py [--list]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType

import grpc
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight_server.app.server import serving
from safelight_server.engine.latents import Latents
from safelight_server.settings import load
from safelight_server.stream import serialization

ROOT = Path(__file__).parent.parent
SERVER = str(ROOT / "server" / "safelight_server") + "/"


class CallTrace:
    """The calls of functions of the server between two of them."""

    def __init__(self, first: CodeType, last: CodeType) -> None:
        self.calls: list[tuple[str, str]] = []
        self._first = first
        self._last = last
        self._on = False

    def __call__(self, frame: FrameType, event: str, _argument: object) -> None:
        """As `sys.setprofile` calls it."""
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(SERVER):
            self._on = self._on or code is self._first
            if self._on:
                self.calls.append((code.co_filename.removeprefix(SERVER), code.co_name))
        elif event == "return" and self._on and code is self._last:
            sys.setprofile(None)


async def main() -> None:
    """Prints the counts."""
    options = argparse.ArgumentParser()
    options.add_argument("--runtime", default="simulated")
    options.add_argument("--list", action="store_true", help="also the calls, in order")
    given = options.parse_args()
    trace = CallTrace(Latents.advance.__code__, serialization.preview.__code__)
    settings = {"port": 0, "models_dir": ROOT / "models", "log_level": "error", "runtime": given.runtime}
    preview = pb.PreviewPolicy(method=pb.PREVIEW_METHOD_LINEAR)
    async with serving(load(**settings)) as running, grpc.aio.insecure_channel(running.address) as channel:
        request = pb.GenerateRequest(
            spec=pb.GenerationSpec(prompt="a red potion", num_inference_steps=8), preview=preview
        )
        sys.setprofile(trace)
        async for _ in stubs.GenerationServiceStub(channel).Generate(request):
            pass
    files = [file for file, _ in trace.calls]
    switches = sum(one != other for one, other in itertools.pairwise(files))
    print(f"{len(set(files))} modules, {len(files)} calls, {switches} switches between modules")
    for file, count in Counter(files).most_common():
        print(f"{count:5d} {file}")
    if given.list:
        print(*(f"{file} {name}" for file, name in trace.calls), sep="\n")


if __name__ == "__main__":
    asyncio.run(main())
