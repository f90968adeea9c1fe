"""Makes a revision of a pipeline whose denoiser computes with 8-bit integers, and refuses it where pictures suffer.

All other components are those of the float revision. Nothing in the folder of models changes before rows of a batch
were found to have the bits that they have alone, the quality gate was passed, and the server's own catalog has loaded
the result.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnxruntime

from safelight_server.catalog.catalog import DATA_FILE, ManifestError, load_pipeline
from safelight_server.catalog.digest import sha256
from safelight_server.catalog.manifest import CONTROL_SCALES_SOURCE, QualityGate, Quantization, SizeOffer
from safelight_server.catalog.pipeline import Pipeline
from safelight_server.catalog.pixels import NotFiniteError
from safelight_server.domain.component import Component
from safelight_server.domain.picture import Pixels
from safelight_server.export import memory
from safelight_server.export.manifest import readable
from safelight_server.export.source import ExportError
from safelight_server.export.staging import staging_folder
from safelight_server.quantization import conditions, network, quality
from safelight_server.quantization.conditions import Wish
from safelight_server.quantization.judges import Pictures
from safelight_server.quantization.offline import Inputs, OfflinePipeline
from safelight_server.quantization.quality import DrawnTwice, QualityOptions
from safelight_server.runtime import onnx as runtime
from safelight_server.runtime import verification
from safelight_server.runtime.base import RuntimeFailure

SCHEME: Final = "int8"
CALIBRATION_PICTURES = 4
"""Least number of pictures whose steps fix the ranges of activations, from noise to the last step."""
CALIBRATION_SEED = 1 << 32
"""Seeds of calibration begin here, those of the comparison at 0: no picture is judged that was calibrated with."""
OWN_PICTURES = 2
"""Pictures of each size that a pipeline draws to be given them itself, where its denoiser takes pictures."""
OWN_SEED = 1 << 33
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
    manifest = manifest.absolute()
    if manifest.parts[-4:-3] != ("pipelines",):
        raise ExportError(f"{manifest}: is not MODELS/pipelines/NAME/REVISION/pipeline.json, with MODELS/repository")
    models = manifest.parents[3]
    try:
        pipeline = load_pipeline(manifest, models / "repository")
        quality.require_quantizable(str(manifest.parent), pipeline.manifest)
        with staging_folder(models) as staged:
            return _quantize(manifest, pipeline, models, staged, options, report)
    except (ManifestError, RuntimeFailure, NotFiniteError) as error:
        raise ExportError(str(error)) from None


def _quantize(
    manifest: Path, pipeline: Pipeline, models: Path, staged: Path, options: QualityOptions, report: Report
) -> Path:
    """Writes everything below `staged`, holds it to the bounds, loads and installs it."""
    texts = tuple(dict.fromkeys([*pipeline.manifest.example_prompts, *PROMPTS]))
    denoiser = pipeline.manifest.components[Component.DENOISER]
    place = staged / "repository" / f"{denoiser.model}_{SCHEME}"
    target = place / str(denoiser.version) / "model.onnx"
    target.parent.mkdir(parents=True)
    own = _own_pictures(pipeline, texts, report)
    report("calibrating: the ranges of activations in all steps of a few pictures")
    calibration = _calibration(pipeline, texts, own)
    network.write_int8(pipeline.files[Component.DENOISER], target, calibration)
    _copy_config(pipeline.files[Component.DENOISER].parents[1] / "config.pbtxt", place)
    report(_check_batches(pipeline, target))
    found = _compare(pipeline, target, texts, own, options, report)
    made = _write_manifest(manifest, pipeline, staged, target, _largest_row(calibration), found)
    try:
        _load(made, models, staged)
    except ManifestError as error:
        raise ExportError(f"the server would refuse what was made: {error}") from None
    return _install(staged, models, place, made)


def _own_pictures(pipeline: Pipeline, texts: Sequence[str], report: Report) -> Mapping[SizeOffer, Sequence[Pixels]]:
    """Pictures of each size that the denoiser can be given, where it takes any: drawn from prompts alone."""
    if not conditions.takes_pictures(pipeline.manifest):
        return {}
    report("drawing pictures to give to the denoiser")
    offline, seeds = OfflinePipeline(pipeline), range(OWN_SEED, OWN_SEED + OWN_PICTURES)
    prompts = [texts[number % len(texts)] for number in range(OWN_PICTURES)]
    return {
        size: list(
            offline.pictures(prompts, seeds, size=size, conditions=[conditions.plain(pipeline, size)] * OWN_PICTURES)
        )
        for size in pipeline.manifest.sizes
    }


def _calibration(pipeline: Pipeline, texts: Sequence[str], own: Mapping[SizeOffer, Sequence[Pixels]]) -> list[Inputs]:
    """Inputs of the denoiser in all steps of some pictures, a row each with its prompt and without."""
    inputs: list[Inputs] = []
    count = conditions.least_wishes(pipeline.manifest, CALIBRATION_PICTURES)
    chosen = [texts[number % len(texts)] for number in range(count)]
    seeds = range(CALIBRATION_SEED, CALIBRATION_SEED + count)
    _drawn(OfflinePipeline(pipeline), conditions.wishes(pipeline, chosen, seeds, own), inputs.append)
    return inputs


def _drawn(
    offline: OfflinePipeline, wishes: Sequence[Wish], watch: Callable[[Inputs], None] = lambda inputs: None
) -> list[Pictures]:
    """The pictures of wishes, by kind."""
    return [
        offline.pictures(
            [wish.prompt for wish in of_kind],
            [wish.seed for wish in of_kind],
            watch,
            of_kind[0].size,
            [wish.conditions for wish in of_kind],
        )
        for of_kind in _by_kind(wishes)
    ]


def _by_kind(wishes: Sequence[Wish]) -> list[list[Wish]]:
    return [[wish for wish in wishes if wish.kind == kind] for kind in dict.fromkeys(wish.kind for wish in wishes)]


def _largest_row(calibration: Sequence[Inputs]) -> Inputs:
    """Inputs of one row that takes most memory: of the largest size, with all control networks that a row has."""

    def taken(inputs: Inputs, row: int) -> tuple[int, int]:
        acting = int(np.count_nonzero(inputs[CONTROL_SCALES_SOURCE][row])) if CONTROL_SCALES_SOURCE in inputs else 0
        return sum(values[row].nbytes for values in inputs.values()), acting

    inputs, row = max(
        ((inputs, row) for inputs in calibration for row in range(len(next(iter(inputs.values()))))),
        key=lambda at: taken(*at),
    )
    return {name: values[row : row + 1] for name, values in inputs.items()}


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
    size = [f"{_num_bytes(file) / 2**20:.1f}" for file in files]
    costs = ", ".join(
        f"{rows}: {1e3 * now:.1f} of {1e3 * before:.1f}"
        for rows, before, now in zip(curves[0].rows, curves[0].seconds, curves[1].seconds, strict=True)
    )
    return f"{size[1]} of {size[0]} MiB; batches bit-equal to their rows; ms by rows {costs}"


def _num_bytes(file: Path) -> int:
    """Of a network, with the file of its weights if there is one."""
    data = file.with_name(DATA_FILE)
    return file.stat().st_size + (data.stat().st_size if data.is_file() else 0)


def _compare(
    pipeline: Pipeline,
    target: Path,
    texts: Sequence[str],
    own: Mapping[SizeOffer, Sequence[Pixels]],
    options: QualityOptions,
    report: Report,
) -> QualityGate:
    """Draws pictures with both denoisers and holds them to the bounds.

    Raises:
        ExportError: they differ too much.
    """
    count = conditions.least_wishes(pipeline.manifest, options.num_pictures)
    prompts = [texts[-1 - number % len(texts)] for number in range(count)]
    report(f"drawing {count} pictures with each denoiser")
    wishes = conditions.wishes(pipeline, prompts, range(count), own)
    of_float, of_int8 = (_drawn(OfflinePipeline(pipeline, at), wishes) for at in (None, target))
    prompts_of = [[wish.prompt for wish in of_kind] for of_kind in _by_kind(wishes)]
    found = quality.compared(list(map(DrawnTwice, prompts_of, of_float, of_int8)), options)
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
    if (data := target.with_name(DATA_FILE)).is_file():
        denoiser["data_sha256"] = sha256(data)
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
