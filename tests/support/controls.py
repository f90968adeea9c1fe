"""A pipeline like `icons` with control networks, in place of which its denoiser adds the brightness of their pictures."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from safelight_server.catalog.manifest import CONTROL_INPUTS, STABLE_DIFFUSION_INPUTS

from tests.support.models_folder import add_pipeline, copy_models
from tests.support.onnx_files import network, node

NAME, CONTROLS = "guided", ("edges", "depth")
LATENT, CONTEXT, PICTURES = (32, 8, 8), (32, 128), (2, 3, 128, 128)


def models_with_controls(folder: Path) -> Path:
    """A new folder of models below `folder`, whose only pipeline is `NAME`."""
    models = copy_models(folder)
    denoiser = network(
        inputs={
            "sample": ("rows", *LATENT),
            "timestep": ("rows",),
            "encoder_hidden_states": ("rows", *CONTEXT),
            "control_images": ("rows", *PICTURES),
            "control_scales": ("rows", PICTURES[0]),
        },
        outputs={"prediction": ("rows", *LATENT)},
        nodes=[
            node("Tanh", ["sample"], "of_latent"),
            node("ReduceMean", ["control_images"], "brightness", axes=[2, 3, 4], keepdims=0),
            node("Mul", ["brightness", "control_scales"], "weighted"),
            node("Mul", ["weighted", "places"], "told_apart"),
            node("ReduceMean", ["told_apart"], "added", axes=[1], keepdims=0),
            node("Unsqueeze", ["added", "last_axes"], "of_pictures"),
            node("Add", ["of_latent", "of_pictures"], "prediction"),
        ],
        constants={"last_axes": np.array([1, 2, 3], np.int64), "places": np.array([1, -0.5], np.float32)},
    )
    add_pipeline(models, NAME, denoiser, inputs=STABLE_DIFFUSION_INPUTS | CONTROL_INPUTS, controls=CONTROLS)
    config = models / "repository" / f"{NAME}_denoiser" / "config.pbtxt"
    more = f'input {{ name: "control_images" data_type: TYPE_FP32 dims: {list(PICTURES)} }}\n'
    more += f'input {{ name: "control_scales" data_type: TYPE_FP32 dims: [{PICTURES[0]}] }}\n'
    config.write_text(config.read_text() + more)
    shutil.rmtree(models / "pipelines" / "icons")
    return models
