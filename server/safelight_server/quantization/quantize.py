"""Makes a revision of a pipeline whose denoiser computes with 8-bit integers, and refuses it where pictures suffer.

Static quantization of ONNX Runtime: convolutions and matrix products take int8 weights (one scale a channel) and uint8
activations whose ranges are fixed beforehand, from the steps of a few pictures. Integer sums are exact, and no range
depends on the other rows of a call: so a row keeps its bits in any batch, which is checked. All other components are
those of the float revision. Nothing in the folder of models changes before the quality gate was passed and the
server's own catalog has loaded the result.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from safelight_server.catalog.catalog import DATA_FILE, ManifestError, load_pipeline
from safelight_server.catalog.digest import sha256
from safelight_server.catalog.manifest import QualityGate, Quantization
from safelight_server.catalog.pipeline import Pipeline
from safelight_server.domain.component import Component
from safelight_server.export import memory
from safelight_server.export.manifest import readable
from safelight_server.export.source import ExportError
from safelight_server.quantization import quality
from safelight_server.quantization.offline import Inputs, OfflinePipeline
from safelight_server.quantization.quality import QualityOptions
from safelight_server.runtime import onnx as runtime
from safelight_server.runtime import verification

SCHEME: Final = "int8"
OPERATORS = ["Conv", "MatMul", "Gemm"]
CALIBRATION_PICTURES = 4
"""Pictures whose steps fix the ranges of activations, from noise to the last step."""
CALIBRATION_SEED = 1 << 32
"""Seeds of calibration begin here, those of the comparison at 0: no picture is judged that was calibrated with."""
PROMPTS = (
    "a red apple on a wooden table",
    "a portrait of an old man with a beard",
    "a lighthouse at the sea, at night",
    "a cat that sleeps on a sofa",
    "a street in the rain, neon lights",
    "mountains behind a lake, morning mist",
    "a bowl of soup, seen from above",
    "an astronaut on a horse",
    "a green bottle and a glass",
    "a castle on a hill, oil painting",
    "a blue bicycle at a brick wall",
    "a field of sunflowers",
)
"""For pipelines that have no prompts of their own in their manifest."""
Report = Callable[[str], None]


def quantize(manifest: Path, options: QualityOptions, report: Report = lambda line: None) -> Path:
    """Quantizes the pipeline of a manifest, `models/pipelines/NAME/REVISION/pipeline.json`, beside it.

    Args:
        report: is given a line for each step of the work.

    Returns:
        The manifest of the new revision, REVISION-int8.

    Raises:
        ExportError: the pipeline cannot be quantized, rows of a batch are not those of the row alone, or the pictures
            are not good enough; then nothing has changed.
    """
    models = manifest.parents[3]
    try:
        pipeline = load_pipeline(manifest, models / "repository")
    except ManifestError as error:
        raise ExportError(str(error)) from None
    quality.require_quantizable(str(manifest.parent), pipeline.manifest)
    texts = tuple(dict.fromkeys([*pipeline.manifest.example_prompts, *PROMPTS]))
    with tempfile.TemporaryDirectory(dir=models, prefix=".quantize-") as scratch:
        staged = Path(scratch)
        place = staged / "repository" / f"{pipeline.manifest.components[Component.DENOISER].model}_{SCHEME}"
        target = place / str(pipeline.manifest.components[Component.DENOISER].version) / "model.onnx"
        target.parent.mkdir(parents=True)
        report("calibrating: the ranges of activations in all steps of a few pictures")
        calibration = _calibration(pipeline, texts)
        _quantize_file(pipeline.files[Component.DENOISER], target, calibration)
        _copy_config(pipeline.files[Component.DENOISER].parents[1] / "config.pbtxt", place)
        report(_check_batches(pipeline, target))
        found = _compare(pipeline, target, texts, options, report)
        made = _write_manifest(manifest, pipeline, staged, target, calibration[0], found)
        try:
            _load(made, models, staged)
        except ManifestError as error:
            raise ExportError(f"the server would refuse what was made: {error}") from None
        return _install(staged, models, place, made)


def _calibration(pipeline: Pipeline, texts: Sequence[str]) -> list[Inputs]:
    """Inputs of the denoiser in all steps of some pictures, a row each with its prompt and without."""
    inputs: list[Inputs] = []
    chosen = [texts[number % len(texts)] for number in range(CALIBRATION_PICTURES)]
    seeds = range(CALIBRATION_SEED, CALIBRATION_SEED + CALIBRATION_PICTURES)
    OfflinePipeline(pipeline).pictures(chosen, seeds, watch=inputs.append)
    return inputs


class _Reader(CalibrationDataReader):
    def __init__(self, inputs: Sequence[Inputs]) -> None:
        self._rest: Iterator[Inputs] = iter(inputs)

    def get_next(self) -> Inputs | None:
        return next(self._rest, None)


def _quantize_file(source: Path, target: Path, calibration: Sequence[Inputs]) -> None:
    """Writes the network of `source` with integers."""
    is_large = source.with_name(DATA_FILE).is_file()
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        unfolded = Path(scratch) / "model.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC  # casts weights to float
        options.optimized_model_filepath = str(unfolded)
        options.log_severity_level = 3
        if is_large:
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", DATA_FILE)
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        logging.disable(logging.WARNING)  # the library advises a preparation that was just made
        try:
            quantize_static(
                unfolded,
                target,
                _Reader(calibration),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=OPERATORS,
                per_channel=True,
                reduce_range=True,  # 7 bits: CPUs without VNNI add products in 16 bits, which saturate
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        finally:
            logging.disable(logging.NOTSET)
    model = onnx.load(target)
    del model.metadata_props[:]
    target.write_bytes(model.SerializeToString(deterministic=True))


def _copy_config(source: Path, place: Path) -> None:
    """Triton's configuration is that of the float model, but for its name."""
    (place / "config.pbtxt").write_text(
        re.sub(r'^name: ".*"$', f'name: "{place.name}"', source.read_text(), count=1, flags=re.MULTILINE)
    )


def _check_batches(pipeline: Pipeline, target: Path) -> str:
    """Verifies batches as the server does at its start; says what a step costs beside float.

    Raises:
        ExportError: a batch that the server would otherwise offer is not bit-equal to its rows alone.
    """
    bound = min(pipeline.max_rows[Component.DENOISER], verification.ALWAYS_ROWS)
    files = pipeline.files[Component.DENOISER], target
    curves = [
        quality.require_batches(file.parents[1].name, runtime.measured(file, pipeline, bound), bound) for file in files
    ]
    size = [f"{file.stat().st_size / 2**20:.1f}" for file in files]
    costs = ", ".join(
        f"{rows}: {1e3 * now:.1f} of {1e3 * before:.1f}"
        for rows, before, now in zip(curves[0].rows, curves[0].seconds, curves[1].seconds, strict=True)
    )
    return f"{size[1]} of {size[0]} MiB; batches bit-equal to their rows; ms by rows {costs}"


def _compare(
    pipeline: Pipeline, target: Path, texts: Sequence[str], options: QualityOptions, report: Report
) -> QualityGate:
    """Draws pictures with both denoisers and holds them to the bounds.

    Raises:
        ExportError: they differ too much.
    """
    prompts = [texts[-1 - number % len(texts)] for number in range(options.num_pictures)]
    report(f"drawing {options.num_pictures} pictures with each denoiser")
    seeds = range(options.num_pictures)
    of_float, of_int8 = (OfflinePipeline(pipeline, at).pictures(prompts, seeds) for at in (None, target))
    found = quality.compared(prompts, of_float, of_int8, options)
    report(_said(found))
    quality.require(found)
    return found


def _said(found: QualityGate) -> str:
    said = f"PSNR to float {found.psnr_db} dB (median of {found.num_pictures}), {found.least_psnr_db} dB (least)"
    return said if found.agreement is None else f"{said}; the judge sees the same in {found.agreement:.1%}"


def _write_manifest(
    manifest: Path, pipeline: Pipeline, staged: Path, target: Path, example: Inputs, found: QualityGate
) -> Path:
    """Writes the folder of the new revision: all files of the old one, and a manifest with another denoiser."""
    whole: dict[str, Any] = json.loads(manifest.read_text())
    revision = f"{whole['revision']}-{SCHEME}"
    denoiser = {
        "model": target.parents[1].name,
        "version": int(target.parent.name),
        "sha256": sha256(target),
        "row_bytes": memory.row_bytes(target, example),
    }
    made_by = f"onnxruntime {onnxruntime.__version__}"
    whole |= {
        "revision": revision,
        "components": whole["components"] | {Component.DENOISER.value: denoiser},
        "notes": [*whole.get("notes", ()), f"{SCHEME} of {whole['revision']}: {_said(found)}"],
        "quantization": Quantization(scheme=SCHEME, of=whole["revision"], made_by=made_by, quality=found).model_dump(),
    }
    folder = staged / "pipelines" / pipeline.manifest.name / revision
    whole.pop("torch", None)  # the torch runtime has no quantized networks
    shutil.copytree(manifest.parent, folder, ignore=shutil.ignore_patterns("torch"))
    made = folder / manifest.name
    made.write_text(readable(whole))
    return made


def _load(made: Path, models: Path, staged: Path) -> None:
    """Loads the new revision as the server will: its denoiser beside the components of the old one.

    Raises:
        ManifestError: the server would refuse it.
    """
    together = staged / "together"
    together.mkdir()
    for repository in (models / "repository", staged / "repository"):
        for model in repository.iterdir():
            (together / model.name).unlink(missing_ok=True)
            (together / model.name).symlink_to(model.resolve())
    load_pipeline(made, together)


def _install(staged: Path, models: Path, place: Path, made: Path) -> Path:
    """Moves everything to its place, the manifest last."""
    target = models / made.parent.relative_to(staged)
    shutil.rmtree(target, ignore_errors=True)
    repository = models / "repository" / place.name
    for item in place.iterdir():
        there = repository / item.name
        if there.is_dir():
            shutil.rmtree(there)
        there.parent.mkdir(parents=True, exist_ok=True)
        item.replace(there)
    made.parent.replace(target)
    return target / made.name
