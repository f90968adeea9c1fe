"""What `safelight models` says of a model."""

from __future__ import annotations

from safelight import Model, Task
from safelight.v1 import models_pb2
from safelight_server.cli.described import described


def model(**changes: object) -> Model:
    parts: dict[str, object] = {
        "name": "models/x",
        "revision": "1",
        "description": "things",
        "license": "MIT",
        "runtime": "onnx",
        "sizes": [models_pb2.Size(width_px=64, height_px=32)],
        "samplers": [models_pb2.SamplerOffer(name="euler"), models_pb2.SamplerOffer(name="ddim")],
        "defaults": models_pb2.ModelDefaults(num_inference_steps=20, guidance_scale=7.5),
        "limits": models_pb2.ModelLimits(max_num_inference_steps=1000, max_guidance_scale=20),
        "tasks": [Task.TASK_TEXT_TO_IMAGE],
    }
    return models_pb2.Model(**(parts | changes))


def test_a_plain_model() -> None:
    assert list(described(model())) == [
        "models/x  1  on onnx",
        "    things; licence MIT",
        "    draws from text",
        "    sizes 64x32",
        "    20 steps with guidance 7.5 if a request does not say; at most 1000 steps, guidance 20",
        "    samplers euler, ddim",
    ]


def test_a_model_of_which_everything_can_be_asked() -> None:
    limits = models_pb2.ModelLimits(max_adapter_rank=16)
    tasks = [Task.TASK_TEXT_TO_IMAGE, Task.TASK_IMAGE_TO_IMAGE, Task.TASK_INPAINTING, 99]
    adapters = [
        models_pb2.AdapterInfo(name="ink", rank=4, components=["denoiser"]),
        models_pb2.AdapterInfo(name="pixel", rank=8, components=["denoiser", "text_encoder"]),
    ]
    said = list(
        described(
            model(
                is_default=True,
                limits=limits,
                tasks=tasks,
                adapters=adapters,
                controls=[models_pb2.ControlInfo(name="canny")],
                image_prompt=True,
                notes=["a note"],
            )
        )
    )
    assert said[0] == "models/x  1  on onnx  (default)"
    assert "    draws from text, from a picture (--init), in a part of a picture (--init, --mask)" in said
    assert said[-4:] == [
        "    adapters ink (rank 4), pixel (rank 8, text too); ranks of 16 together in a request (--adapter)",
        "    controls canny (--control)",
        "    takes a picture as a prompt (--image-prompt)",
        "    note: a note",
    ]


def test_a_model_that_only_inpaints_and_one_with_room_but_no_adapter() -> None:
    assert "    draws only in a part of a picture (--init, --mask)" in described(model(tasks=[Task.TASK_INPAINTING]))
    [line] = [
        line
        for line in described(model(limits=models_pb2.ModelLimits(max_adapter_rank=8)))
        if line.startswith("    adapters ")
    ]
    assert line.endswith("none is there that fits; there is room for ranks of 8 together in a request")
