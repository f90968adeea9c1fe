"""`safelight export --quantize int8`: on `icons`: what is written, refused, and served."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from safelight import Client
from safelight_server.app.server import serving
from safelight_server.catalog import catalog
from safelight_server.domain.component import Component
from safelight_server.export.source import ExportError
from safelight_server.quantization import quantize
from safelight_server.quantization.quality import QualityOptions
from safelight_server.settings import load

from tests.support.models_folder import copy_models

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def icons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped models with a quantized revision beside the float one."""
    models = copy_models(tmp_path_factory.mktemp("icons"))
    [manifest] = models.glob("pipelines/icons/*/pipeline.json")
    quantize.quantize(manifest, QualityOptions(num_pictures=4))
    return models


def test_a_quantized_revision_stands_beside_the_float_one(icons: Path) -> None:
    found = catalog.load(icons)
    float_one, int8 = found.get("icons"), found.get("icons@int8")
    assert int8.manifest.revision == f"{float_one.manifest.revision}-int8"
    quantized = int8.manifest.quantization
    assert quantized is not None and quantized.of == float_one.manifest.revision
    assert quantized.quality.psnr_db > 25
    assert any(f"{quantized.quality.psnr_db} dB" in note for note in int8.manifest.notes)
    assert {at for at in float_one.files if float_one.files[at] == int8.files[at]} == set(int8.files) - {
        Component.DENOISER
    }
    sizes = [at.files[Component.DENOISER].stat().st_size for at in (float_one, int8)]
    assert sizes[1] < 0.65 * sizes[0]
    model = onnx.load(int8.files[Component.DENOISER])
    assert "DynamicQuantizeLinear" not in {node.op_type for node in model.graph.node}


async def test_rows_of_both_revisions_share_a_server_and_keep_their_bits(icons: Path) -> None:
    async with serving(load(port=0, models_dir=icons, log_level="error")) as running, Client(running.address) as client:

        async def picture(model: str, seed: int) -> np.ndarray:
            asked = client.generate("a red potion", model=model, seed=seed, steps=4, cache="bypass")
            return np.asarray(await asked.image())

        wanted = [("icons@int8", 1), ("icons", 1), ("icons@int8", 2), ("icons@int8", 3)]
        alone = [await picture(*one) for one in wanted]
        together = await asyncio.gather(*(picture(*one) for one in wanted))
        for one, other in zip(alone, together, strict=True):
            assert np.array_equal(one, other)
        assert not np.array_equal(alone[0], alone[1])


def test_what_is_refused_changes_nothing(tmp_path: Path) -> None:
    models = copy_models(tmp_path)
    before = sorted(models.rglob("*"))
    [manifest] = models.glob("pipelines/icons/*/pipeline.json")
    said = []

    def other_labels_each_time(prompts: Sequence[str], pictures: np.ndarray) -> np.ndarray:
        said.append(pictures.shape)
        return np.full((len(prompts), 3), len(said))

    with pytest.raises(ExportError, match=r"below --min-psnr 90; the judge sees the same in 0.0%, below"):
        quantize.quantize(manifest, QualityOptions(1, min_psnr_db=90.0, judge=other_labels_each_time))
    assert said == [(1, 128, 128, 3)] * 2
    assert sorted(models.rglob("*")) == before


def test_the_manifest_has_the_figures(icons: Path) -> None:
    whole = json.loads(next(icons.glob("pipelines/icons/*-int8/pipeline.json")).read_text())
    assert whole["quantization"]["quality"]["num_pictures"] == 4
    assert whole["components"]["denoiser"]["row_bytes"] > 0
