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
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Must be set before the import: from then on a thread of onnxruntime's wheel keeps a device id and a store of events in
# the home folder and looks up Microsoft's collector. disable_telemetry_events() comes too late for all of that.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime
import structlog
from onnxruntime.capi import onnxruntime_pybind11_state as ort

from safelight_server.catalog.catalog import Catalog, ManifestError
from safelight_server.catalog.pipeline import Pipeline
from safelight_server.domain.component import Component
from safelight_server.domain.tensors import Array, FloatArray
from safelight_server.runtime import cores, memory, verification
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
        self.num_instances = num_instances or cores.num_cores()
        self._catalog = catalog
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix=f"onnx-{i}") for i in range(self.num_instances)]
        self._sessions: dict[tuple[str, Component], onnxruntime.InferenceSession] = {}
        self._costs: dict[tuple[str, Component], CostCurve] = {}
        self._started: dict[tuple[Path, object], tuple[str, Component]] = {}

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
                for component, file in pipeline.files.items():
                    self._sessions.pop((pipeline.name, component), None)
                    if self._started.get((file, pipeline.manifest.sizes)) == (pipeline.name, component):
                        del self._started[file, pipeline.manifest.sizes]
                try:
                    self._catalog.leave_out(pipeline.name, str(error))
                except ManifestError as refused:
                    raise RuntimeStartError(str(refused)) from None

    async def _start_component(self, pipeline: Pipeline, component: Component, file: Path) -> None:
        place = "/".join(file.parts[-3:])
        key, what = (pipeline.name, component), (file, pipeline.manifest.sizes)
        if (same := self._started.get(what)) is not None:  # a quantized revision has a denoiser of its own and no more
            self._sessions[key], self._costs[key] = self._sessions[same], self._costs[same]
            return
        try:
            memory.check_load(file)
            loop = asyncio.get_running_loop()
            session = await loop.run_in_executor(self._threads[0], _session, file)
            self._sessions[key] = session
            bound = pipeline.max_rows.get(component, verification.WARM_UP_ROWS[-1])
            row_bytes = pipeline.manifest.components[component].row_bytes
            await self._warm_up(pipeline, component, memory.bound_rows(bound, row_bytes, self.num_instances))
            self._started[what] = key
        except (RuntimeFailure, RuntimeStartError, ManifestError) as error:
            why = str(error).replace(f"{file}: ", "").replace(str(file), file.name)  # clients may see it
            raise RuntimeStartError(f"{place}: {why}") from None

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

    def batch_tolerance(self, model: str) -> float:
        """0: batches are bit-equal to single rows."""
        return 0.0

    def numerics_id(self, model: str) -> str:
        """Names runtime version and build, precision, optimisation level, instruction set and sampler version."""
        return numerics_id(self._catalog.get(model).precision)

    async def close(self) -> None:
        """Waits for running calls, then frees the sessions."""
        for thread in self._threads:
            await asyncio.to_thread(thread.shutdown)
        self._sessions.clear()


def numerics_id(precision: str = "f32") -> str:
    """Identifies what decides the bits of a result: build, precision, instruction set; by precision of the model."""
    build = hashlib.sha256(onnxruntime.get_build_info().encode()).hexdigest()[:8]
    return f"onnxruntime-{onnxruntime.__version__}-{build}-{precision}-all-{cores.instruction_set()}-s{SAMPLER_VERSION}"


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


def loaded(file: Path, threads: int = 1) -> Callable[[Inputs], Mapping[str, FloatArray]]:
    """A model file as a function of its inputs by name, loaded as the runtime loads it.

    Args:
        threads: of each call; only with one thread are the bits of a row those that the runtime gives.

    Raises:
        ManifestError: the file cannot be loaded.
    """
    return functools.partial(_call, _session(file, threads))


def measured(file: Path, pipeline: Pipeline, bound: int) -> CostCurve | None:
    """The cost curve of a model file that takes the inputs of one of the pipeline's components, as `start` measures it.

    Returns:
        The sizes of batches that are bit-equal to single rows; None if not even a single row gives the same bits twice.

    Raises:
        ManifestError: the file cannot be loaded.
        RuntimeFailure: the model cannot be run.
    """
    session = _session(file)

    async def call(inputs: Mapping[str, Array]) -> Mapping[str, FloatArray]:
        return _call(session, inputs)

    inputs = verification.at_sizes(_inputs(session), pipeline)
    return asyncio.run(verification.warm_up_sizes(call, inputs, bound))


def _session(file: Path, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
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
