"""Runs a pipeline without a server: no gRPC, no scheduler, no previews, one batch from noise to pixels.

The baseline of the throughput benchmark; the LitServe peer runs it too. The ONNX
sessions have the options of `safelight_server.runtime.onnx`, so pictures are
those of the server, bit for bit (a test compares them).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
from safelight_server.catalog import catalog as catalogs
from safelight_server.catalog.pipeline import Pipeline
from safelight_server.catalog.pixels import decoder_latent, to_pixels
from safelight_server.domain.component import Component
from safelight_server.sampler import SamplerSpec, advance, compile_table, gaussian, guide

from load_tests.bench.processes import answer
from load_tests.bench.requests import PROMPT

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Took:
    """Wall seconds, and CPU seconds of all threads."""

    wall_s: float
    cpu_s: float


class BareLoop:
    """One session per component.

    Args:
        num_threads: threads of each session.
    """

    def __init__(self, pipeline: Pipeline, num_threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._pipeline = pipeline
        self._sessions = {
            component: onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            for component, file in pipeline.files.items()
        }

    def develop(self, prompts: Sequence[str], seeds: Sequence[int], num_steps: int) -> list[Pixels]:
        """Develops one batch at the pipeline's defaults, with guidance: (H, W, 3) uint8 for each prompt."""
        pipeline, rows = self._pipeline, len(seeds)
        defaults = pipeline.manifest.defaults
        sampler, size = defaults.sampler, pipeline.manifest.sizes[0]
        spec = SamplerSpec(sampler.name, sampler.spacing, sampler.sigma_schedule, sampler.eta)
        table = compile_table(spec, pipeline.schedule, pipeline.manifest.prediction_type, num_steps)
        shape = pipeline.latent_shape(size.width_px, size.height_px)
        denoiser = self._sessions[Component.DENOISER]
        context = self._encode([*prompts, *[""] * rows])
        x = np.stack([np.float32(table.init_scale) * gaussian(seed, 0, 0, shape) for seed in seeds])
        denoised = np.zeros_like(x)
        scale = np.full(rows, defaults.guidance_scale, np.float32)
        for step in range(table.num_steps):
            feed = {
                "sample": np.concatenate([x, x]) * table.in_scale[step],
                "timestep": np.full(2 * rows, table.timesteps[step], np.float32),
                "encoder_hidden_states": context,
            }
            prediction = denoiser.run(None, feed)[0]
            guided = guide(prediction[:rows], prediction[rows:], scale)
            coefficients = np.repeat(table.coefficients[step : step + 1], rows, axis=0)
            x, denoised = advance(x, guided, denoised, None, coefficients)
        images = self._sessions[Component.DECODER].run(None, {"latent": decoder_latent(pipeline, x)})[0]
        return [to_pixels(image) for image in images]

    def _encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Encodes each distinct text once; returns (len(texts), T, D)."""
        distinct = list(dict.fromkeys(texts))
        tokenizer = self._pipeline.tokenizer
        if tokenizer is None:
            raise ValueError(f"{self._pipeline.name} has no tokenizer")
        ids = np.array([tokenizer.encode(text).ids for text in distinct], np.int64)
        states = self._sessions[Component.TEXT_ENCODER].run(["last_hidden_state"], {"input_ids": ids})[0]
        result: npt.NDArray[np.float32] = states[[distinct.index(text) for text in texts]]
        return result


async def develop_on_request(pipe: Connection, models: Path) -> None:
    """A process with one bare loop a core. A question (pictures at once, pictures, steps) is answered by a `Took`."""
    pipeline = catalogs.load(models).get("")
    loops = [BareLoop(pipeline) for _ in os.sched_getaffinity(0)]
    pool = ThreadPoolExecutor(len(loops))

    async def work(num_at_once: int, num_pictures: int, num_steps: int) -> Took:
        return await asyncio.to_thread(_timed, loops, pool, num_at_once, num_pictures, num_steps)

    pipe.send("ready")
    await answer(pipe, work)


def _timed(
    loops: Sequence[BareLoop], pool: ThreadPoolExecutor, num_at_once: int, num_pictures: int, num_steps: int
) -> Took:
    batch = max(1, num_at_once // len(loops))
    groups = [range(start, min(start + batch, num_pictures)) for start in range(0, num_pictures, batch)]

    def share(number: int) -> None:
        for seeds in groups[number :: len(loops)]:
            loops[number].develop([PROMPT] * len(seeds), seeds, num_steps)

    wall, cpu = time.perf_counter(), time.process_time()
    list(pool.map(share, range(len(loops))))
    return Took(time.perf_counter() - wall, time.process_time() - cpu)
