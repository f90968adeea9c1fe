"""A pipeline like `icons` that only inpaints, with a small denoiser of our own.

What it predicts is a function of the latent, to which the mask and a half of the masked picture are added.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
from safelight_server.catalog.manifest import INPAINTING_INPUTS, STABLE_DIFFUSION_INPUTS

from tests.support.models_folder import add_pipeline, copy_models
from tests.support.onnx_files import network, node

NAME = "inpainter"
INPUTS = STABLE_DIFFUSION_INPUTS | INPAINTING_INPUTS
LATENT, CONTEXT = (32, 8, 8), (32, 128)


def models_that_inpaint(folder: Path) -> Path:
    """A new folder of models below `folder`, whose only pipeline is `NAME`."""
    models = copy_models(folder)
    mask = (1, *LATENT[1:])
    denoiser = network(
        inputs={
            "sample": ("rows", *LATENT),
            "timestep": ("rows",),
            "encoder_hidden_states": ("rows", *CONTEXT),
            "mask": ("rows", *mask),
            "masked_image": ("rows", *LATENT),
        },
        outputs={"prediction": ("rows", *LATENT)},
        nodes=[
            node("Tanh", ["sample"], "of_latent"),
            node("Mul", ["masked_image", "half"], "of_picture"),
            node("Add", ["of_latent", "of_picture"], "of_both"),
            node("Add", ["of_both", "mask"], "prediction"),
        ],
        constants={"half": np.array([0.5], np.float32)},
    )
    path = add_pipeline(models, NAME, denoiser, inputs=INPUTS)
    file = models / "repository" / f"{NAME}_denoiser" / "config.pbtxt"
    more = f'input {{ name: "mask" data_type: TYPE_FP32 dims: {list(mask)} }}\n'
    more += f'input {{ name: "masked_image" data_type: TYPE_FP32 dims: {list(LATENT)} }}\n'
    file.write_text(file.read_text().replace('"icons_denoiser"', f'"{NAME}_denoiser"') + more)
    manifest = json.loads(path.read_text())
    for role in ("text_encoder", "decoder", "encoder"):  # in small batches, whose check takes no time at the start
        component = manifest["components"][role]
        shipped, place = models / "repository" / component["model"], models / "repository" / f"{NAME}_{role}"
        place.mkdir()
        (place / str(component["version"])).symlink_to(shipped / str(component["version"]))
        text = (shipped / "config.pbtxt").read_text().replace(f'"{shipped.name}"', f'"{place.name}"')
        (place / "config.pbtxt").write_text(re.sub(r"max_batch_size: \d+", "max_batch_size: 4", text))
        component["model"] = place.name
    del manifest["components"]["preview_decoder"]  # not needed, and it takes time to start
    path.write_text(json.dumps(manifest))
    shutil.rmtree(models / "pipelines" / "icons")
    return models
