"""Exports the model repository for another target: the same components, configured for GPUs or for a CPU.

Tensors, batch bounds and queue policy are stated only in the source's
config.pbtxt files. Those are read into Triton's own `ModelConfig`, a few fields
are set and all others are kept. The accelerator options are those of the README
of Triton's onnxruntime backend. `deploy/triton/build_plan.py` builds the
engines of `Accelerator.PLAN`.
"""

from __future__ import annotations

import enum
import json
import operator
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import text_format
from pydantic import ValidationError
from tritonclient.grpc.model_config_pb2 import (
    ModelConfig,
    ModelInstanceGroup,
    ModelOptimizationPolicy,
    ModelQueuePolicy,
    ModelWarmup,
)

from safelight_server.catalog.manifest import CONTROL_IMAGES_SOURCE, MASK_SOURCE, Manifest
from safelight_server.catalog.pipeline import assemble
from safelight_server.domain.component import Component

ENGINES = "/var/cache/safelight/engines"
"""Cache folder for TensorRT's engines and timings in Triton's container: a volume that outlives the container."""
WORKSPACE_BYTES = 2 << 30
OPTIMAL_ROWS = 16
"""The batch size that TensorRT optimizes for, or the model's own bound if that is smaller."""
PRIORITIES = 3
"""Priority levels of a bounded queue, 1 first: the gateway's classes INTERACTIVE, STANDARD and BATCH."""
QUEUE_SIZE = 64
QUEUE_TIMEOUT_S = 10
CPU_PARAMETERS = ("intra_op_thread_count", "inter_op_thread_count", "execution_mode")
PRECISION = "safelight_precision"
"""Parameter of a config.pbtxt for the tensorrt backend that build_plan.py reads: FP16, or FP32."""
FLOAT32 = {"stable-diffusion-xl": (Component.DECODER, Component.ENCODER)}
"""By family the components that overflow float16: SDXL's autoencoder says force_upcast."""


class Target(enum.StrEnum):
    """The hardware that the repository is exported for."""

    CPU = "cpu"
    GPU = "gpu"


class Accelerator(enum.StrEnum):
    """What executes a component on a GPU.

    tensorrt: the onnxruntime backend with TensorRT inside, float16 (engines are built at the first start and cached).
    onnxruntime: the onnxruntime backend with its CUDA kernels, float32.
    plan: the tensorrt backend with engines that were built before, float16.
    """

    TENSORRT = "tensorrt"
    ONNXRUNTIME = "onnxruntime"
    PLAN = "plan"


class RepositoryError(Exception):
    """The repository cannot be read or written; the message says where and why."""


Dims = Mapping[str, tuple[int, ...]]
"""Dimensions of the inputs of a model by name, without the row axis."""


@dataclass(frozen=True, slots=True)
class PictureShapes:
    """(C, h, w) of the latent and (3, H, W) of the picture at one size that a pipeline offers."""

    latent: tuple[int, ...]
    picture: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelUse:
    """What the manifests know of a model of the repository.

    Attributes:
        sizes: those at which it is called, the default first.
        float32: whether it overflows float16.
    """

    sizes: tuple[PictureShapes, ...] = ()
    float32: bool = False


def write(
    source: Path,
    out: Path,
    target: Target,
    gpus: int = 1,
    accelerator: Accelerator = Accelerator.TENSORRT,
    *,
    bounded_queue: bool = False,
) -> None:
    """Writes the repository `source` for `target` to the new folder `out`.

    Args:
        gpus: devices 0 … gpus - 1 get an instance of every component each (target GPU).
        accelerator: what executes them there (target GPU).
        bounded_queue: see `bound_queue`.

    Raises:
        RepositoryError: `source` is no repository, `out` exists, or a file cannot be read or written.
    """
    configs, uses = sorted(source.glob("*/config.pbtxt")), model_uses(source.parent / "pipelines")
    if not configs:
        raise RepositoryError(f"{source}: holds no model (a folder with config.pbtxt)")
    if out.exists():
        raise RepositoryError(f"{out}: exists already")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
            made = Path(folder) / "repository"
            for file in configs:
                config = read(file)
                use = uses.get(file.parent.name, ModelUse())
                changed = for_cpu(config, use) if target is Target.CPU else for_gpu(config, gpus, accelerator, use)
                if bounded_queue:
                    bound_queue(changed)
                shutil.copytree(file.parent, made / file.parent.name)
                (made / file.parent.name / "config.pbtxt").write_text(text_format.MessageToString(changed))
            made.rename(out)
    except OSError as error:
        raise RepositoryError(f"{error.filename or out}: {error.strerror}") from error


def model_uses(pipelines: Path) -> dict[str, ModelUse]:
    """What the manifests below a folder know of the models that they name.

    Raises:
        RepositoryError: a manifest cannot be read.
    """
    found: dict[str, ModelUse] = {}
    for path in sorted(pipelines.glob("*/*/pipeline.json")):
        try:
            manifest = Manifest.model_validate(json.loads(path.read_bytes()))
        except (OSError, ValueError, ValidationError) as error:
            raise RepositoryError(f"{path}: {error}") from None
        pipeline = assemble(manifest, {})
        sizes = [(size.width_px, size.height_px) for size in manifest.sizes]
        shapes = [PictureShapes(pipeline.latent_shape(*size), (3, size[1], size[0])) for size in sizes]
        for role, component in manifest.components.items():
            before = found.get(component.model, ModelUse())
            both = tuple(dict.fromkeys([*before.sizes, *shapes]))
            is_float32 = role in FLOAT32.get(manifest.family, ())
            found[component.model] = ModelUse(both, before.float32 or is_float32)
    return found


def read(file: Path) -> ModelConfig:
    """Reads a config.pbtxt with all its fields.

    Raises:
        RepositoryError: the file cannot be read or is not a model configuration.
    """
    try:
        return text_format.Parse(file.read_text(), ModelConfig())
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise RepositoryError(f"{file}: {error}") from None


def for_cpu(config: ModelConfig, use: ModelUse = ModelUse()) -> ModelConfig:
    """Configures one instance on the CPU with one thread, warmed up with the smallest and the largest batch."""
    made = _copy(config)
    made.instance_group.add(name="cpu", kind=ModelInstanceGroup.KIND_CPU, count=1)
    made.parameters["intra_op_thread_count"].string_value = "1"
    for dims in dims_by_size(config, use):
        made.model_warmup.extend(warm_up(config, dims, sorted({1, config.max_batch_size})))
    return made


def for_gpu(config: ModelConfig, gpus: int, accelerator: Accelerator, use: ModelUse = ModelUse()) -> ModelConfig:
    """Configures one instance on each of `gpus` devices, warmed up with every batch size.

    At sizes of pictures beside the default only the batch sizes of the TensorRT profiles are warmed up.

    Raises:
        RepositoryError: TensorRT cannot run the model.
    """
    first, *others = dims_by_size(config, use)
    if CONTROL_IMAGES_SOURCE in first and accelerator is not Accelerator.ONNXRUNTIME:
        what = "its control networks run for a number of rows that TensorRT cannot know; use --accelerator onnxruntime"
        raise RepositoryError(f"{config.name}: {what}")
    made = _copy(config)
    for name in CPU_PARAMETERS:
        made.parameters.pop(name, None)
    for gpu in range(gpus):
        made.instance_group.add(name=f"gpu_{gpu}", kind=ModelInstanceGroup.KIND_GPU, count=1, gpus=[gpu])
    made.model_warmup.extend(warm_up(config, first, range(1, config.max_batch_size + 1)))
    for dims in others:
        made.model_warmup.extend(warm_up(config, dims, sorted(set(_rows(config).values()))))
    if accelerator is Accelerator.TENSORRT:
        accelerated = made.optimization.execution_accelerators.gpu_execution_accelerator
        accelerated.append(_tensorrt(made, use.float32))
    elif accelerator is Accelerator.PLAN:
        made.backend = "tensorrt"
        made.default_model_filename = "model.plan"
        made.parameters[PRECISION].string_value = "FP32" if use.float32 else "FP16"
        if others:  # else Triton takes the first profile alone
            for group in made.instance_group:
                group.profile.extend(str(index) for index in range(1 + len(others)))
    return made


def bound_queue(config: ModelConfig) -> None:
    """Gives Triton's queue priorities, a maximum size and a timeout, for a Triton that several gateways share.

    The price: with any of the three, Triton at times wakes up half a second late (decision record 0010).
    """
    batching = config.dynamic_batching
    batching.priority_levels = PRIORITIES
    batching.default_priority_level = 2
    batching.default_queue_policy.timeout_action = ModelQueuePolicy.REJECT
    batching.default_queue_policy.default_timeout_microseconds = QUEUE_TIMEOUT_S * 1_000_000
    batching.default_queue_policy.allow_timeout_override = True
    batching.default_queue_policy.max_queue_size = QUEUE_SIZE


def dims_by_size(config: ModelConfig, use: ModelUse) -> list[Dims]:
    """Dimensions of the inputs at each size of pictures, the default first; one entry where they are the same at all.

    Raises:
        RepositoryError: a dimension is open, and no manifest says its sizes.
    """
    if all(-1 not in tensor.dims for tensor in config.input):
        return [{tensor.name: tuple(tensor.dims) for tensor in config.input}]
    found: list[Dims] = []
    for shapes in use.sizes or (PictureShapes((), ()),):
        dims = {}
        for tensor in config.input:
            given = tuple(tensor.dims)
            whole = shapes.picture if tensor.name == "image" else shapes.latent
            if tensor.name == CONTROL_IMAGES_SOURCE:
                whole = given[:1] + shapes.picture
            if tensor.name == MASK_SOURCE:
                whole = given[:1] + shapes.latent[1:]
            if -1 in given and (
                len(given) != len(whole) or any(a not in (-1, b) for a, b in zip(given, whole, strict=False))
            ):
                raise RepositoryError(f"{config.name}: {tensor.name} has an open dimension {list(given)}")
            dims[tensor.name] = whole if -1 in given else given
        found.append(dims)
    return found


def warm_up(config: ModelConfig, dims: Dims, rows: Iterable[int]) -> list[ModelWarmup]:
    """Triton's warm-up requests: one of zeros for each batch size in `rows`."""
    zeros = {
        tensor.name: ModelWarmup.Input(data_type=tensor.data_type, dims=dims[tensor.name], zero_data=True)
        for tensor in config.input
    }
    at = "".join(f"_{name}_{'x'.join(map(str, dims[name]))}" for name in _open(config))
    return [ModelWarmup(name=f"rows_{size}{at}", batch_size=size, inputs=zeros) for size in rows]


def profiles(config: ModelConfig) -> list[dict[str, dict[str, tuple[int, ...]]]]:
    """TensorRT's optimization profiles of what `for_gpu` wrote: for each size of pictures "min", "opt" and "max".

    The sizes are those of the warm-up requests. Shapes are those that the network takes, with the row axis.
    """
    at_sizes = []
    for sample in config.model_warmup:
        dims = {name: tuple(made.dims) for name, made in sample.inputs.items()}
        if dims not in at_sizes:
            at_sizes.append(dims)
    taken = {at.name: tuple(at.reshape.shape) for at in config.input if at.HasField("reshape")}
    names = [tensor.name for tensor in config.input]
    return [
        {end: {name: (rows, *taken.get(name, dims[name])) for name in names} for end, rows in _rows(config).items()}
        for dims in at_sizes
    ]


def _rows(config: ModelConfig) -> dict[str, int]:
    return {"min": 1, "opt": min(OPTIMAL_ROWS, config.max_batch_size), "max": config.max_batch_size}


def _open(config: ModelConfig) -> list[str]:
    return [tensor.name for tensor in config.input if -1 in tensor.dims]


def _copy(config: ModelConfig) -> ModelConfig:
    """A copy of `config` without the fields that a target sets."""
    made = ModelConfig()
    made.CopyFrom(config)
    for field in ("instance_group", "model_warmup", "optimization"):
        made.ClearField(field)
    return made


def _tensorrt(config: ModelConfig, float32: bool) -> ModelOptimizationPolicy.ExecutionAccelerators.Accelerator:
    accelerator = ModelOptimizationPolicy.ExecutionAccelerators.Accelerator(name="tensorrt")
    accelerator.parameters.update(
        {
            "precision_mode": "FP32" if float32 else "FP16",
            "max_workspace_size_bytes": str(WORKSPACE_BYTES),
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": f"{ENGINES}/{config.name}",
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": f"{ENGINES}/{config.name}",
            "trt_layer_norm_fp32_fallback": "1",
        }
    )
    found = profiles(config)
    ends: dict[str, Callable[[tuple[int, ...]], int]] = {"min": min, "opt": operator.itemgetter(0), "max": max}
    for end, chosen in ends.items():  # one profile that covers all sizes: the option has no place for several
        shapes = {name: [at[end][name] for at in found] for name in found[0][end]}
        covering = {name: [chosen(axis) for axis in zip(*of, strict=True)] for name, of in shapes.items()}
        text = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in covering.items())
        accelerator.parameters[f"trt_profile_{end}_shapes"] = text
    return accelerator
