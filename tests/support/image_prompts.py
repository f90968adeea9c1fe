"""A pipeline like `icons` that takes image prompts, with small networks of our own: written as ONNX without its package.

Its denoiser adds to a function of the latent what the image prompt says: the mean of the tokens times the scale. Its
image encoder makes the mean colour of a picture to tokens, and the half of it to negative tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safelight_server.catalog.manifest import IMAGE_PROMPT_INPUTS, STABLE_DIFFUSION_INPUTS

from tests.support.models_folder import add_pipeline, copy_models

NAME = "prompted"
ROOM = {"edge_px": 8, "num_tokens": 2, "width": 3}
INPUTS = STABLE_DIFFUSION_INPUTS | IMAGE_PROMPT_INPUTS
IMAGE_ENCODER = {"image_encoder": {"model": "small_image_encoder", "version": 1, "sha256": "0" * 64}}
FLOAT, OPSET, IR_VERSION = 1, 13, 8
LATENT, CONTEXT = (32, 8, 8), (32, 128)

Shape = tuple[int | str, ...]


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


def network(
    inputs: Mapping[str, Shape],
    outputs: Mapping[str, Shape],
    nodes: Sequence[bytes],
    constants: Mapping[str, np.ndarray[Any, Any]],
) -> bytes:
    """An ONNX file; an axis with a name is free."""
    graph = b"".join(field(1, one) for one in nodes) + field(2, "graph")
    graph += b"".join(field(5, _tensor(name, values)) for name, values in constants.items())
    graph += b"".join(field(11, _value(name, shape)) for name, shape in inputs.items())
    graph += b"".join(field(12, _value(name, shape)) for name, shape in outputs.items())
    return field(1, IR_VERSION) + field(7, graph) + field(8, field(2, OPSET))


def node(kind: str, inputs: Sequence[str], output: str, **attributes: int | list[int]) -> bytes:
    """A NodeProto with one output."""
    made = b"".join(field(1, name) for name in inputs) + field(2, output) + field(4, kind)
    for name, value in attributes.items():
        of = field(3, value) if isinstance(value, int) else b"".join(field(8, one) for one in value)
        made += field(5, field(1, name) + of + field(20, 2 if isinstance(value, int) else 7))
    return made


def field(number: int, value: int | str | bytes) -> bytes:
    """A field of a protobuf message."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    made = bytearray()
    while value > 127:
        made.append(value & 127 | 128)
        value >>= 7
    return bytes([*made, value])


def _value(name: str, shape: Shape) -> bytes:
    dims = b"".join(field(1, field(1, axis) if isinstance(axis, int) else field(2, axis)) for axis in shape)
    return field(1, name) + field(2, field(1, field(1, FLOAT) + field(2, dims)))


def _tensor(name: str, values: np.ndarray[Any, Any]) -> bytes:
    dims = b"".join(field(1, axis) for axis in values.shape)
    kind = {"float32": FLOAT, "int64": 7}[str(values.dtype)]
    return dims + field(2, kind) + field(8, name) + field(9, values.tobytes())
