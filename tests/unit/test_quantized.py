"""Quantized revisions: how they are served, what they share with the float revision, and their quality gate."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safelight_server.catalog import catalog, revisions
from safelight_server.catalog.catalog import ManifestError
from safelight_server.cli.export import export as export_command
from safelight_server.domain.component import Component
from safelight_server.export.source import ExportError
from safelight_server.quantization import quality
from safelight_server.quantization.judges import Pictures
from safelight_server.quantization.quality import DrawnTwice, QualityOptions
from safelight_server.runtime import verification
from safelight_server.runtime.base import CostCurve
from safelight_server.runtime.onnx import OnnxRuntime

from tests.support.models_folder import copy_models

QUALITY = {"num_pictures": 4, "psnr_db": 30.0, "least_psnr_db": 20.0, "min_psnr_db": 20.0, "min_agreement": 0.95}
QUANTIZATION = {"scheme": "int8", "of": "1.0", "made_by": "a test", "quality": QUALITY}


def add_revision(models: Path, revision: str, **changes: object) -> None:
    """A revision of `icons` with the denoiser in a file of its own."""
    [shipped] = (models / "pipelines" / "icons").glob("1.0")
    shutil.copytree(shipped, shipped.parent / revision)
    repository = models / "repository"
    shutil.copytree(repository / "icons_denoiser", repository / "icons_denoiser_int8", dirs_exist_ok=True)
    path = shipped.parent / revision / "pipeline.json"
    manifest = json.loads(path.read_text()) | {"revision": revision, "quantization": QUANTIZATION} | changes
    manifest["components"]["denoiser"]["model"] = "icons_denoiser_int8"
    path.write_text(json.dumps(manifest))


def test_the_newest_float_and_the_newest_quantized_revision_are_served(tmp_path: Path) -> None:
    models = copy_models(tmp_path)
    for revision in ("1.0-int8", "1.9-int8", "1.10-int8"):
        add_revision(models, revision)
    found = catalog.load(models)
    assert {name: at.manifest.revision for name, at in found.pipelines.items()} == {
        "icons": "1.0",
        "icons@int8": "1.10-int8",
    }
    assert found.default == "icons"
    assert found.get("icons@int8").digest != found.get("icons").digest
    assert [found.get(name).precision for name in found.pipelines] == ["f32", "int8"]


@pytest.mark.parametrize(
    ("revision", "changes", "named"),
    [("1.1", {}, "1.1 is the name of one that is not quantized"), ("1.1-int8", {"quantization": None}, "is quantized")],
)
def test_the_name_of_a_revision_says_whether_it_is_quantized(
    tmp_path: Path, revision: str, changes: dict[str, object], named: str
) -> None:
    models = copy_models(tmp_path)
    add_revision(models, revision, **changes)
    with pytest.raises(ManifestError, match=named):
        catalog.load(models)


def test_names_of_revisions() -> None:
    assert revisions.scheme("1.0-int8") == "int8"
    assert [revisions.scheme(name) for name in ("int8", "1.0", "1-int4", "")] == ["", "", "", ""]


async def test_what_two_revisions_share_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once(*_: object) -> CostCurve:
        return CostCurve((1,), (0.001,))

    monkeypatch.setattr(verification, "warm_up_sizes", at_once)
    models = copy_models(tmp_path)
    add_revision(models, "1.0-int8")
    runtime = OnnxRuntime(catalog.load(models), num_instances=1)
    try:
        await runtime.start()
        sessions = runtime._sessions
        roles = {role for name, role in sessions if name == "icons"}
        shared = {at for at in roles if sessions["icons", at] is sessions["icons@int8", at]}
        assert shared == roles - {Component.DENOISER}
        assert runtime.cost("icons@int8", Component.DECODER) is runtime.cost("icons", Component.DECODER)
        of_float, of_int8 = (runtime.numerics_id(name) for name in ("icons", "icons@int8"))
        assert "-f32-" in of_float and of_int8 == of_float.replace("-f32-", "-int8-")
    finally:
        await runtime.close()


BLACK, GREY = np.zeros((4, 2, 2, 3), np.uint8), np.full((4, 2, 2, 3), 16, np.uint8)


def by_prompt(prompts: Sequence[str], pictures: Pictures) -> np.ndarray:
    """A fake judge that knows the prompts, but judges the first picture by its brightness."""
    return np.array(
        [
            [prompt, int(picture.mean()) if not at else 0]
            for at, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True))
        ]
    )


def test_pictures_are_held_to_their_bounds() -> None:
    prompts = ["one", "two", "three", "four"]
    options = QualityOptions(min_psnr_db=20, judge=by_prompt, min_agreement=0.875)
    found = quality.compared([DrawnTwice(prompts, BLACK, GREY)], options)
    assert (found.num_pictures, found.psnr_db, found.least_psnr_db) == (4, 24.05, 24.05)
    assert found.agreement == 7 / 8
    quality.require(found)
    with pytest.raises(ExportError, match=r"24.05 dB, below --min-psnr 25$"):
        quality.require(found.model_copy(update={"min_psnr_db": 25.0}))
    with pytest.raises(ExportError, match=r"the same in 87.5%, below --min-agreement 0.9$"):
        quality.require(found.model_copy(update={"min_agreement": 0.9}))
    with pytest.raises(ExportError, match="refused"):
        quality.require(found.model_copy(update={"psnr_db": float("nan")}))


def test_equal_pictures_pass_and_without_a_judge_nothing_is_said_of_it() -> None:
    found = quality.compared([DrawnTwice(["one"] * 4, GREY, GREY)], QualityOptions())
    assert (found.psnr_db, found.agreement) == (quality.MAX_PSNR_DB, None)
    quality.require(found)


@pytest.mark.parametrize("curve", [None, CostCurve((1,), (0.1,))])
def test_rows_whose_bits_depend_on_their_batch_are_refused(curve: CostCurve | None) -> None:
    with pytest.raises(ExportError, match=r"net: batches of more than [01] rows do not have the bits"):
        quality.require_batches("net", curve, 16)
    whole = CostCurve((1, 16), (0.1, 0.5))
    assert quality.require_batches("net", whole, 16) is whole


def test_each_size_and_kind_has_to_keep_the_bounds() -> None:
    wide = np.zeros((8, 2, 4, 3), np.uint8)
    drawn = [DrawnTwice(["two"] * 8, wide, wide), DrawnTwice(["one"] * 4, BLACK, GREY)]
    found = quality.compared(drawn, QualityOptions(judge=by_prompt))
    assert (found.num_pictures, found.psnr_db, found.least_psnr_db) == (12, 24.05, 24.05)
    assert found.agreement == round(7 / 8, 4)  # of the kind that has the fewest


def test_what_is_quantized_already_is_refused() -> None:
    icons = catalog.load(Path("models")).get("icons").manifest
    quality.require_quantizable("icons", icons)
    quantized = icons.model_copy(update={"quantization": QUANTIZATION})
    with pytest.raises(ExportError, match="icons: it is quantized already"):
        quality.require_quantizable("icons", quantized)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_agreement": 95, "judge": f"{__name__}:by_prompt"}, "--min-agreement 95: must be a share, from 0 to 1"),
        ({"min_psnr": float("nan")}, "--min-psnr nan: must be from 0 to 100 dB"),
        ({"min_psnr": 120}, "--min-psnr 120: must be from 0 to 100 dB"),
        ({"min_agreement": 0.9}, "--min-agreement: goes with --judge"),
    ],
)
def test_bounds_that_nothing_could_keep_are_refused_before_the_work(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ExportError, match=said):
        export_command(tmp_path, quantize="int8", **options)


def test_files_for_torch_alone_cannot_be_quantized() -> None:
    command = [sys.executable, "-m", "safelight_server", "export", "x", "--quantize", "int8", "--format", "torch"]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "server"})
    assert ended.returncode == 2
    assert "--quantize: quantizes the files of ONNX Runtime; use --format onnx or both" in ended.stderr


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--steps", "4"], "--steps"), (["--sizes", "64x64", "--models-dir", "x"], "--sizes, --models-dir")],
)
def test_options_of_an_export_do_not_go_with_what_was_exported_already(options: list[str], named: str) -> None:
    command = [sys.executable, "-m", "safelight_server", "export", "models/pipelines/icons/1.0", "--quantize", "int8"]
    ended = subprocess.run(
        [*command, *options], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "server"}
    )
    assert ended.returncode == 2
    assert f"{named}: models/pipelines/icons/1.0 was exported already" in ended.stderr
