"""The `onnx` runtime: runs components in this process on ONNX Runtime, one thread per instance.

Each component has one session, whose weights all instances share; a call runs
on the thread that makes it. With no threads of its own and a fixed optimisation
level, the bits of a row do not depend on the other rows of its batch; `start`
verifies this for every batch size that it offers.

Import this module only where a model is run: importing onnxruntime takes time
and starts its telemetry, which this module switches off.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import math
import os
import platform
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Must be set before the import: from then on a thread of onnxruntime's wheel keeps a device id and a store of events in
# the home folder and looks up Microsoft's collector. disable_telemetry_events() comes too late for all of that.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime
import structlog
from onnxruntime.capi import onnxruntime_pybind11_state as ort

from safelight_server.catalog.catalog import Catalog, ManifestError, Pipeline
from safelight_server.domain.component import Component
from safelight_server.domain.tensors import Array, FloatArray
from safelight_server.runtime import memory, verification
from safelight_server.runtime.base import CostCurve, Inputs, RuntimeFailure, RuntimeStartError, StableRows
from safelight_server.runtime.verification import InputSpec
from safelight_server.sampler import VERSION as SAMPLER_VERSION

log = structlog.get_logger(__name__)

_TRANSIENT = (ort.RuntimeException, ort.Fail, ort.EngineError, ort.EPFail)
_PERMANENT = (ort.InvalidArgument, ort.InvalidGraph, ort.InvalidProtobuf, ort.NoSuchFile, ort.NotImplemented)


class OnnxRuntime:
    """Executes components on the CPU of this process; implements `runtime.base.Runtime`.

    Args:
        num_instances: threads that run calls; 0 means one for each core of this process.
    """

    name = "onnx"

    def __init__(self, catalog: Catalog, num_instances: int = 0) -> None:
        self.num_instances = num_instances or _num_cores()
        self._catalog = catalog
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix=f"onnx-{i}") for i in range(self.num_instances)]
        self._sessions: dict[tuple[str, Component], onnxruntime.InferenceSession] = {}
        self._costs: dict[tuple[str, Component], CostCurve] = {}

    async def start(self) -> None:
        """Loads, verifies and measures every component of every pipeline; leaves out pipelines where that fails.

        Raises:
            RuntimeStartError: a component cannot be loaded or run, takes more memory than is available, or does not
                give the same bits twice; and its pipeline may not be left out.
        """
        for pipeline in list(self._catalog.pipelines.values()):
            try:
                for component, file in pipeline.files.items():
                    await self._start_component(pipeline, component, file)
            except (RuntimeFailure, RuntimeStartError, ManifestError) as error:
                for component in pipeline.files:
                    self._sessions.pop((pipeline.name, component), None)
                try:
                    self._catalog.leave_out(pipeline.name, str(error))
                except ManifestError as refused:
                    raise RuntimeStartError(str(refused)) from None

    async def _start_component(self, pipeline: Pipeline, component: Component, file: Path) -> None:
        place = "/".join(file.parts[-3:])
        try:
            memory.check_load(file)
            loop = asyncio.get_running_loop()
            session = await loop.run_in_executor(self._threads[0], _session, file)
            self._sessions[pipeline.name, component] = session
            bound = pipeline.max_rows.get(component, verification.WARM_UP_ROWS[-1])
            row_bytes = pipeline.manifest.components[component].row_bytes
            await self._warm_up(pipeline, component, memory.bound_rows(bound, row_bytes, self.num_instances))
        except (RuntimeFailure, RuntimeStartError, ManifestError) as error:
            what = str(error).replace(f"{file}: ", "").replace(str(file), file.name)  # clients may see it
            raise RuntimeStartError(f"{place}: {what}") from None

    async def _warm_up(self, pipeline: Pipeline, component: Component, bound: int) -> None:
        """Verifies and measures a component on the first instance, then runs it once on each other instance."""
        model = pipeline.name
        inputs = verification.at_sizes(_inputs(self._sessions[model, component]), pipeline)
        cost = await verification.warm_up_sizes(functools.partial(self.run, 0, model, component), inputs, bound)
        if cost is None:
            raise RuntimeStartError("the same row gives other bits when it is run again")
        self._costs[model, component] = cost
        for instance in range(1, self.num_instances):
            await self.run(instance, model, component, verification.example(inputs[0], 1))
        log.debug("component_ready", model=model, component=component.value, cost=cost)

    @property
    def num_live(self) -> int:
        """Every instance: sessions of this process are always live."""
        return self.num_instances

    def usable(self, free: Collection[int]) -> Sequence[int]:
        """Every free instance, in the order of their numbers."""
        return sorted(free)

    def watch(self, changed: Callable[[], None]) -> None:
        """Does nothing: instances of this process neither come nor go."""

    async def run(self, instance: int, model: str, component: Component, inputs: Inputs) -> Mapping[str, FloatArray]:
        """Runs one batch on the instance's own thread."""
        session = self._sessions[model, component]
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads[instance], _call, session, inputs)

    def max_rows(self, model: str, component: Component) -> int:
        """Largest batch, in rows, that was verified to be bit-equal to single rows."""
        return self._costs[model, component].rows[-1]

    def cost(self, model: str, component: Component) -> CostCurve:
        """The cost curve that was measured at start-up."""
        return self._costs[model, component]

    def numerics_id(self, model: str) -> str:
        """Names runtime version and build, precision, optimisation level, instruction set and sampler version."""
        return numerics_id()

    async def close(self) -> None:
        """Waits for running calls, then frees the sessions."""
        for thread in self._threads:
            await asyncio.to_thread(thread.shutdown)
        self._sessions.clear()


def numerics_id() -> str:
    """Identifies what decides the bits of a result: build, precision, instruction set. The same for every model."""
    build = hashlib.sha256(onnxruntime.get_build_info().encode()).hexdigest()[:8]
    return f"onnxruntime-{onnxruntime.__version__}-{build}-f32-all-{_instruction_set()}-s{SAMPLER_VERSION}"


def fingerprint(file: Path) -> str:
    """Digest of a model file's outputs for fixed inputs (`verification.fingerprint`), in a session of its own.

    Raises:
        ManifestError: the file cannot be loaded.
        RuntimeFailure: the model cannot be run.
    """
    session = _session(file)

    async def call(inputs: Mapping[str, Array]) -> Mapping[str, FloatArray]:
        return _call(session, inputs)

    return asyncio.run(verification.fingerprint(call, _inputs(session)))


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


def _call(session: onnxruntime.InferenceSession, inputs: Inputs) -> dict[str, FloatArray]:
    names = [output.name for output in session.get_outputs()]
    feed = {name: rows.array() if isinstance(rows, StableRows) else rows for name, rows in inputs.items()}
    try:
        return dict(zip(names, session.run(names, feed), strict=True))
    except _TRANSIENT as error:
        raise RuntimeFailure(str(error), retryable=True) from error
    except (ValueError, *_PERMANENT) as error:
        raise RuntimeFailure(str(error), retryable=False) from error


def _inputs(session: onnxruntime.InferenceSession) -> list[InputSpec]:
    return [
        InputSpec(
            at.name, tuple(size if isinstance(size, int) else -1 for size in at.shape[1:]), at.type == "tensor(int64)"
        )
        for at in session.get_inputs()
    ]


def _num_cores(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores this process may use: its CPU affinity, or its cgroup's CPU quota if that is less."""
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
