"""Adapters, controls and image prompts on the real tritonserver: the pixels are those of the embedded runtime."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from safelight.v1 import generation_pb2 as pb
from safelight_server.catalog.export import Target, write

from tests.conftest import eventually
from tests.integration.test_images import MASK, PHOTO, name_of
from tests.support.adapters import text_matrices, write_adapter
from tests.support.conditions import NAME, TWO_SIZES, models_with_conditions
from tests.triton.developing import Load, Seen, assert_exact, develop_all
from tests.triton.support import TritonServer, triton_server

pytestmark = pytest.mark.timeout(180)

PATIENCE_S = 60.0
PHOTOGRAPH, MASKED = name_of(PHOTO), name_of(MASK)
ADAPTERS = {"pixel": 2, "ink": 3}
"""Names and ranks."""
EDGES, DEPTH = pb.Control(name="edges", image=PHOTOGRAPH), pb.Control(name="depth", image=MASKED, scale=0.5)
LATE = pb.Control(name="edges", image=MASKED, start=0.3, end=0.7)
PROMPTED = pb.ImagePrompt(image=MASKED, scale=0.5)
PIXEL, INK = (pb.Adapter(name=name, scale=0.8) for name in ADAPTERS)
WORD = pb.Adapter(name="word", scale=0.8)
"""It changes the text encoder alone."""
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"adapters": [PIXEL]},
    {"adapters": [PIXEL, INK]},
    {"adapters": [WORD]},
    {"adapters": [PIXEL, WORD], "guidance_scale": 1.0},
    {"controls": [EDGES]},
    {"controls": [LATE]},
    {"controls": [EDGES, DEPTH], "guidance_scale": 1.0},
    {"image_prompt": PROMPTED},
    {"image_prompt": pb.ImagePrompt(image=MASKED), "guidance_scale": 1.0},
    {"adapters": [INK], "controls": [LATE, DEPTH], "image_prompt": PROMPTED},
    {"guidance_scale": 1.0},
)


def conditioned(steps: int, **spec: Any) -> list[pb.GenerateRequest]:
    """A request of each kind, all of the same prompt and seed, that bypasses the caches."""
    common = {"prompt": "a red potion", "num_inference_steps": steps, "outputs": [pb.OutputSpec(seed=7)]}
    return [
        pb.GenerateRequest(
            spec=pb.GenerationSpec(**common | {"guidance_scale": 3.0} | spec | kind),
            cache=pb.CachePolicy(mode=pb.CachePolicy.MODE_BYPASS),
            encoding=pb.PixelEncoding(media_type="application/x-raw-rgba8"),
        )
        for kind in KINDS
    ]


def with_adapters(models: Path) -> Path:
    for seed, (name, rank) in enumerate(ADAPTERS.items()):
        write_adapter(models / "adapters", name, rank, seed)
    write_adapter(models / "adapters", WORD.name, arrays=text_matrices(1, seed=4))
    return models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_adapters(models_with_conditions(tmp_path_factory.mktemp("conditions")))


@pytest.fixture(scope="module")
def triton(models: Path) -> Iterator[TritonServer]:
    """A server of the repository that `safelight repository --target cpu` makes of this model."""
    write(models / "repository", models / "of-triton", Target.CPU)
    with triton_server("--repository", models / "of-triton") as server:
        yield server


async def embedded(start, requests: list[pb.GenerateRequest], **settings: object) -> list[Seen]:
    async with start(runtime="onnx", **settings) as running:
        return await develop_all(running.address, requests)


@pytest.mark.parametrize("shared_memory", ["on", "off"])
async def test_mixed_batches_give_the_pixels_of_the_embedded_runtime(start, models, triton, shared_memory):
    requests = conditioned(8)
    expected = await embedded(start, requests, models_dir=models)
    assert len({seen.data for seen in expected}) == len(KINDS)
    settings = {"runtime": "triton", "triton_url": triton.grpc_url, "triton_shared_memory": shared_memory}
    async with start(models_dir=models, **settings) as running:
        for _ in range(2):  # again in places that hold what other rows brought
            seen = await develop_all(running.address, requests)
            assert_exact(requests, seen, expected)
            assert {one.numerics_id for one in seen} == {expected[0].numerics_id}
            assert max(one.largest_batch for one in seen) > 2


async def test_an_adapter_that_comes_and_changes_while_the_server_runs(start, models, triton, tmp_path):
    folder, requests = tmp_path / "adapters", conditioned(3)[1:2]
    settings = {"models_dir": models, "adapters_dir": folder}
    async with start(**settings, runtime="triton", triton_url=triton.grpc_url) as running:

        def offered() -> set[str]:
            return {adapter.sha256 for adapter in running.catalog.adapters.of(NAME).values()}

        known: set[str] = set()
        pictures = []
        assert offered() == known
        for seed in (1, 2):
            write_adapter(folder, "pixel", 2, seed)
            await eventually(lambda: offered() not in (known, set()))
            known = offered()
            seen = await develop_all(running.address, requests)
            assert_exact(requests, seen, await embedded(start, requests, **settings))
            pictures.append(seen[0].data)
        assert pictures[0] != pictures[1]


async def test_kill_9_in_mid_generation_changes_no_pixel(start, models, triton):
    requests = conditioned(50)
    expected = await embedded(start, requests, models_dir=models)
    with triton_server("--repository", models / "repository") as one:
        settings = {"models_dir": models, "runtime": "triton", "triton_url": f"{one.grpc_url},{triton.grpc_url}"}
        async with start(**settings) as running, grpc.aio.insecure_channel(running.address) as channel:
            await eventually(lambda: running.runtime.num_live == 2, PATIENCE_S)
            load = Load(channel, requests)
            await eventually(load.reached(4), PATIENCE_S)
            os.kill(one.pid, signal.SIGKILL)
            assert load.num_running == len(requests)
            await asyncio.to_thread(one.supervisor.wait, 10)
            await eventually(lambda: running.runtime.num_live == 1, PATIENCE_S)
            assert_exact(requests, await load.finish(), expected)


async def test_pictures_of_several_sizes(start, tmp_path):
    """Where sizes are open, each has its own shared memory, and the embedded runtime's pixels."""
    models = with_adapters(models_with_conditions(tmp_path, TWO_SIZES))
    requests = [one for width, height in TWO_SIZES for one in conditioned(6, width_px=width, height_px=height)]
    expected = await embedded(start, requests, models_dir=models)
    with triton_server("--repository", models / "repository") as server:
        settings = {"runtime": "triton", "triton_url": server.grpc_url, "triton_shared_memory": "on"}
        async with start(models_dir=models, **settings) as running:
            assert_exact(requests, await develop_all(running.address, requests), expected)
            [served] = running.runtime.servers
            used = [shapes for (key, shapes), idle in served.regions._idle.items() if key[1] == "denoiser" and idle]
            assert {shapes[0] for shapes in used} == {(32, 8, 8), (32, 6, 4)}
