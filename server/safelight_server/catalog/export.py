"""Exports the model repository for another target: the same components, configured for GPUs or for a CPU.

Tensors, batch bounds and queue policy are stated only in the source's
config.pbtxt files. Those are read into Triton's own `ModelConfig`, a few fields
are set and all others are kept. The accelerator options are those of the README
of Triton's onnxruntime backend. `deploy/triton/build_plan.py` builds the
engines of `Accelerator.PLAN`.
"""

from __future__ import annotations

import enum
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import (
    ModelConfig,
    ModelInstanceGroup,
    ModelOptimizationPolicy,
    ModelQueuePolicy,
    ModelWarmup,
)

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
    configs = sorted(source.glob("*/config.pbtxt"))
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
                changed = for_cpu(config) if target is Target.CPU else for_gpu(config, gpus, accelerator)
                if bounded_queue:
                    bound_queue(changed)
                shutil.copytree(file.parent, made / file.parent.name)
                (made / file.parent.name / "config.pbtxt").write_text(text_format.MessageToString(changed))
            made.rename(out)
    except OSError as error:
        raise RepositoryError(f"{error.filename or out}: {error.strerror}") from error


def read(file: Path) -> ModelConfig:
    """Reads a config.pbtxt with all its fields.

    Raises:
        RepositoryError: the file cannot be read or is not a model configuration.
    """
    try:
        return text_format.Parse(file.read_text(), ModelConfig())
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise RepositoryError(f"{file}: {error}") from None


def for_cpu(config: ModelConfig) -> ModelConfig:
    """Configures one instance on the CPU with one thread, warmed up with the smallest and the largest batch."""
    made = _copy(config)
    made.instance_group.add(name="cpu", kind=ModelInstanceGroup.KIND_CPU, count=1)
    made.parameters["intra_op_thread_count"].string_value = "1"
    made.model_warmup.extend(warm_up(config, sorted({1, config.max_batch_size})))
    return made


def for_gpu(config: ModelConfig, gpus: int, accelerator: Accelerator) -> ModelConfig:
    """Configures one instance on each of `gpus` devices, warmed up with every batch size."""
    made = _copy(config)
    for name in CPU_PARAMETERS:
        made.parameters.pop(name, None)
    for gpu in range(gpus):
        made.instance_group.add(name=f"gpu_{gpu}", kind=ModelInstanceGroup.KIND_GPU, count=1, gpus=[gpu])
    made.model_warmup.extend(warm_up(config, range(1, config.max_batch_size + 1)))
    if accelerator is Accelerator.TENSORRT:
        made.optimization.execution_accelerators.gpu_execution_accelerator.append(_tensorrt(config))
    elif accelerator is Accelerator.PLAN:
        made.backend = "tensorrt"
        made.default_model_filename = "model.plan"
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


def warm_up(config: ModelConfig, rows: Iterable[int]) -> list[ModelWarmup]:
    """Triton's warm-up requests: one of zeros for each batch size in `rows`."""
    zeros = {
        tensor.name: ModelWarmup.Input(data_type=tensor.data_type, dims=tensor.dims, zero_data=True)
        for tensor in config.input
    }
    return [ModelWarmup(name=f"rows_{size}", batch_size=size, inputs=zeros) for size in rows]


def shapes(config: ModelConfig, rows: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs as the network takes them, for a batch of `rows` rows.

    Raises:
        RepositoryError: a dimension has no fixed size, which TensorRT's profile needs.
    """
    found = {}
    for tensor in config.input:
        dims = tuple(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims)
        if min(dims, default=1) < 1:
            raise RepositoryError(f"{config.name}: {tensor.name} has an open dimension {list(dims)}")
        found[tensor.name] = (rows, *dims)
    return found


def profile(config: ModelConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """TensorRT's optimization profile: shapes by input for "min", "opt" and "max"."""
    rows = {"min": 1, "opt": min(OPTIMAL_ROWS, config.max_batch_size), "max": config.max_batch_size}
    return {end: shapes(config, size) for end, size in rows.items()}


def _copy(config: ModelConfig) -> ModelConfig:
    """A copy of `config` without the fields that a target sets."""
    made = ModelConfig()
    made.CopyFrom(config)
    for field in ("instance_group", "model_warmup", "optimization"):
        made.ClearField(field)
    return made


def _tensorrt(config: ModelConfig) -> ModelOptimizationPolicy.ExecutionAccelerators.Accelerator:
    accelerator = ModelOptimizationPolicy.ExecutionAccelerators.Accelerator(name="tensorrt")
    accelerator.parameters.update(
        {
            "precision_mode": "FP16",
            "max_workspace_size_bytes": str(WORKSPACE_BYTES),
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": f"{ENGINES}/{config.name}",
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": f"{ENGINES}/{config.name}",
            "trt_layer_norm_fp32_fallback": "1",
        }
    )
    for end, inputs in profile(config).items():
        text = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in inputs.items())
        accelerator.parameters[f"trt_profile_{end}_shapes"] = text
    return accelerator
