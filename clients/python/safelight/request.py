"""Converts plain arguments to the request message of the contract."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, Unpack

from safelight.images import ImageFile, ImageSource, image_file, image_name
from safelight.v1 import generation_pb2 as pb

CacheMode = Literal["default", "bypass", "latent", "similar"]
CACHE_MODES: Mapping[CacheMode, pb.CachePolicy.Mode.ValueType] = {
    "default": pb.CachePolicy.MODE_DEFAULT,
    "bypass": pb.CachePolicy.MODE_BYPASS,
    "latent": pb.CachePolicy.MODE_ALLOW_LATENT,
    "similar": pb.CachePolicy.MODE_ALLOW_SIMILAR,
}
"""Which cached results may answer a request; see `CachePolicy` in the proto."""


@dataclass(frozen=True, slots=True)
class Control:
    """A picture for a control network (ControlNet) of the model; None means the server's default.

    Attributes:
        name: of the network, from the model's list.
        image: what it was trained to read, such as edges. A file is uploaded if the server does not have it.
        scale: factor of what the network adds, from 0 to 10.
        start, end: where it acts, as shares of the steps.
    """

    name: str
    image: ImageSource
    scale: float | None = None
    start: float | None = None
    end: float | None = None


class PreviewOptions(TypedDict, total=False):
    """Which previews a stream gets. By default JPEG after every step, as fast as they are read.

    Attributes:
        previews: whether there are previews.
        preview_media_type: such as "image/webp" or "application/x-raw-rgba8"; of several the first that the server has.
        preview_every: a preview after the first step and after every so many steps.
        preview_max_edge: longest edge in pixels; larger previews are scaled down.
        preview: the whole policy as a message, instead of the other options.
    """

    previews: bool
    preview_media_type: str | Sequence[str]
    preview_every: int
    preview_max_edge: int
    preview: pb.PreviewPolicy | None


class GenerateOptions(PreviewOptions, total=False):
    """The options of a request; None and absent mean the server's or the model's default.

    Attributes:
        negative_prompt: what guidance leads away from.
        model: id of the model.
        width, height: size of the pictures in pixels, both or none; one of the model's sizes.
        seed: seed of the only picture. Absent: random.
        seeds: one seed for each picture, instead of `seed`.
        init_image: a picture to start from, such as a file or the picture of another generation; see `ImageSource`. A
            file is uploaded if the server does not have it.
        strength: how much of `init_image` may change, above 0 and at most 1.
        mask: the part of `init_image` that is developed anew: white, or transparent if it has an alpha channel.
        image_prompt: a picture that says what to draw beside the prompt, given as `init_image` is; for models with
            `Model.image_prompt`.
        image_prompt_scale: how much it counts, 0 to 2.
        steps: denoising steps.
        guidance_scale: strength of guidance; 1 means none.
        guidance_rescale: how far the contrast that guidance adds is reduced again, 0 to 1.
        guidance_interval: begin and end of guidance as shares of the steps: (0.2, 0.8). Other steps cost half.
        adapters: the adapters (LoRA) of the model to apply, each with its scale: {"pixel": 0.8}.
        controls: pictures that the composition follows: [Control("canny", Path("edges.png"), scale=0.8)].
        sampler: name of the sampler, such as "ddim" or "euler".
        media_type: media type of the pictures. Absent: "image/png".
        encoding: encoding of the pictures as a message, instead of `media_type`: quality, or alignment and order of raw
            rows.
        priority: how urgent it is.
        labels: the caller's own, returned by `Client.get`.
        cache: which cached results may be used. "default": those of an identical request; "bypass": none; "latent":
            also the latent of a similar prompt, to start from; "similar": also a finished picture for a prompt with
            the same meaning.
        min_similarity: least cosine similarity for "similar", above 0 and at most 1.
        quality_floor: what may be given up under load, such as `QualityFloor(min_num_steps=8)`: steps, decoded
            previews, or the own picture for a similar one. `Finished.degradations` says what was. Not for
            PRIORITY_INTERACTIVE.
        branch: start from this step of an older generation; for one output, with the same model, size, number of steps
            and sampler.
        timeout_s: deadline of the generation, across all connections; the server ends the generation then.
        request_id: a UUID; equal requests with the same id start one generation. Absent: a new id.
    """

    negative_prompt: str
    model: str
    width: int | None
    height: int | None
    seed: int | None
    seeds: Sequence[int] | None
    init_image: ImageSource | None
    strength: float | None
    mask: ImageSource | None
    image_prompt: ImageSource | None
    image_prompt_scale: float | None
    steps: int | None
    guidance_scale: float | None
    guidance_rescale: float | None
    guidance_interval: tuple[float, float] | None
    adapters: Mapping[str, float] | None
    controls: Sequence[Control] | None
    sampler: str
    media_type: str
    encoding: pb.PixelEncoding | None
    priority: pb.Priority.ValueType
    labels: Mapping[str, str] | None
    cache: CacheMode
    min_similarity: float | None
    quality_floor: pb.QualityFloor | None
    branch: pb.Branch | None
    timeout_s: float | None
    request_id: str


def preview_policy(options: PreviewOptions) -> pb.PreviewPolicy | None:
    """The message of the preview options; None if all are absent.

    Raises:
        ValueError: `preview` is combined with other options.
    """
    given = {name for name in PreviewOptions.__annotations__ if options.get(name) is not None} - {"preview"}
    policy = options.get("preview")
    if policy is not None:
        if given:
            raise ValueError(f"preview: already says what {', '.join(sorted(given))} would")
        return policy
    if not given:
        return None
    media_types = options.get("preview_media_type") or ()
    accept = [media_types] if isinstance(media_types, str) else media_types
    policy = pb.PreviewPolicy(
        accept=[pb.PixelEncoding(media_type=media_type) for media_type in accept],
        max_edge_px=options.get("preview_max_edge"),
    )
    if (every := options.get("preview_every")) is not None:
        policy.every_n_steps = every
    if not options.get("previews", True):
        policy.method = pb.PREVIEW_METHOD_NONE
    return policy


def image_files(options: GenerateOptions) -> dict[str, ImageFile]:
    """The files of the options, by their names at the server.

    Raises:
        ValueError: a file cannot be read.
    """
    given = {
        "init_image": options.get("init_image"),
        "mask": options.get("mask"),
        "image_prompt": options.get("image_prompt"),
    }
    given |= {_image_field(number): at.image for number, at in enumerate(options.get("controls") or ())}
    files = [image_file(source, field) for field, source in given.items() if source is not None]
    return {file.name: file for file in files if file is not None}


def _image_field(number: int) -> str:
    return f"controls[{number}].image"


def _image_name(source: ImageSource | None, field: str) -> str:
    return "" if source is None else image_name(source, field)


def generate_request(prompt: str, **options: Unpack[GenerateOptions]) -> pb.GenerateRequest:
    """The message of `Client.generate`'s arguments, all but `timeout_s`.

    Raises:
        TypeError: there is no such argument.
        ValueError: two arguments exclude each other, or a value does not fit its field.
    """
    if unknown := sorted(options.keys() - GenerateOptions.__annotations__.keys()):
        raise TypeError(
            f"there is no argument {', '.join(unknown)}; there are {', '.join(GenerateOptions.__annotations__)}"
        )
    for one, other in (("seed", "seeds"), ("media_type", "encoding")):
        if options.get(one) is not None and options.get(other) is not None:
            raise ValueError(f"{one}: already said by {other}")
    model, seed = options.get("model"), options.get("seed")
    spec = pb.GenerationSpec(
        prompt=prompt,
        model=f"models/{model}" if model else "",
        width_px=options.get("width"),
        height_px=options.get("height"),
        num_inference_steps=options.get("steps"),
        guidance_scale=options.get("guidance_scale"),
        guidance_rescale=options.get("guidance_rescale"),
        init_image=_image_name(options.get("init_image"), "init_image"),
        strength=options.get("strength"),
        mask=_image_name(options.get("mask"), "mask"),
    )
    if (interval := options.get("guidance_interval")) is not None:
        if len(interval) != 2:
            raise ValueError("guidance_interval: must be (start, end), such as (0.2, 0.8)")
        spec.guidance_interval.start, spec.guidance_interval.end = interval
    if (picture := options.get("image_prompt")) is not None:
        spec.image_prompt.image = image_name(picture, "image_prompt")
    if (scale := options.get("image_prompt_scale")) is not None:
        if picture is None:
            raise ValueError("image_prompt_scale: goes with image_prompt")
        spec.image_prompt.scale = scale
    for name, scale in (options.get("adapters") or {}).items():
        spec.adapters.add(name=name, scale=scale)
    for number, at in enumerate(options.get("controls") or ()):
        image = image_name(at.image, _image_field(number))
        spec.controls.add(name=at.name, image=image, scale=at.scale, start=at.start, end=at.end)
    if negative_prompt := options.get("negative_prompt"):
        spec.prompts.add(role=pb.Prompt.ROLE_NEGATIVE, text=negative_prompt)
    if sampler := options.get("sampler"):
        spec.sampler.name = sampler
    for value in options.get("seeds") or ([] if seed is None else [seed]):
        spec.outputs.add(seed=value)
    return pb.GenerateRequest(
        request_id=options.get("request_id") or str(uuid.uuid4()),
        spec=spec,
        preview=preview_policy(options),
        encoding=options.get("encoding") or pb.PixelEncoding(media_type=options.get("media_type") or "image/png"),
        scheduling=pb.Scheduling(priority=options.get("priority", pb.PRIORITY_UNSPECIFIED)),
        labels=options.get("labels") or {},
        cache=pb.CachePolicy(
            mode=CACHE_MODES[options.get("cache", "default")], min_similarity=options.get("min_similarity")
        ),
        quality_floor=options.get("quality_floor"),
        branch=options.get("branch"),
    )
