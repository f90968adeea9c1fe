"""`python deploy/triton/build_plan.py REPOSITORY`: builds model.plan for a repository of `--accelerator plan`.

NEVER EXECUTED by this project's tests, which need no GPU. It is written against the
documentation of TensorRT 10's Python API; only its arguments and profiles are
tested. Run it on a GPU of the kind that will serve, with the TensorRT version
of Triton's container (in a clone: `pip install -e clients/python -e '.[tensorrt]'`): a plan works with
no other version or GPU.

For each model whose backend is "tensorrt": float16 kernels are allowed
(except for an autoencoder that would overflow), inputs
and outputs stay as the configuration says, each size of
pictures has an optimization profile for every batch size, and timings are kept in REPOSITORY/../timings.cache so that a
second build is quick and chooses the same kernels.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from safelight_server.catalog import export
from safelight_server.catalog.export import RepositoryError
from tritonclient.grpc.model_config_pb2 import ModelConfig


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path, help="as `safelight repository --accelerator plan` wrote it")
    parser.add_argument("--version", default="1", help="Triton's version folder")
    given = parser.parse_args()
    try:
        models = plans(given.repository, given.version)
        timings = given.repository.resolve().parent / "timings.cache"
        for config, folder in models:
            build(config, folder / "model.onnx", folder / "model.plan", timings)
    except RepositoryError as error:
        sys.exit(f"build_plan: {error}")


def plans(root: Path, version: str) -> list[tuple[ModelConfig, Path]]:
    """Configuration and version folder of each model that needs a plan.

    Raises:
        RepositoryError: there is none, or one has no model.onnx to build from.
    """
    found = []
    for file in sorted(root.glob("*/config.pbtxt")):
        config, folder = export.read(file), file.parent / version
        if config.backend == "tensorrt":
            if not (folder / "model.onnx").is_file():
                raise RepositoryError(f"{folder / 'model.onnx'}: missing")
            found.append((config, folder))
    if not found:
        raise RepositoryError(f'{root}: no model says backend: "tensorrt"')
    return found


def build(config: ModelConfig, source: Path, plan: Path, timings: Path) -> None:
    """Builds one engine.

    Raises:
        RepositoryError: TensorRT is missing, or refuses the model.
    """
    try:
        import tensorrt as trt  # an optional extra, needed only on the machine that builds
    except ImportError as error:
        raise RepositoryError(
            f"{error}: in a clone of Safelight, pip install -e clients/python -e '.[tensorrt]'"
        ) from None
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(source)):
        faults = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise RepositoryError(f"{source}: {faults}")
    options = builder.create_builder_config()
    options.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, export.WORKSPACE_BYTES)
    if config.parameters[export.PRECISION].string_value != "FP32":
        options.set_flag(trt.BuilderFlag.FP16)
    cache = options.create_timing_cache(timings.read_bytes() if timings.exists() else b"")
    options.set_timing_cache(cache, ignore_mismatch=False)
    for ends in export.profiles(config):
        chosen = builder.create_optimization_profile()
        for name, smallest in ends["min"].items():
            chosen.set_shape(name, smallest, ends["opt"][name], ends["max"][name])
        options.add_optimization_profile(chosen)
    engine = builder.build_serialized_network(network, options)
    if engine is None:
        raise RepositoryError(f"{source}: TensorRT built no engine; its log says why")
    plan.write_bytes(engine)
    timings.write_bytes(options.get_timing_cache().serialize())


if __name__ == "__main__":
    main()
