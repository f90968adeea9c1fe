"""Tests of the GStreamer element `safelightsrc` in pipelines of gst-launch."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import safelight

from tests.clients.case import SIMULATED
from tests.conftest import eventually

WRITE = "videoconvert ! pngenc ! multifilesink location=frame-%03d.png"


async def launch(plugins: Path, folder: Path, pipeline: str, program: Sequence[str] = ("gst-launch-1.0",)):
    """Starts a pipeline in `folder`."""
    return await asyncio.create_subprocess_exec(
        *program,
        *pipeline.split(" "),
        cwd=folder,
        env=os.environ | {"GST_PLUGIN_PATH": str(plugins), "GST_REGISTRY": str(folder / "registry.bin")},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )


def written(folder: Path) -> list[Path]:
    """The frames of a pipeline, in their order."""
    return sorted(folder.glob("frame-*.png"))


async def test_frames_of_the_development(gstreamer: Path, start, tmp_path: Path) -> None:
    async with start() as running:
        source = f"safelightsrc server={running.address} prompt=potion seed=7 steps=30"
        process = await launch(gstreamer, tmp_path, f"{source} ! {WRITE}")
        said, _ = await asyncio.wait_for(process.communicate(), 100)
        assert process.returncode == 0, said.decode()
        async with safelight.Client(running.address) as client:
            picture = (await client.generate("potion", seed=7, steps=30).image()).convert("RGB")
    frames = [np.asarray(PIL.Image.open(file).convert("RGB"), float) for file in written(tmp_path)]
    assert len(frames) >= 3
    assert np.array_equal(frames[-1], np.asarray(picture)), "the last frame is the picture, to the pixel"
    assert len({frame.shape for frame in frames}) == 1
    distances = [np.abs(frame - frames[-1]).mean() for frame in frames]
    assert distances[0] > distances[-2] > 0, "it comes nearer"


async def test_what_the_server_refuses_is_the_elements_error(gstreamer: Path, start, tmp_path: Path) -> None:
    async with start(**SIMULATED) as running:
        source = f"safelightsrc server={running.address} prompt=potion steps=100000"
        process = await launch(gstreamer, tmp_path, f"{source} ! fakesink")
        said, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 1
    assert b"INVALID_ARGUMENT" in said and b"spec.num_inference_steps" in said


async def test_without_a_server_it_is_an_error_in_bounded_time(gstreamer: Path, tmp_path: Path) -> None:
    process = await launch(gstreamer, tmp_path, "safelightsrc server=127.0.0.1:1 prompt=potion ! fakesink")
    said, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 1
    assert b"UNAVAILABLE" in said


async def test_a_pipeline_that_is_stopped_leaves_its_generation(gstreamer: Path, start, tmp_path: Path) -> None:
    """Stopping does not wait for a frame, and the server notices that nobody watches."""
    async with start(**SIMULATED | {"simulated_base_ms": 1000}) as running:
        source = f"safelightsrc server={running.address} prompt=potion steps=900"
        process = await launch(gstreamer, tmp_path, f"{source} ! {WRITE}")
        await eventually(lambda: bool(written(tmp_path)), 60)  # it reads all plug-ins first
        process.send_signal(signal.SIGINT)
        said, _ = await asyncio.wait_for(process.communicate(), 60)
        assert b"handling interrupt" in said
        await eventually(lambda: running.inspect().streams == 0)


async def test_its_properties_are_described(gstreamer: Path, tmp_path: Path) -> None:
    process = await launch(gstreamer, tmp_path, "safelightsrc", ("gst-inspect-1.0",))
    said, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0
    for name in ("server", "prompt", "model", "width", "height", "steps", "seed", "api-key", "ca-file"):
        assert f"\n  {name}" in said.decode()


@pytest.mark.parametrize(("given", "says"), [("ca-file=/none.pem", b"ca-file"), ("server=,", b"names no server")])
async def test_arguments_that_cannot_be_used(gstreamer: Path, tmp_path: Path, given: str, says: bytes) -> None:
    process = await launch(gstreamer, tmp_path, f"safelightsrc prompt=potion {given} ! fakesink")
    said, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode not in (0, None)
    assert says in said
