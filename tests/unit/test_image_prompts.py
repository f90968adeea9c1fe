"""Models that take image prompts: what their manifests must say, and what the runtime verifies them with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safelight_server.catalog.catalog import ManifestError, load
from safelight_server.catalog.checks import check
from safelight_server.catalog.manifest import Manifest
from safelight_server.runtime.verification import InputSpec, example

from tests.support.conditions import NAME, models_with_conditions
from tests.support.image_prompts import IMAGE_ENCODER, INPUTS, ROOM
from tests.support.pipelines import MANIFEST, small_pipeline

WHOLE = {"image_prompt": ROOM, "inputs": INPUTS, "components": MANIFEST["components"] | IMAGE_ENCODER}


@pytest.mark.parametrize("lacking", [*WHOLE, "image_prompt_scale"])
def test_an_image_prompt_needs_its_inputs_and_an_image_encoder(lacking: str) -> None:
    assert not check(Manifest.model_validate(MANIFEST | WHOLE))
    changes = {key: value for key, value in WHOLE.items() if key != lacking}
    if lacking not in WHOLE:
        changes["inputs"] = {name: source for name, source in INPUTS.items() if name != lacking}
    [fault] = check(Manifest.model_validate(MANIFEST | changes))
    assert fault == (
        "image_prompt: goes with a component image_encoder and inputs of image_prompt_tokens and image_prompt_scale"
    )


def test_image_prompts_are_in_the_digest(tmp_path: Path) -> None:
    whole = small_pipeline(tmp_path, **WHOLE)
    other = small_pipeline(tmp_path, **WHOLE | {"image_prompt": ROOM | {"edge_px": 16}})
    assert len({at.digest for at in (small_pipeline(tmp_path), whole, other)}) == 3
    assert small_pipeline(tmp_path, image_prompt=None).digest == small_pipeline(tmp_path).digest


@pytest.mark.parametrize(
    ("key", "fault"),
    [
        ("edge_px", "components.image_encoder: config.pbtxt: image"),
        ("num_tokens", "components.denoiser: config.pbtxt: image_prompt_tokens"),
        ("width", "components.image_encoder: config.pbtxt: negative_tokens"),
    ],
)
def test_shapes_of_image_prompts_are_those_of_the_networks(tmp_path: Path, key: str, fault: str) -> None:
    models = models_with_conditions(tmp_path)
    assert load(models).get(NAME).manifest.image_prompt is not None
    [path] = models.glob("pipelines/*/*/pipeline.json")
    manifest = json.loads(path.read_text())
    manifest["image_prompt"][key] += 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match=fault):
        load(models)


def test_rows_are_verified_with_image_prompts_and_without() -> None:
    specs = [InputSpec("image_prompt_tokens", (2, 3)), InputSpec("image_prompt_scale", ()), InputSpec("timestep", ())]
    scale = example(specs, 7)["image_prompt_scale"]
    assert not scale[2::3].any()
    assert (scale[[0, 1, 3, 4, 6]] > 0).all() and scale.max() <= 1
    assert np.array_equal(example(specs, 7)["image_prompt_scale"], scale)
