"""The `torch` runtime: runs components in this process on PyTorch, on the CPU or on GPUs, from safetensors.

The modules are those that `safelight export` compares its ONNX files with, so
that names, shapes and weights are the same (`export.exporter.load_components`).
A device has the weights once; its instances share them. An instance is a thread,
on a GPU with a stream of its own.

A row's result depends on its batch: torch chooses kernels by the size of a call.
So `start` verifies that batches agree with single rows within `batch_tolerance`,
and `numerics_id` names it: nothing cached with one tolerance is found with another.
With a tolerance of 0 the rule is that of the other runtimes, bit equality, which
mostly leaves batches of one row.

NEVER EXECUTED on a GPU by this project: there was none. What is for CUDA alone
is written against PyTorch's documentation.

Import this module only where a model is run: importing torch takes seconds.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import numpy as np
import structlog
import torch
from torch import Tensor, nn

from safelight_server.catalog import config_pbtxt
from safelight_server.catalog.catalog import Catalog, ManifestError
from safelight_server.catalog.config_pbtxt import ConfigError
from safelight_server.catalog.manifest import (
    ADAPTER_WEIGHTS_SOURCE,
    CONTROL_IMAGES_SOURCE,
    ENCODER_SOURCE,
    IMAGE_PROMPT_TOKENS_SOURCE,
    INPAINTING_INPUTS,
    LATENT_SOURCE,
)
from safelight_server.catalog.pipeline import Pipeline
from safelight_server.domain.component import Component
from safelight_server.domain.tensors import Array, FloatArray
from safelight_server.export.exporter import computed_buffers, load_components
from safelight_server.export.source import ExportError
from safelight_server.runtime import cores, memory, verification
from safelight_server.runtime.acting_rows import of_acting_rows
from safelight_server.runtime.base import (
    CostCurve,
    FaultOrigin,
    Inputs,
    RuntimeFailure,
    RuntimeStartError,
    StableRows,
)
from safelight_server.runtime.device_rows import DeviceRows
from safelight_server.runtime.torch_options import TorchOptions
from safelight_server.runtime.verification import InputSpec

log = structlog.get_logger(__name__)

NETWORK_LIBRARIES = ("diffusers", "transformers")
OVERFLOWING = frozenset({"z-image"})
"""Families whose denoiser, with its published weights, gives values beyond float16, and so no numbers."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(slots=True, eq=False)
class _Instance:
    """A thread that makes calls on a device, on a GPU in a stream of its own, with the rows that stay there."""

    device: torch.device
    thread: ThreadPoolExecutor
    stream: Any = None
    rows: DeviceRows = field(default_factory=DeviceRows)


@dataclass(frozen=True, slots=True, eq=False)
class _Network:
    """A component, on each device.

    Attributes:
        halved: the inputs that are given in the dtype of the weights; all others stay as they are.
    """

    modules: Mapping[torch.device, nn.Module]
    dtype: torch.dtype
    outputs: tuple[str, ...]
    halved: frozenset[str] = field(default_factory=frozenset)


class TorchRuntime:
    """Executes components on torch; implements `runtime.base.Runtime`.

    Raises:
        RuntimeStartError: a device that is named is not there.
    """

    name = "torch"

    def __init__(self, catalog: Catalog, options: TorchOptions) -> None:
        self._catalog = catalog
        self._options = options
        self._devices = _devices(options.device)
        on_cpu = self._devices[0].type == "cpu"
        self.num_instances = options.num_instances or (cores.num_cores() if on_cpu else len(self._devices))
        self._instances = [self._instance(number) for number in range(self.num_instances)]
        self._networks: dict[tuple[str, Component], _Network] = {}
        self._costs: dict[tuple[str, Component], CostCurve] = {}
        self._lost: set[torch.device] = set()
        self._changed: Callable[[], None] = lambda: None
        if not on_cpu:
            _compute_alike()

    def _instance(self, number: int) -> _Instance:
        device = self._devices[number % len(self._devices)]
        # One thread a call, as the `onnx` runtime has: what a row costs does not depend on what else runs.
        thread = ThreadPoolExecutor(
            1, thread_name_prefix=f"torch-{number}", initializer=functools.partial(torch.set_num_threads, 1)
        )
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        return _Instance(device, thread, stream)

    async def start(self) -> None:
        """Loads, verifies and measures every component of every pipeline; leaves out pipelines where that fails.

        Raises:
            RuntimeStartError: a component cannot be loaded or run, takes more memory than there is, or does not give
                the same bits twice; and its pipeline may not be left out.
        """
        for pipeline in list(self._catalog.pipelines.values()):
            try:
                await self._start_pipeline(pipeline)
            except (RuntimeFailure, RuntimeStartError, ManifestError) as error:
                for component in pipeline.manifest.components:
                    self._networks.pop((pipeline.name, component), None)
                try:
                    self._catalog.leave_out(pipeline.name, str(error))
                except ManifestError as refused:
                    raise RuntimeStartError(str(refused)) from None

    async def _start_pipeline(self, pipeline: Pipeline) -> None:
        place, folder = f"{pipeline.name}/{pipeline.manifest.revision}/torch", str(pipeline.torch_folder)
        try:
            self._check_dtype(pipeline)
            self._check_load(pipeline)
            loop = asyncio.get_running_loop()
            networks = await loop.run_in_executor(self._instances[0].thread, self._load, pipeline)
        except (RuntimeStartError, ExportError) as error:
            raise RuntimeStartError(f"{place}: {error}".replace(folder, place)) from None  # clients may see it
        for component, network in networks.items():
            self._networks[pipeline.name, component] = network
            try:
                await self._warm_up(pipeline, component)
            except (RuntimeFailure, RuntimeStartError, ManifestError, ConfigError) as error:
                raise RuntimeStartError(f"{place}: {component}: {error}".replace(folder, place)) from None

    def _check_dtype(self, pipeline: Pipeline) -> None:
        family = pipeline.manifest.family
        if self._options.dtype == "float16" and family in OVERFLOWING:
            raise RuntimeStartError(f"torch_dtype: float16 gives NaN with models of {family}; use bfloat16 or float32")

    def _check_load(self, pipeline: Pipeline) -> None:
        """Refuses weights that do not fit into the memory of this machine, or of a GPU."""
        assert pipeline.torch_folder is not None
        size = sum(file.stat().st_size for file in pipeline.torch_folder.rglob("*.safetensors"))
        memory.check_bytes(size)
        for device in self._devices:
            if device.type == "cuda":
                free, _ = torch.cuda.mem_get_info(device)
                held = size * DTYPES[self._options.dtype].itemsize // 2  # the files are float16
                memory.check_bytes(held, free, factor=1)

    def _load(self, pipeline: Pipeline) -> dict[Component, _Network]:
        assert pipeline.torch_folder is not None
        wanted = DTYPES[self._options.dtype]
        loaded: dict[str, dict[torch.device, nn.Module]] = {}
        for device in self._devices:
            for role, module in load_components(pipeline.torch_folder, pipeline.manifest).items():
                dtype = torch.float32 if wanted is torch.float16 and _overflows(module) else wanted
                loaded.setdefault(role, {})[device] = _placed(module, device, dtype)
        networks = {}
        for role, modules in loaded.items():
            component, module = Component(role), modules[self._devices[0]]
            dtype = next((tensor.dtype for tensor in module.parameters() if tensor.is_floating_point()), torch.float32)
            networks[component] = _Network(modules, dtype, module.outputs, _halved(pipeline, component))
        return networks

    async def _warm_up(self, pipeline: Pipeline, component: Component) -> None:
        """Verifies and measures a component on the first instance, then runs it once on each other instance."""
        assert pipeline.torch_folder is not None
        config = config_pbtxt.read(pipeline.torch_folder / "configs" / f"{component}.pbtxt")
        specs = [InputSpec(name, shape, name in config.ids) for name, shape in config.rows.items()]
        inputs = verification.at_sizes(specs, pipeline)
        bound = pipeline.max_rows.get(component, verification.WARM_UP_ROWS[-1])
        device, rooms = self._devices[0], pipeline.manifest.adapter_rooms
        row_bytes = pipeline.manifest.components[component].row_bytes
        if row_bytes and device.type == "cuda" and (room := rooms.get(component)) is not None:
            row_bytes += 4 * room.max_rank * room.width  # of adapters there is a row in the call, and one that stays
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
        sharing = -(-self.num_instances // len(self._devices))
        bound = memory.bound_rows(bound, row_bytes, sharing, free)
        call = functools.partial(self.run, 0, pipeline.name, component)
        cost = await verification.warm_up_sizes(call, inputs, bound, self._options.tolerance)
        if cost is None:
            raise RuntimeStartError("the same row gives other bits when it is run again")
        self._costs[pipeline.name, component] = cost
        for instance in range(1, self.num_instances):
            await self.run(instance, pipeline.name, component, verification.example(inputs[0], 1))
        log.debug("component_ready", model=pipeline.name, component=component.value, cost=cost)

    @property
    def num_live(self) -> int:
        """Instances on devices that still answer; the CPU always does."""
        return sum(instance.device not in self._lost for instance in self._instances)

    def usable(self, free: Collection[int]) -> Sequence[int]:
        """The free instances on devices that still answer, in the order of their numbers."""
        return [number for number in sorted(free) if self._instances[number].device not in self._lost]

    def watch(self, changed: Callable[[], None]) -> None:
        """Sets the callback for a device that is lost."""
        self._changed = changed

    async def run(self, instance: int, model: str, component: Component, inputs: Inputs) -> Mapping[str, FloatArray]:
        """Runs one batch on the instance's own thread.

        Raises:
            RuntimeFailure: torch refuses the call, memory does not suffice, or the device is lost.
        """
        at, network = self._instances[instance], self._networks[model, component]
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(at.thread, _call, at, network, inputs)
        except RuntimeFailure as failure:
            if failure.fault is FaultOrigin.INSTANCE and at.device not in self._lost:
                # A CUDA context that has failed fails every later call; only a new process has another one.
                log.error("device_lost", device=str(at.device), why=str(failure))
                self._lost.add(at.device)
                self._changed()
            raise

    def max_rows(self, model: str, component: Component) -> int:
        """Largest batch, in rows, that was verified to agree with single rows within the batch tolerance."""
        return self._costs[model, component].rows[-1]

    def cost(self, model: str, component: Component) -> CostCurve:
        """The cost curve that was measured at start-up."""
        return self._costs[model, component]

    def batch_tolerance(self, model: str) -> float:
        """Largest deviation of a batch from single rows, relative to the largest value of a component's result."""
        return self._options.tolerance

    def numerics_id(self, model: str) -> str:
        """Names the libraries, device, dtype, batch tolerance and sampler version."""
        return self._options.numerics_id(_version(), _device_name(self._devices[0]))

    async def close(self) -> None:
        """Waits for running calls, then frees the weights."""
        self._changed = lambda: None
        for instance in self._instances:
            await asyncio.to_thread(instance.thread.shutdown)
            instance.rows.clear()
        self._networks.clear()


def _devices(named: str) -> list[torch.device]:
    """The devices of the setting `torch_device`.

    Raises:
        RuntimeStartError: one is unknown or not there.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if named == "auto":
        named = ",".join(f"cuda:{index}" for index in range(num_gpus)) or "cpu"
    found = []
    for name in filter(None, (part.strip() for part in named.split(","))):
        try:
            device = torch.device(name)
        except RuntimeError:
            device = torch.device("meta")
        if device.type == "cuda":
            device = torch.device("cuda", device.index or 0)
            if device.index >= num_gpus:
                raise RuntimeStartError(f"torch_device: there is no {name}: torch sees {num_gpus} GPUs")
        elif device.type != "cpu":
            raise RuntimeStartError(f"torch_device: {name}: must be auto, cpu or cuda:NUMBER, separated by commas")
        found.append(device)
    if not found or len(set(found)) < len(found) or len({device.type for device in found}) > 1:
        raise RuntimeStartError(f"torch_device: {named!r}: must be auto, cpu, or different GPUs: cuda:0,cuda:1")
    if len({_device_name(device) for device in found}) > 1:
        raise RuntimeStartError(f"torch_device: {named}: GPUs of different kinds give different pictures")
    return found


def _device_name(device: torch.device) -> str:
    """What of a device decides bits: the instructions of a CPU, the model of a GPU with its libraries."""
    if device.type == "cpu":
        return f"cpu-{cores.instruction_set()}"
    name = torch.cuda.get_device_name(device).replace(" ", "_").lower()
    return f"{name}-cuda{torch.version.cuda}-cudnn{torch.backends.cudnn.version()}"


def _version() -> str:
    """The versions of torch and of the libraries whose networks it runs: other code gives other bits."""
    return "-".join([torch.__version__, *(f"{name}-{metadata.version(name)}" for name in NETWORK_LIBRARIES)])


def _compute_alike() -> None:
    """Lets a GPU compute the same call in the same way each time, and float32 as float32. NEVER EXECUTED."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def _overflows(module: nn.Module) -> bool:
    """Whether its configuration says that it is to be run in float32: SDXL's autoencoder overflows float16."""
    return any(getattr(getattr(part, "config", None), "force_upcast", False) for part in module.children())


def _placed(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    computed = computed_buffers(module)
    if device.type == "cpu":
        placed = module.to(dtype=dtype)
    else:
        placed = module.to(device=device, dtype=dtype, memory_format=torch.channels_last)
    for name, tensor in computed.items():  # these stay float32
        owner, _, own = name.rpartition(".")
        setattr(placed.get_submodule(owner), own, tensor.to(device))
    return placed


def _halved(pipeline: Pipeline, component: Component) -> frozenset[str]:
    """Inputs that may be given in a dtype of fewer bits: not the denoiser's numbers, which float16 cannot hold."""
    if component is not Component.DENOISER:
        return frozenset({"latent", "image", ADAPTER_WEIGHTS_SOURCE})
    sources = pipeline.manifest.inputs.items()
    features = (
        LATENT_SOURCE,
        *INPAINTING_INPUTS.values(),
        ADAPTER_WEIGHTS_SOURCE,
        CONTROL_IMAGES_SOURCE,
        IMAGE_PROMPT_TOKENS_SOURCE,
    )
    return frozenset(name for name, at in sources if at in features or at.startswith(ENCODER_SOURCE))


def _call(instance: _Instance, network: _Network, inputs: Inputs) -> dict[str, FloatArray]:
    """Runs a batch; on the instance's thread."""
    try:
        with torch.inference_mode():
            given = of_acting_rows(inputs)
            if instance.stream is None:
                return _on_cpu(network, network.modules[instance.device], given)
            return _on_gpu(instance, network, given)
    except torch.OutOfMemoryError as error:
        raise RuntimeFailure(_first_line(error), retryable=True) from error
    except getattr(torch, "AcceleratorError", torch.OutOfMemoryError) as error:
        raise RuntimeFailure(_first_line(error), retryable=True, fault=FaultOrigin.INSTANCE) from error
    except (RuntimeError, TypeError, ValueError) as error:  # torch has no kinds of errors for wrong shapes
        raise RuntimeFailure(_first_line(error), retryable=False) from error


def _on_cpu(network: _Network, module: nn.Module, inputs: Inputs) -> dict[str, FloatArray]:
    feed = {name: _cast(network, name, torch.from_numpy(_array(rows))) for name, rows in inputs.items()}
    results = _tuple(module(**feed))
    return {
        name: result.to(torch.float32).contiguous().numpy()
        for name, result in zip(network.outputs, results, strict=True)
    }


def _on_gpu(instance: _Instance, network: _Network, inputs: Inputs) -> dict[str, FloatArray]:
    """Copies through pinned memory, so that copies of one instance overlap with kernels of another. NEVER EXECUTED."""
    with torch.cuda.stream(instance.stream):
        feed = {}
        for name, rows in inputs.items():
            upload = functools.partial(_uploaded, instance.device, network, name)
            if isinstance(rows, StableRows):
                feed[name] = instance.rows.batch((network, name), rows, upload)
            else:
                feed[name] = upload(_array(rows))
            if feed[name].ndim == 4:
                feed[name] = feed[name].contiguous(memory_format=torch.channels_last)
        found = {}
        for name, result in zip(network.outputs, _tuple(network.modules[instance.device](**feed)), strict=True):
            whole = result.to(torch.float32).contiguous()
            found[name] = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=True)
            found[name].copy_(whole, non_blocking=True)
        instance.stream.synchronize()
    return {name: np.array(tensor.numpy()) for name, tensor in found.items()}  # a copy: pinned memory is dear


def _uploaded(device: torch.device, network: _Network, name: str, array: Array) -> Tensor:
    return _cast(network, name, torch.from_numpy(array).pin_memory().to(device, non_blocking=True))


def _array(rows: Array | StableRows) -> Array:
    array = rows.array() if isinstance(rows, StableRows) else rows
    return array if array.flags.writeable and array.flags.c_contiguous else array.copy()


def _cast(network: _Network, name: str, given: Tensor) -> Tensor:
    return given.to(network.dtype) if name in network.halved else given


def _tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
