"""Compares two places where rows are merged into batches: the engine, or Triton's dynamic batcher.

The Triton model (`merging_model.py`) sleeps 20 ms + 1 ms a row for up to 64 rows,
the cost curve of the design, and returns its input. The same engine drives it in
all cases, without guidance, so one row a step. In one case the engine sends
batches of up to 64 rows, one after another. In the others each generation's row
is a call of its own, and Triton merges waiting calls: at once, after a delay, by
preferred sizes, or knowing the number of rows, which no real server can know. CPU
is that of the engine's process and of the server with its stubs.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tritonclient.grpc.aio as triton_grpc
from safelight_server.catalog.catalog import Catalog
from safelight_server.domain.component import Component
from safelight_server.domain.tensors import FloatArray
from safelight_server.runtime.base import Inputs, StableRows
from safelight_server.runtime.simulated import LATENT, MAX_ROWS, TOKENS, WIDTH, SimulatedRuntime, simulated_pipeline

from load_tests.bench.engines import Bench, Watch, cpu_s, on
from load_tests.bench.runner import Report, Row, median_by
from tests.triton.support import TritonServer, triton_server

BASE_MS, ROW_MS = 20.0, 1.0
MODEL = Path(__file__).parent / "merging_model.py"
CONFIG = """
backend: "python"
max_batch_size: {max_rows}
input {{ name: "sample" data_type: TYPE_FP32 dims: [{sample}] }}
input {{ name: "timestep" data_type: TYPE_FP32 dims: [1] reshape {{ shape: [] }} }}
input {{ name: "encoder_hidden_states" data_type: TYPE_FP32 dims: [{context}] }}
output {{ name: "prediction" data_type: TYPE_FP32 dims: [{sample}] }}
dynamic_batching {{ max_queue_delay_microseconds: {delay_us} preferred_batch_size: [{preferred}] }}
instance_group {{ kind: KIND_CPU count: 1 }}
parameters {{ key: "base_ms" value {{ string_value: "{base_ms}" }} }}
parameters {{ key: "row_ms" value {{ string_value: "{row_ms}" }} }}
"""


@dataclass(frozen=True, slots=True)
class Way:
    """A way in which rows are sent to Triton and merged.

    Attributes:
        model: name of its model on the server.
        merged: by Triton; else by the engine.
        delay_us: how long Triton's batcher waits for more.
        preferred: batches that Triton sends without waiting; empty: full ones only.
        waits_for_all: one row of each generation, or a full batch, is the preferred size.
    """

    name: str
    model: str
    merged: bool = True
    delay_us: int = 0
    preferred: tuple[int, ...] = ()
    waits_for_all: bool = False

    def model_for(self, count: int) -> str:
        """Name of the model that serves `count` generations."""
        return f"{self.model}_{min(count, MAX_ROWS)}" if self.waits_for_all else self.model

    def preferred_for(self, count: int) -> tuple[int, ...]:
        """The preferred batch sizes of the model for `count` generations."""
        return (min(count, MAX_ROWS),) if self.waits_for_all else self.preferred


WAYS = (
    Way("one owner", "owner", merged=False),
    Way("Triton merges, no delay", "at_once"),
    Way("Triton merges, delay 5 ms", "delay", delay_us=5_000),
    Way("Triton merges, prefers 16, 32, 64, 5 ms", "preferred", delay_us=5_000, preferred=(16, 32, 64)),
    Way("Triton merges, knows how many, 200 ms", "all", delay_us=200_000, waits_for_all=True),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure: `num_steps` steps with each of `num_generations`."""

    num_generations: tuple[int, ...] = (16, 64, 256)
    num_steps: tuple[int, ...] = (40, 25, 10)
    rounds: int = 3


SMOKE = Plan(num_generations=(2, 4), num_steps=(5, 5), rounds=1)


class OnTriton(SimulatedRuntime):
    """The simulated runtime with its denoiser on a Triton server.

    Args:
        model: name of the model on the server.
        num_calls: most calls at once.
        max_rows: most rows of a call.
    """

    name = "simulated-on-triton"

    def __init__(self, url: str, model: str, num_calls: int, max_rows: int) -> None:
        super().__init__(num_calls, BASE_MS / 1e3, ROW_MS / 1e3)
        self._client = triton_grpc.InferenceServerClient(url)
        self._model = model
        self._rows = max_rows

    def max_rows(self, model: str, component: Component) -> int:
        """Most rows of a call."""
        return self._rows if component is Component.DENOISER else MAX_ROWS

    async def start(self) -> None:
        """Omits the simulated runtime's warning; the report describes this runtime."""

    async def run(self, instance: int, model: str, component: Component, inputs: Inputs) -> Mapping[str, FloatArray]:
        """Sends calls of the denoiser to the server, with their tensors in the message."""
        if component is not Component.DENOISER:
            return await super().run(instance, model, component, inputs)
        tensors = []
        for name, given in inputs.items():
            array = np.ascontiguousarray(given.array() if isinstance(given, StableRows) else given, np.float32)
            array = array[:, None] if array.ndim == 1 else array  # Triton has no tensors of rows without a shape
            tensors.append(triton_grpc.InferInput(name, array.shape, "FP32"))
            tensors[-1].set_data_from_numpy(array)
        answer = await self._client.infer(self._model, tensors)
        return {"prediction": answer.as_numpy("prediction")}

    async def close(self) -> None:
        """Closes the channel."""
        await self._client.close()


def measure(plan: Plan) -> Report:
    """Measures all ways; returns the table."""
    with tempfile.TemporaryDirectory(prefix="safelight-merging-") as folder:
        write_repository(Path(folder), plan.num_generations)
        with triton_server("--repository", folder) as server:
            rows = asyncio.run(_measure(plan, server))
    title = f"A step of each generation on a Triton model of {BASE_MS:.0f} ms + {ROW_MS:.0f} ms a row"
    return Report("merging", {title: median_by(rows, ("generations", "merging"))})


def write_repository(folder: Path, num_generations: Sequence[int]) -> None:
    """Writes a repository with a model for each way, so that each has its own statistics."""
    for way in WAYS:
        for count in num_generations:
            model = folder / way.model_for(count)
            (model / "1").mkdir(parents=True, exist_ok=True)
            shutil.copy(MODEL, model / "1" / "model.py")
            (model / "config.pbtxt").write_text(f'name: "{model.name}"{_config(way, count)}')


def _config(way: Way, count: int) -> str:
    lists = {"sample": LATENT, "context": (TOKENS, WIDTH), "preferred": way.preferred_for(count)}
    return CONFIG.format(
        max_rows=MAX_ROWS,
        delay_us=way.delay_us,
        base_ms=BASE_MS,
        row_ms=ROW_MS,
        **{name: ", ".join(map(str, numbers)) for name, numbers in lists.items()},
    )


async def _measure(plan: Plan, server: TritonServer) -> list[Row]:
    catalog = Catalog([simulated_pipeline()])
    rows: list[Row] = []
    async with AsyncExitStack() as stack:
        statistics_of = await stack.enter_async_context(triton_grpc.InferenceServerClient(server.grpc_url))
        for _ in range(plan.rounds):
            for count, num_steps in zip(plan.num_generations, plan.num_steps, strict=True):
                for way in WAYS:
                    num_calls, max_rows = (count, 1) if way.merged else (1, MAX_ROWS)
                    model = way.model_for(count)
                    runtime = OnTriton(server.grpc_url, model, num_calls, max_rows)
                    async with on(catalog, runtime) as bench:
                        await bench.finish(bench.submit(1, 1, guidance_scale=1.0))
                        before = await _executed(statistics_of, model)
                        row = await _one(bench, server, count, num_steps)
                        after = await _executed(statistics_of, model)
                    rows_a_call = (after[0] - before[0]) / (after[1] - before[1])
                    rows.append({"generations": count, "merging": way.name, **row, "rows_a_call": rows_a_call})
    return rows


async def _executed(client: triton_grpc.InferenceServerClient, model: str) -> tuple[int, int]:
    """Rows and calls that a model has executed so far."""
    [found] = (await client.get_inference_statistics(model)).model_stats
    return found.inference_count, found.execution_count


async def _one(bench: Bench, server: TritonServer, count: int, num_steps: int) -> dict[str, float]:
    cpu = cpu_s(None), cpu_s(server)
    watches = bench.submit(count, num_steps, guidance_scale=1.0)
    await bench.finish(watches)
    own_s = cpu_s(None) - cpu[0]
    all_s = cpu_s(server) - cpu[1]
    seconds = max(watch.steps[-1] for watch in watches) - min(watch.steps[0] for watch in watches)
    gaps = _between(watches)
    made = sum(len(watch.steps) - 1 for watch in watches)
    full = min(count, MAX_ROWS)
    ideal_s = made / full * (BASE_MS + ROW_MS * full) / 1e3
    return {
        "steps_per_s": made / seconds,
        "of_ideal": ideal_s / seconds,
        "step_ms_p50": 1e3 * statistics.median(gaps),
        "step_ms_p99": 1e3 * float(np.quantile(gaps, 0.99)),
        "engine_cpu_us_per_row": 1e6 * own_s / (count * num_steps),
        "triton_cpu_us_per_row": 1e6 * (all_s - own_s) / (count * num_steps),
    }


def _between(watches: Sequence[Watch]) -> list[float]:
    """Seconds between the steps of each generation."""
    return [later - sooner for watch in watches for sooner, later in itertools.pairwise(watch.steps)]
