"""Counts the modules and calls between a sampler step and the bytes of the preview that it leads to.

It runs one generation on the simulated runtime (or `--runtime onnx`), with one stream of linear previews, on a real
server in this process. `sys.setprofile` records every call of a function of `safelight_server` on the event loop's
thread, from the first sampler step (`Latents.advance`) until gRPC gets the serialized preview. It prints two numbers:

- all modules that were called meanwhile, including those of other work (the next batch, the checkpoint and the progress
  of the same step);
- the modules that the preview passes through. A call counts if the preview is one of its arguments (except `self`), its
  result, or the result of a function that it called, or if the call is between two such calls on the stack. The forms
  of the preview, backwards from its bytes, are: the message, the encoded picture, the pixels, the frame, the latent,
  and every array that has this latent as a row.

The picture is sampled for the quality metrics, which also use previews.

Usage: .venv/bin/python tools/trace_preview.py [--list]
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import gc
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType

import grpc
import numpy as np
from google.protobuf.message import Message
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight_server.app.server import serving
from safelight_server.domain.picture import EncodedPicture
from safelight_server.engine.latents import Latents
from safelight_server.preview import Frame, RenderedPreview
from safelight_server.settings import load
from safelight_server.stream import serialization

ROOT = Path(__file__).parent.parent
SERVER = str(ROOT / "server" / "safelight_server") + "/"
CARRIERS = (np.ndarray, bytes, Message, Frame, RenderedPreview, EncodedPicture)
"""Types of the forms that a preview can have."""


@dataclass(eq=False, slots=True)
class Call:
    """One call of a function of the server, or one turn of a coroutine.

    Attributes:
        module: file of the function, relative to the package.
        caller: the nearest function of the server below it on the stack; None if there is none.
    """

    module: str
    function: str
    arguments: tuple[object, ...]
    caller: Call | None
    result: object = None
    passed: bool = False


class CallTrace:
    """Records the calls from the beginning of `first` until the result of `last` has left the server.

    Attributes:
        calls: the calls in order; those that were running when `first` was called come first.
        result: result of `last`.
    """

    def __init__(self, first: CodeType, last: CodeType) -> None:
        self.calls: list[Call] = []
        self.result: object = None
        self._first = first
        self._last = last
        self._under_way: list[Call] = []

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        """The profile function that `sys.setprofile` calls."""
        code = frame.f_code
        if not code.co_filename.startswith(SERVER):
            return
        if event == "call":
            if code is self._first and not self.calls:
                for caller in reversed(list(_callers(frame))):
                    self._begin(caller)
            if self.calls or code is self._first:
                self._begin(frame)
        elif event == "return" and self._under_way:
            self._under_way.pop().result = argument
            if code is self._last:
                self.result = argument
            if self.result is not None and not self._under_way:
                sys.setprofile(None)

    def _begin(self, frame: FrameType) -> None:
        code = frame.f_code
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        arguments = tuple(frame.f_locals[name] for name in names if name != "self" and name in frame.f_locals)
        caller = self._under_way[-1] if self._under_way else None
        call = Call(code.co_filename.removeprefix(SERVER), code.co_name, arguments, caller)
        self.calls.append(call)
        self._under_way.append(call)

    def follow(self) -> list[Call]:
        """The calls that the result of `last` has passed through, by the rule above; marks them as `passed`."""
        preview = self._forms()
        latent = next(form.denoised for form in preview.values() if isinstance(form, Frame))

        def is_preview(value: object) -> bool:
            return any(id(part) in preview or _has_row(part, latent) for part in _parts(value))

        for call in self.calls:
            if is_preview(call.result):
                call.passed = True
                if call.caller is not None:
                    call.caller.passed = True
            call.passed |= is_preview(call.arguments)
        for call in self.calls:
            if call.passed:
                _pass_between(call)
        return [call for call in self.calls if call.passed]

    def _forms(self) -> dict[int, object]:
        """The objects from which the result of `last` was made, by id: arguments of its call, and so on."""
        forms: dict[int, object] = {id(self.result): self.result}
        num_before = 0
        while len(forms) > num_before:
            num_before = len(forms)
            for call in self.calls:
                if any(id(part) in forms for part in _parts(call.result)):
                    made_of = [part for part in _parts(call.arguments) if isinstance(part, CARRIERS)]
                    forms |= {id(part): part for part in made_of}
        return forms


def _callers(frame: FrameType) -> Iterator[FrameType]:
    """The frames of the server below a call on the stack, the nearest first."""
    caller = frame.f_back
    while caller is not None:
        if caller.f_code.co_filename.startswith(SERVER):
            yield caller
        caller = caller.f_back


def _pass_between(call: Call) -> None:
    """Marks the calls on the stack between a passed call and the next passed one."""
    between: list[Call] = []
    above = call.caller
    while above is not None and not above.passed:
        between.append(above)
        above = above.caller
    if above is not None:
        for one in between:
            one.passed = True


def _parts(value: object) -> Iterator[object]:
    """A value, and the values that it contains or will return."""
    yield value
    held: list[object] = []
    if isinstance(value, tuple | list):
        held = list(value)
    elif isinstance(value, dict):
        held = list(value.values())
    elif isinstance(value, functools.partial):
        held = [*value.args, *value.keywords.values()]
    elif isinstance(value, asyncio.Future):
        held = [value.result()] if value.done() and not value.cancelled() and value.exception() is None else []
    elif isinstance(value, Frame):
        held = [value.denoised]
    elif isinstance(value, RenderedPreview):
        held = [value.picture]
    elif type(value).__name__ == "async_generator_wrapped_value":  # what an async generator yields
        held = list(gc.get_referents(value))
    for one in held:
        yield from _parts(one)


def _has_row(value: object, latent: np.ndarray) -> bool:
    if not isinstance(value, np.ndarray) or value.shape[-latent.ndim :] != latent.shape:
        return False
    return bool((value.reshape(-1, latent.size) == latent.reshape(1, -1)).all(axis=1).any())


async def trace_preview(runtime: str = "simulated") -> CallTrace:
    """Develops one picture and returns the calls between its first sampler step and its first preview."""
    trace = CallTrace(Latents.advance.__code__, serialization.preview.__code__)
    settings = {"port": 0, "models_dir": ROOT / "models", "log_level": "error", "runtime": runtime}
    settings["quality_sample_ratio"] = 1
    preview = pb.PreviewPolicy(method=pb.PREVIEW_METHOD_LINEAR)
    async with serving(load(**settings)) as running, grpc.aio.insecure_channel(running.address) as channel:
        request = pb.GenerateRequest(
            spec=pb.GenerationSpec(prompt="a red potion", num_inference_steps=8), preview=preview
        )
        sys.setprofile(trace)
        try:
            async for _ in stubs.GenerationServiceStub(channel).Generate(request):
                pass
        finally:
            sys.setprofile(None)
    return trace


def main() -> None:
    """Prints the two counts."""
    options = argparse.ArgumentParser()
    options.add_argument("--runtime", default="simulated")
    options.add_argument("--list", action="store_true", help="also the calls, in order; + marks those that it passes")
    given = options.parse_args()
    trace = asyncio.run(trace_preview(given.runtime))
    passed = trace.follow()
    modules, all_modules = Counter(call.module for call in passed), Counter(call.module for call in trace.calls)
    switches = sum(one.module != other.module for one, other in itertools.pairwise(trace.calls))
    print(f"{len(modules)} modules that the preview passes, in {len(passed)} calls")
    print(f"{len(all_modules)} modules in all meanwhile, {len(trace.calls)} calls, {switches} switches between modules")
    for module, count in all_modules.most_common():
        print(f"{modules[module] or '':5} {count:5d} {module}")
    if given.list:
        print(*(f"{'+' if call.passed else ' '} {call.module} {call.function}" for call in trace.calls), sep="\n")


if __name__ == "__main__":
    main()
