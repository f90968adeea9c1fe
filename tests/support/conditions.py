"""A pipeline whose networks take adapters, controls and image prompts, with small networks of our own.

Its denoiser adds to a function of the latent numbers that each of them says. As in an exported one, a control network
is a branch that runs for the rows that use it alone. Its image encoder makes the mean colour of a picture to tokens,
and the half of it to negative tokens. Its text encoder gives each token numbers of its own, and adds what adapters say.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from safelight.v1 import generation_pb2_grpc as stubs
from safelight_server.app.server import Running
from safelight_server.catalog.manifest import (
    ADAPTER_INPUTS,
    CONTROL_INPUTS,
    IMAGE_PROMPT_INPUTS,
    STABLE_DIFFUSION_INPUTS,
)

from tests.conftest import serving_here
from tests.support import image_prompts
from tests.support.adapters import ROOM, TARGETS, TEXT_ROOM, TEXT_TARGETS
from tests.support.models_folder import add_network, add_pipeline, copy_models, remove_icons
from tests.support.onnx_files import Shape, graph, node

NAME, CONTROLS = "conditioned", ("edges", "depth")
CONTEXT, CHANNELS, FACTOR = (32, 128), 32, 16
ONE_SIZE, TWO_SIZES = ((128, 128),), ((128, 128), (64, 96))
"""Widths and heights of pictures in pixels, the default first."""
WIDTH = sum(inputs + outputs for _, inputs, outputs in TARGETS)
TEXT_WIDTH = sum(inputs + outputs for _, inputs, outputs in TEXT_TARGETS)
NUM_TOKENS = 600
"""More than the tokenizer of `icons` has."""


def models_with_conditions(folder: Path, sizes: tuple[tuple[int, int], ...] = ONE_SIZE) -> Path:
    """A new folder of models below `folder`, whose only pipeline is `NAME`."""
    models = copy_models(folder)
    height, width = sizes[0][1] // FACTOR, sizes[0][0] // FACTOR
    latent: Shape = (CHANNELS, height, width)
    picture: Shape = (3, FACTOR * height, FACTOR * width)
    if len(sizes) > 1:
        latent, picture = (CHANNELS, "height", "width"), (3, "picture_height", "picture_width")
    components = {
        "text_encoder": _text_encoder(models),
        "denoiser": _denoiser(models, latent, picture),
        "decoder": _decoder(models, latent, picture),
        "image_encoder": _image_encoder(models),
    }
    add_pipeline(
        models,
        NAME,
        inputs=STABLE_DIFFUSION_INPUTS | ADAPTER_INPUTS | CONTROL_INPUTS | IMAGE_PROMPT_INPUTS,
        components=components,
        sizes=[{"width_px": width, "height_px": height} for width, height in sizes],
        adapters=ROOM,
        text_adapters=TEXT_ROOM,
        controls=CONTROLS,
        image_prompt=image_prompts.ROOM,
    )
    remove_icons(models)
    return models


@asynccontextmanager
async def serving_conditions(
    models: Path, **settings: Any
) -> AsyncIterator[tuple[Running, grpc.aio.Channel, stubs.GenerationServiceStub]]:
    """A server of such a folder with one instance, a channel to it and its stub."""
    given = {"models_dir": models, "num_instances": 1} | settings
    async with serving_here(**given) as running, grpc.aio.insecure_channel(running.address) as channel:
        yield running, channel, stubs.GenerationServiceStub(channel)


def _text_encoder(models: Path) -> dict[str, object]:
    words = np.random.default_rng(1).standard_normal((NUM_TOKENS, CONTEXT[1])).astype(np.float32)
    rank = TEXT_ROOM["max_rank"]
    return add_network(
        models,
        f"{NAME}_text_encoder",
        {"input_ids": CONTEXT[:1], "adapter_weights": (rank, TEXT_WIDTH), "adapter_scales": (rank,)},
        {"last_hidden_state": CONTEXT},
        [
            node("Gather", ["words", "input_ids"], "of_words", axis=0),
            node("Unsqueeze", ["adapter_scales", "last_axis"], "scales_of_ranks"),
            node("Mul", ["adapter_weights", "scales_of_ranks"], "of_ranks"),
            node("ReduceMean", ["of_ranks"], "of_adapters", axes=[1, 2], keepdims=1),
            node("Add", ["of_words", "of_adapters"], "last_hidden_state"),
        ],
        {"words": words, "last_axis": np.array([2], np.int64)},
    )


def _denoiser(models: Path, latent: Shape, picture: Shape) -> dict[str, object]:
    shape = (image_prompts.ROOM["num_tokens"], image_prompts.ROOM["width"])
    rank = ROOM["max_rank"]
    nodes = [
        node("Tanh", ["sample"], "of_latent"),
        # as a UNet's skip connection, which refuses what has no half
        node("AveragePool", ["sample"], "halved", kernel_shape=[2, 2], strides=[2, 2]),
        node("ConvTranspose", ["halved", "doubling"], "doubled", strides=[2, 2], group=CHANNELS),
        node("Concat", ["sample", "doubled"], "both", axis=1),
        node("ReduceMean", ["both"], "of_halved", axes=[1, 2, 3], keepdims=0),
        node("ReduceMean", ["encoder_hidden_states"], "of_prompt", axes=[1, 2], keepdims=0),
        node("Unsqueeze", ["adapter_scales", "second_axis"], "scales_of_ranks"),
        node("Mul", ["adapter_weights", "scales_of_ranks"], "of_ranks"),
        node("ReduceMean", ["of_ranks"], "mean_of_ranks", axes=[1, 2], keepdims=0),
        node("Mul", ["mean_of_ranks", "ten"], "of_adapters"),
        node("ReduceMean", ["image_prompt_tokens"], "mean_of_tokens", axes=[1, 2], keepdims=0),
        node("Mul", ["mean_of_tokens", "image_prompt_scale"], "of_image_prompt"),
        *(one for place in range(len(CONTROLS)) for one in _control(place)),
        node(
            "Sum",
            ["of_halved", "of_prompt", "of_adapters", "of_image_prompt", *(f"of_{name}" for name in CONTROLS)],
            "of_conditions",
        ),
        node("Unsqueeze", ["of_conditions", "last_axes"], "added"),
        node("Add", ["of_latent", "added"], "prediction"),
    ]
    axes = {"first_axis": [0], "second_axis": [2], "after_rows": [1], "last_axes": [1, 2, 3]}
    constants = {name: np.array(value, np.int64) for name, value in axes.items()}
    constants |= {f"place_{place}": np.array(place, np.int64) for place in range(len(CONTROLS))}
    constants |= {"doubling": np.ones((CHANNELS, 1, 2, 2), np.float32)}
    constants |= {"zero": np.array(0, np.float32), "ten": np.array(10, np.float32), "nothing": np.zeros(1, np.float32)}
    constants |= {f"factor_{place}": np.array(1 - 1.5 * place, np.float32) for place in range(len(CONTROLS))}
    return add_network(
        models,
        f"{NAME}_denoiser",
        {
            "sample": latent,
            "timestep": (),
            "encoder_hidden_states": CONTEXT,
            "adapter_weights": (rank, WIDTH),
            "adapter_scales": (rank,),
            "control_images": (len(CONTROLS), *picture),
            "control_scales": (len(CONTROLS),),
            "image_prompt_tokens": shape,
            "image_prompt_scale": (),
        },
        {"prediction": latent},
        nodes,
        constants,
        max_rows=8,
    )


def _control(place: int) -> list[bytes]:
    """The nodes of a control network: the brightness of its picture, for the rows whose scale is not 0."""
    at, name = f"control_{place}/", CONTROLS[place]
    acting = [
        node("NonZero", [f"{at}uses"], f"{at}found"),
        node("Squeeze", [f"{at}found", "first_axis"], f"{at}rows"),
        node("Gather", ["control_images", f"{at}rows"], f"{at}pictures", axis=0),
        node("Gather", [f"{at}pictures", f"place_{place}"], f"{at}picture", axis=1),
        node("ReduceMean", [f"{at}picture"], f"{at}brightness", axes=[1, 2, 3], keepdims=0),
        node("Gather", [f"{at}scale", f"{at}rows"], f"{at}scale_of_rows", axis=0),
        node("Mul", [f"{at}brightness", f"{at}scale_of_rows"], f"{at}weighted"),
        node("Mul", [f"{at}weighted", f"factor_{place}"], f"{at}of_rows"),
        node("Mul", [f"{at}scale", "zero"], f"{at}zeros"),
        node("Unsqueeze", [f"{at}rows", "after_rows"], f"{at}indices"),
        node("ScatterND", [f"{at}zeros", f"{at}indices", f"{at}of_rows"], f"{at}then"),
    ]
    resting = [node("Identity", ["nothing"], f"{at}else")]
    return [
        node("Gather", ["control_scales", f"place_{place}"], f"{at}scale", axis=1),
        node("Equal", [f"{at}scale", "zero"], f"{at}rests"),
        node("Not", [f"{at}rests"], f"{at}uses"),
        node("Cast", [f"{at}uses"], f"{at}numbers", to=6),  # int32
        node("ReduceMax", [f"{at}numbers"], f"{at}most", keepdims=0),
        node("Cast", [f"{at}most"], f"{at}any", to=9),  # bool
        node(
            "If",
            [f"{at}any"],
            f"of_{name}",
            then_branch=graph(acting, {f"{at}then": ("rows",)}),
            else_branch=graph(resting, {f"{at}else": (1,)}),
        ),
    ]


def _decoder(models: Path, latent: Shape, picture: Shape) -> dict[str, object]:
    """Three channels of the latent become the colours of blocks."""
    weights = np.zeros((CHANNELS, 3, FACTOR, FACTOR), np.float32)
    weights[range(3), range(3)] = 1.0
    enlarge = node("ConvTranspose", ["latent", "weights"], "image", strides=[FACTOR, FACTOR])
    return add_network(
        models, f"{NAME}_decoder", {"latent": latent}, {"image": picture}, [enlarge], {"weights": weights}
    )


def _image_encoder(models: Path) -> dict[str, object]:
    edge, tokens = image_prompts.ROOM["edge_px"], (image_prompts.ROOM["num_tokens"], image_prompts.ROOM["width"])
    return add_network(
        models,
        f"{NAME}_image_encoder",
        {"image": (3, edge, edge)},
        {"tokens": tokens, "negative_tokens": tokens},
        [
            node("ReduceMean", ["image"], "colour", axes=[2, 3], keepdims=0),
            node("Unsqueeze", ["colour", "axis"], "token"),
            node("Concat", ["token", "token"], "tokens", axis=1),
            node("Mul", ["tokens", "half"], "negative_tokens"),
        ],
        {"axis": np.array([1], np.int64), "half": np.array([0.5], np.float32)},
    )
