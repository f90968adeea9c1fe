"""Runs the components in this process on ONNX Runtime: one single-threaded session per component and instance.

One thread a session and a pinned optimisation level make a row's bits
independent of the batch around it; `start` verifies that for every batch size
it then offers.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import structlog
from onnxruntime.capi import onnxruntime_pybind11_state as ort
from safelight_server.catalog import Catalog, ManifestError, Pipeline
from safelight_server.runtime.base import Array, Component, CostCurve, FloatArray, RuntimeFailure
from safelight_server.sampler import VERSION as SAMPLER_VERSION

log = structlog.get_logger(__name__)

WARM_UP_ROWS = (1, 2, 4, 8, 16, 32, 64)
ALWAYS_ROWS = 16
"""Batches up to this are verified however long it takes, so that what is offered does not hang on a busy start."""
WARM_UP_BUDGET_S = 1.0
"""Time for one component: larger batches that do not fit are not offered."""
REPETITIONS = 3
SMALL_VOCABULARY = 256
_TRANSIENT = (ort.RuntimeException, ort.Fail, ort.EngineError, ort.EPFail)
_PERMANENT = (ort.InvalidArgument, ort.InvalidGraph, ort.InvalidProtobuf, ort.NoSuchFile, ort.NotImplemented)


class OnnxRuntime:
    """See `runtime.base.Runtime`.

    Args:
        num_instances: sessions per component, each with a thread of its own; 0: one for each core this process has.
    """

    name = "onnx"

    def __init__(self, catalog: Catalog, num_instances: int = 0) -> None:
        self.num_instances = num_instances or _num_cores()
        self._catalog = catalog
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix=f"onnx-{i}") for i in range(self.num_instances)]
        self._sessions: dict[tuple[str, Component], list[onnxruntime.InferenceSession]] = {}
        self._costs: dict[tuple[str, Component], CostCurve] = {}

    async def start(self) -> None:
        """Loads, verifies and measures every component of every pipeline."""
        loop = asyncio.get_running_loop()
        for pipeline in self._catalog.pipelines.values():
            for component, file in pipeline.files.items():
                at = (pipeline.name, component)
                loads = [loop.run_in_executor(thread, _session, file) for thread in self._threads]
                self._sessions[at] = list(await asyncio.gather(*loads))
                first = self._sessions[at][0]
                self._costs[at] = await loop.run_in_executor(self._threads[0], _warm_up, first, pipeline, component)
                for thread, session in zip(self._threads[1:], self._sessions[at][1:], strict=True):
                    feed = _example(session, 1)
                    await loop.run_in_executor(thread, session.run, None, feed)
                log.debug("component_ready", model=pipeline.name, component=component.value, cost=self._costs[at])

    async def run(
        self, instance: int, model: str, component: Component, inputs: Mapping[str, Array]
    ) -> Mapping[str, FloatArray]:
        """One call on the instance's own thread."""
        session = self._sessions[model, component][instance]
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads[instance], _call, session, inputs)

    def max_rows(self, model: str, component: Component) -> int:
        """Largest batch that was verified."""
        return self._costs[model, component].rows[-1]

    def cost(self, model: str, component: Component) -> CostCurve:
        """The measured curve."""
        return self._costs[model, component]

    def numerics_id(self, model: str) -> str:
        """Runtime version and build, precision, optimisation level, instruction set and sampler version."""
        build = hashlib.sha256(onnxruntime.get_build_info().encode()).hexdigest()[:8]
        return f"onnxruntime-{onnxruntime.__version__}-{build}-f32-all-{_instruction_set()}-s{SAMPLER_VERSION}"

    async def close(self) -> None:
        """Waits for running calls and lets the sessions go."""
        for thread in self._threads:
            await asyncio.to_thread(thread.shutdown)
        self._sessions.clear()


def _session(file: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except (*_TRANSIENT, *_PERMANENT) as error:
        raise ManifestError(f"{file}: {error}") from error


def _call(session: onnxruntime.InferenceSession, inputs: Mapping[str, Array]) -> dict[str, FloatArray]:
    names = [output.name for output in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))
    except _TRANSIENT as error:
        raise RuntimeFailure(str(error), retryable=True) from error
    except (ValueError, *_PERMANENT) as error:
        raise RuntimeFailure(str(error), retryable=False) from error


def _example(session: onnxruntime.InferenceSession, rows: int) -> dict[str, Array]:
    """Inputs of plausible size, different in each row."""
    rng = np.random.default_rng(rows)
    inputs: dict[str, Array] = {}
    for tensor in session.get_inputs():
        shape = (rows, *tensor.shape[1:])
        if tensor.type == "tensor(int64)":
            inputs[tensor.name] = rng.integers(0, SMALL_VOCABULARY, shape)
        elif len(shape) == 1:
            inputs[tensor.name] = rng.uniform(0, 999, shape).astype(np.float32)
        else:
            inputs[tensor.name] = rng.standard_normal(shape, dtype=np.float32)
    return inputs


def _warm_up(session: onnxruntime.InferenceSession, pipeline: Pipeline, component: Component) -> CostCurve:
    """Measures batches of growing size as long as they are bit-equal to single rows and the time lasts."""
    rows_done: list[int] = []
    seconds: list[float] = []
    began = time.perf_counter()
    for rows in _sizes(pipeline.max_rows.get(component, WARM_UP_ROWS[-1])):
        feed = _example(session, rows)
        if (
            rows > ALWAYS_ROWS
            and time.perf_counter() - began + 2 * rows * seconds[-1] / rows_done[-1] > WARM_UP_BUDGET_S
        ):
            break
        if not _bit_equal(session, feed, rows):
            log.warning("batch_not_bit_equal", model=pipeline.name, component=component.value, rows=rows)
            break
        rows_done.append(rows)
        seconds.append(_median_s(functools.partial(session.run, None, feed), REPETITIONS if rows < 8 else 1))
    if not rows_done:
        raise ManifestError(f"{pipeline.files[component]}: the same row gives other bits when it is run again")
    return CostCurve(tuple(rows_done), tuple(seconds))


def _sizes(bound: int) -> list[int]:
    """Batch sizes to verify: powers of two below the model's own bound, and the bound."""
    return sorted({rows for rows in WARM_UP_ROWS if rows < bound} | {min(bound, WARM_UP_ROWS[-1])})


def _bit_equal(session: onnxruntime.InferenceSession, feed: Mapping[str, Array], rows: int) -> bool:
    batch = session.run(None, dict(feed))
    for row in range(rows):
        single = session.run(None, {name: array[row : row + 1] for name, array in feed.items()})
        if any(not np.array_equal(a[row : row + 1], b) for a, b in zip(batch, single, strict=True)):
            return False
    return True


def _median_s(call: Callable[[], object], repetitions: int) -> float:
    times = []
    for _ in range(repetitions):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def _num_cores(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores this process may keep busy: its affinity, or its cgroup's quota where that is less."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = cpu_max.read_text().split()
    except OSError:
        return cores
    return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))


def _instruction_set() -> str:
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return platform.machine()
    best = [name for name in ("avx512_bf16", "avx512_vnni", "avx512f", "avx2", "asimd") if name in flags]
    return "-".join([platform.machine(), *best[:1]])
