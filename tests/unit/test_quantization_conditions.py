"""What calibration and comparison give a denoiser beside prompts, and what of a network stays float."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safelight_server.catalog import catalog
from safelight_server.catalog.manifest import GUIDANCE_SOURCE, STABLE_DIFFUSION_INPUTS
from safelight_server.catalog.pipeline import Pipeline
from safelight_server.quantization import conditions
from safelight_server.quantization.graph import of_adapters
from safelight_server.quantization.offline import Inputs, OfflinePipeline

from tests.support.conditions import NAME, TWO_SIZES, models_with_conditions
from tests.support.inpainting import NAME as INPAINTER
from tests.support.inpainting import models_that_inpaint
from tests.support.pipelines import small_pipeline


def own_pictures(pipeline: Pipeline) -> dict[Any, list[np.ndarray]]:
    rng = np.random.default_rng(3)
    return {
        size: [rng.integers(0, 256, (size.height_px, size.width_px, 3), np.uint8) for _ in range(2)]
        for size in pipeline.manifest.sizes
    }


def all_wishes(pipeline: Pipeline, least: int = 4) -> list[conditions.Wish]:
    count = conditions.least_wishes(pipeline.manifest, least)
    return conditions.wishes(pipeline, ["a red potion"] * count, range(count), own_pictures(pipeline))


def met(pipeline: Pipeline) -> list[Inputs]:
    """The inputs of all calls for `all_wishes`, of two steps each."""
    offline, seen = OfflinePipeline(pipeline), []
    for wish in all_wishes(pipeline):
        offline.images([wish.prompt], [wish.seed], 3.0, None, 2, seen.append, None, wish.size, [wish.conditions])
    return seen


def test_a_denoiser_meets_rows_with_and_without_conditions_at_each_size(tmp_path: Path) -> None:
    pipeline = catalog.load(models_with_conditions(tmp_path, TWO_SIZES)).get(NAME)
    seen = met(pipeline)
    for size in pipeline.manifest.sizes:
        shape = pipeline.latent_shape(size.width_px, size.height_px)
        of_size = [inputs for inputs in seen if inputs["sample"].shape[1:] == shape]
        for name in ("control_scales", "image_prompt_scale", "image_prompt_tokens", "control_images"):
            assert {bool(inputs[name].any()) for inputs in of_size} == {True, False}, (size, name)
    assert not any(inputs["adapter_weights"].any() for inputs in seen)
    assert all(len(inputs["sample"]) == 2 for inputs in seen)


def test_control_networks_act_together_and_alone(tmp_path: Path) -> None:
    pipeline = catalog.load(models_with_conditions(tmp_path)).get(NAME)
    acting = {tuple(one.place for one in wish.conditions.controls) for wish in all_wishes(pipeline, 8)}
    assert acting == {(), (0, 1), (0,), (1,)}


def test_a_denoiser_that_inpaints_always_meets_a_picture_and_a_mask(tmp_path: Path) -> None:
    pipeline = catalog.load(models_that_inpaint(tmp_path)).get(INPAINTER)
    seen = met(pipeline)
    shares = {float(inputs["mask"].mean()) for inputs in seen}
    assert len(shares) > 1 and 1.0 in shares and shares <= {0.25, 0.5, 1.0}
    assert all(inputs["masked_image"].any() for inputs in seen if inputs["mask"].mean() < 1)
    [size] = pipeline.manifest.sizes
    plain = conditions.plain(pipeline, size)
    assert OfflinePipeline(pipeline).pictures(["a"], [1], size=size, conditions=[plain]).shape == (1, 128, 128, 3)


def test_a_plain_denoiser_is_given_nothing_and_a_distilled_one_several_scales(tmp_path: Path) -> None:
    plain = small_pipeline(tmp_path)
    assert not conditions.takes_pictures(plain.manifest)
    assert {(wish.conditions.guidance_scale, wish.conditions.controls) for wish in all_wishes(plain)} == {(None, ())}
    distilled = small_pipeline(tmp_path, inputs={**STABLE_DIFFUSION_INPUTS, "guidance": GUIDANCE_SOURCE})
    assert {wish.conditions.guidance_scale for wish in all_wishes(distilled, 6)} == {3.0, 1.0, 6.0}


def test_outlines_are_white_where_neighbours_differ() -> None:
    picture = np.zeros((6, 6, 3), np.uint8)
    picture[3:] = 200
    assert conditions.outlines(picture)[:, :, 0].tolist() == [[255 * (row == 3)] * 6 for row in range(6)]


def operator(kind: str, inputs: list[str], output: str) -> Any:
    return SimpleNamespace(name=output + ".node", op_type=kind, input=inputs, output=[output])


def test_the_products_of_adapters_stay_float_and_their_layers_do_not() -> None:
    nodes = [
        operator("MatMul", ["x", "weight"], "own"),
        operator("Slice", ["adapter_weights", "from", "to"], "down"),
        operator("MatMul", ["x", "down"], "seen"),
        operator("Mul", ["seen", "adapter_scales"], "scaled"),
        operator("Conv", ["scaled", "moves"], "moved"),
        operator("MatMul", ["moved", "up"], "added"),
        operator("Add", ["own", "added"], "y"),
        operator("MatMul", ["y", "next_weight"], "next"),
    ]
    kept = of_adapters(nodes, ["adapter_weights", "adapter_scales"])
    assert kept == ["down.node", "seen.node", "scaled.node", "moved.node", "added.node"]
    assert of_adapters(nodes, []) == []


@pytest.mark.parametrize("turn", range(4))
def test_a_mask_develops_a_part_and_never_nothing(turn: int) -> None:
    size = conditions.SizeOffer(width_px=8, height_px=16)
    mask = conditions._mask(size, turn)
    assert mask.shape == (16, 8)
    assert set(np.unique(mask)) <= {0, 255} and mask.any()
