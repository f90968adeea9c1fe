"""Conversion of the client's arguments to messages, and of messages to pixels."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from safelight import Control, GenerateOptions, Picture, PixelEncoding, Preview, PreviewPolicy
from safelight.received import Received
from safelight.request import generate_request, image_files, preview_policy
from safelight.v1 import generation_pb2 as pb

RAW = "application/x-raw-rgba8"


def test_plain_arguments_fill_the_message():
    request = generate_request(
        "a red potion",
        negative_prompt="blur",
        model="icons",
        width=64,
        height=96,
        seeds=[3, 4],
        steps=5,
        guidance_rescale=0.5,
        adapters={"pixel": 0.8, "glow": -1},
        image_prompt=f"images/{'ef' * 32}",
        image_prompt_scale=0.5,
        guidance_interval=(0.25, 0.75),
        preview_media_type=["image/webp", "image/jpeg"],
        preview_every=2,
        preview_max_edge=32,
        labels={"a": "b"},
    )
    spec = request.spec
    assert (spec.model, spec.width_px, spec.height_px, spec.num_inference_steps) == ("models/icons", 64, 96, 5)
    assert [output.seed for output in spec.outputs] == [3, 4]
    assert list(spec.adapters) == [pb.Adapter(name="pixel", scale=0.8), pb.Adapter(name="glow", scale=-1)]
    assert spec.image_prompt == pb.ImagePrompt(image=f"images/{'ef' * 32}", scale=0.5)
    assert (spec.guidance_rescale, spec.guidance_interval) == (0.5, pb.GuidanceInterval(start=0.25, end=0.75))
    assert [accepted.media_type for accepted in request.preview.accept] == ["image/webp", "image/jpeg"]
    assert (request.preview.every_n_steps, request.preview.max_edge_px) == (2, 32)
    assert (request.encoding.media_type, dict(request.labels)) == ("image/png", {"a": "b"})


def test_controls_are_sent_with_the_names_of_their_pictures(tmp_path):
    file = tmp_path / "edges.png"
    file.write_bytes(b"edges")
    given = [Control("edges", file, scale=0.5), Control("depth", "generations/x", end=0.5)]
    name = f"images/{hashlib.sha256(b'edges').hexdigest()}"
    assert list(generate_request("x", controls=given).spec.controls) == [
        pb.Control(name="edges", image=name, scale=0.5),
        pb.Control(name="depth", image="generations/x/outputs/0", end=0.5),
    ]
    assert list(image_files({"controls": given})) == [name]
    with pytest.raises(ValueError, match=r"controls\[1\].image: .*nothing.png: No such file"):
        image_files({"controls": [*given[:1], Control("depth", tmp_path / "nothing.png")]})


def test_what_is_not_said_is_not_sent():
    request = generate_request("x")
    assert not request.HasField("preview")
    absent = ("width_px", "height_px", "num_inference_steps", "guidance_scale", "sampler", "guidance_rescale")
    assert not any(request.spec.HasField(name) for name in (*absent, "guidance_interval"))
    assert not request.spec.outputs
    assert len(request.request_id) == 36
    assert generate_request("x", seed=0).spec.outputs[0].HasField("seed"), "0 is a seed"


def test_no_previews():
    policy = preview_policy({"previews": False})
    assert policy is not None
    assert policy.method == pb.PREVIEW_METHOD_NONE


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"preview": PreviewPolicy(), "preview_every": 2}, ValueError),
        ({"seed": 1, "seeds": [1]}, ValueError),
        ({"media_type": "image/png", "encoding": PixelEncoding()}, ValueError),
        ({"seed": -1}, ValueError),
        ({"guidance_interval": (0.2, 0.5, 0.8)}, ValueError),
        ({"sed": 1}, TypeError),
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_anything_is_sent(options: GenerateOptions, error):
    with pytest.raises(error):
        generate_request("x", **options)


def received(rows: np.ndarray, order: pb.PixelEncoding.RowOrder.ValueType, width: int) -> tuple[Preview, Picture]:
    """A raw preview and a raw picture as they come from a server."""
    raw = PixelEncoding(media_type=RAW, row_order=order)
    state = Received(0, PreviewPolicy(accept=[PixelEncoding(media_type="image/unheard-of"), raw]))
    sizes = {"media_type": RAW, "width_px": width, "height_px": len(rows), "stride_bytes": rows.shape[1]}
    accepted = pb.Accepted(encoding=raw, spec=pb.GenerationSpec(outputs=[pb.OutputSpec(seed=7)]))
    state.take(pb.GenerationEvent(accepted=accepted))
    preview = state.take(pb.GenerationEvent(preview=pb.Preview(step=1, data=rows.tobytes(), **sizes)))
    data = rows.tobytes()
    last = pb.ArtifactChunk(data=data, total_bytes=len(data), sha256=sha256(data), **sizes)
    picture = state.take(pb.GenerationEvent(artifact_chunk=last))
    assert isinstance(preview, Preview) and isinstance(picture, Picture)
    return preview, picture


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


@pytest.mark.parametrize("order", ["ROW_ORDER_TOP_DOWN", "ROW_ORDER_BOTTOM_UP"])
def test_raw_pixels_are_the_right_way_up_and_without_padding(order):
    pixels = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    padded = np.zeros((2, 16), np.uint8)
    padded[:, :12] = pixels.reshape(2, 12)
    rows = padded[::-1] if order == "ROW_ORDER_BOTTOM_UP" else padded
    for image in received(rows, pb.PixelEncoding.RowOrder.Value(order), 3):
        assert np.array_equal(image.array(), pixels)
        assert np.array_equal(np.asarray(image.image()), pixels)


def test_encoded_pixels_become_rgba():
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "png")
    picture = Picture(0, "image/png", 3, 2, 7, file.getvalue())
    assert np.array_equal(picture.array()[..., :3], pixels)
    assert picture.array().shape == (2, 3, 4)
    assert picture.image().size == (3, 2)


def test_a_damaged_picture_is_not_handed_out():
    damaged = pb.ArtifactChunk(data=b"x", total_bytes=1, sha256=bytes(32))
    with pytest.raises(ValueError, match="arrived damaged"):
        Received(0).take(pb.GenerationEvent(artifact_chunk=damaged))


def test_the_client_needs_neither_numpy_nor_pillow_nor_opentelemetry_before_they_are_asked_for():
    absent = "for name in ('numpy', 'PIL', 'opentelemetry', 'safelight_server'): sys.modules[name] = None"
    asked = "safelight.Picture(0, 'image/png', 1, 1, 7, b'').image()"
    code = f"import sys\n{absent}\nimport safelight\ntry:\n    {asked}\nexcept ModuleNotFoundError as error:\n    print(error)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "./clients/python[images]" in said
