"""A pipeline like `icons` that takes image prompts, with small networks of our own.

Its denoiser adds to a function of the latent what the image prompt says: the mean of the tokens times the scale. Its
image encoder makes the mean colour of a picture to tokens, and the half of it to negative tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
from safelight_server.catalog.manifest import IMAGE_PROMPT_INPUTS, STABLE_DIFFUSION_INPUTS

from tests.support.models_folder import add_pipeline, copy_models
from tests.support.onnx_files import network, node

NAME = "prompted"
ROOM = {"edge_px": 8, "num_tokens": 2, "width": 3}
INPUTS = STABLE_DIFFUSION_INPUTS | IMAGE_PROMPT_INPUTS
IMAGE_ENCODER = {"image_encoder": {"model": "small_image_encoder", "version": 1, "sha256": "0" * 64}}
LATENT, CONTEXT = (32, 8, 8), (32, 128)


def models_with_image_prompts(folder: Path) -> Path:
    """A new folder of models below `folder`, whose only pipeline is `NAME`."""
    models = copy_models(folder)
    denoiser = network(
        inputs={
            "sample": ("rows", *LATENT),
            "timestep": ("rows",),
            "encoder_hidden_states": ("rows", *CONTEXT),
            "image_prompt_tokens": ("rows", ROOM["num_tokens"], ROOM["width"]),
            "image_prompt_scale": ("rows",),
        },
        outputs={"prediction": ("rows", *LATENT)},
        nodes=[
            node("Tanh", ["sample"], "of_latent"),
            node("ReduceMean", ["image_prompt_tokens"], "mean", axes=[1, 2], keepdims=0),
            node("Mul", ["mean", "image_prompt_scale"], "weighted"),
            node("Unsqueeze", ["weighted", "last_axes"], "of_image"),
            node("Add", ["of_latent", "of_image"], "prediction"),
        ],
        constants={"last_axes": np.array([1, 2, 3], np.int64)},
    )
    tokens = ("rows", ROOM["num_tokens"], ROOM["width"])
    encoder = network(
        inputs={"image": ("rows", 3, ROOM["edge_px"], ROOM["edge_px"])},
        outputs={"tokens": tokens, "negative_tokens": tokens},
        nodes=[
            node("ReduceMean", ["image"], "colour", axes=[2, 3], keepdims=0),
            node("Unsqueeze", ["colour", "axis"], "token"),
            node("Concat", ["token", "token"], "tokens", axis=1),
            node("Mul", ["tokens", "half"], "negative_tokens"),
        ],
        constants={"axis": np.array([1], np.int64), "half": np.array([0.5], np.float32)},
    )
    path = add_pipeline(models, NAME, denoiser, inputs=INPUTS, image_prompt=ROOM)
    text = (models / "repository" / f"{NAME}_denoiser" / "config.pbtxt").read_text()
    room = f"dims: [{ROOM['num_tokens']}, {ROOM['width']}]"
    more = f'input {{ name: "image_prompt_tokens" data_type: TYPE_FP32 {room} }}\n'
    more += 'input { name: "image_prompt_scale" data_type: TYPE_FP32 dims: [1] reshape { shape: [] } }\n'
    (models / "repository" / f"{NAME}_denoiser" / "config.pbtxt").write_text(text + more)
    place = models / "repository" / f"{NAME}_image_encoder"
    (place / "1").mkdir(parents=True)
    (place / "1" / "model.onnx").write_bytes(encoder)
    (place / "config.pbtxt").write_text(
        f'name: "{place.name}"\nbackend: "onnxruntime"\nmax_batch_size: 4\n'
        f'input {{ name: "image" data_type: TYPE_FP32 dims: [3, {ROOM["edge_px"]}, {ROOM["edge_px"]}] }}\n'
        f'output {{ name: "tokens" data_type: TYPE_FP32 {room} }}\n'
        f'output {{ name: "negative_tokens" data_type: TYPE_FP32 {room} }}\n'
    )
    manifest = json.loads(path.read_text())
    for role in ("text_encoder", "decoder"):  # in small batches, whose check takes no time at the start
        component = manifest["components"][role]
        shipped, place_of = models / "repository" / component["model"], models / "repository" / f"{NAME}_{role}"
        place_of.mkdir()
        (place_of / str(component["version"])).symlink_to(shipped / str(component["version"]))
        text = (shipped / "config.pbtxt").read_text()
        (place_of / "config.pbtxt").write_text(re.sub(r"max_batch_size: \d+", "max_batch_size: 2", text))
        component["model"] = place_of.name
    sha256 = hashlib.sha256(encoder).hexdigest()
    for role in ("preview_decoder", "encoder"):  # neither is needed, and each takes time to start
        del manifest["components"][role]
    manifest["components"]["image_encoder"] = {"model": place.name, "version": 1, "sha256": sha256}
    path.write_text(json.dumps(manifest))
    shutil.rmtree(models / "pipelines" / "icons")
    return models
