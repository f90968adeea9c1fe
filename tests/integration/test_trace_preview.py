"""tools/trace_preview.py: which modules it counts for a preview, and that their number does not grow."""

from __future__ import annotations

import sys

import numpy as np
from safelight_server.domain.picture import EncodedPicture
from safelight_server.domain.request import MediaType, PreviewMethod
from safelight_server.preview import Frame, RenderedPreview

from tools.trace_preview import Call, CallTrace, trace_preview


async def test_a_preview_passes_at_most_twenty_modules() -> None:
    before = sys.getprofile()
    trace = await trace_preview()
    assert sys.getprofile() is before
    passed = {call.module for call in trace.follow()}
    assert len(passed) <= 20, sorted(passed)
    on_the_way = {"sampler/step.py", "engine/engine.py", "preview/frames.py", "stream/serialization.py"}
    assert on_the_way <= passed
    assert "api/service.py" in passed, "its bytes are followed to where gRPC takes them"
    beside = {call.module for call in trace.calls} - passed
    assert "generations/output.py" in beside, "it gets the step's progress"


def test_a_call_is_passed_that_takes_returns_or_hands_on_the_preview() -> None:
    latent = np.arange(4, dtype=np.float32).reshape(1, 2, 2)
    frame, pixels = Frame(1, latent), np.zeros((2, 2, 3), np.uint8)
    picture = EncodedPicture(MediaType.RAW_RGBA8, 2, 2, 8, b"pixels")
    rendered, data = RenderedPreview(1, PreviewMethod.LINEAR, picture), b"a message"

    def code() -> None:
        """Stands for a function of the server."""

    trace = CallTrace(code.__code__, code.__code__)
    trace.result = data

    def call(module: str, arguments: tuple[object, ...], result: object, caller: Call | None = None) -> Call:
        made = Call(module, "function", arguments, caller, result)
        trace.calls.append(made)
        return made

    loop = call("loop", (), None)
    sampler = call("sampler", (0,), np.stack([latent + 1, latent]), loop)
    batch = call("next batch", (np.stack([latent * 2]),), [latent * 3], loop)
    copied = call("copied", (0,), latent, loop)
    queue = call("queue", (), None)
    told = call("told", (1, latent), None, queue)
    progress = call("progress", (1,), b"another message", queue)
    drawing = call("drawing", (frame,), rendered)
    between = call("between", (), None, drawing)
    scaled = call("scaled", (frame.denoised,), pixels, between)
    encoded = call("encoded", (pixels,), picture, between)
    written = call("written", (rendered, 0), data)
    assert set(trace.follow()) == {loop, sampler, copied, told, drawing, between, scaled, encoded, written}
    assert not any(one.passed for one in (batch, queue, progress))
