"""Specs, samplers and encodings as protobuf messages."""

from __future__ import annotations

from safelight.v1 import generation_pb2 as pb

from safelight_server.domain.request import EVERY_STEP, MediaType, PixelEncoding, Spec
from safelight_server.wire.enums import BOTTOM_UP, SIGMA_SCHEDULES, SPACINGS, TEXTURE_FORMATS


def spec_message(spec: Spec) -> pb.GenerationSpec:
    """A spec as a message with every default filled in. A client that sends it again gets the same pixels."""
    message = pb.GenerationSpec(
        model=f"models/{spec.model}",
        width_px=spec.width_px,
        height_px=spec.height_px,
        num_inference_steps=spec.num_inference_steps,
        guidance_scale=spec.guidance_scale,
        sampler=sampler_message(spec.sampler.name, spec.sampler.spacing, spec.sampler.sigma_schedule),
        outputs=[pb.OutputSpec(seed=seed) for seed in spec.seeds],
        prompt=spec.prompt,
    )
    if spec.sampler.name == "ddim":
        message.sampler.eta = spec.sampler.eta
    if spec.negative_prompt:
        message.prompts.add(role=pb.Prompt.ROLE_NEGATIVE, text=spec.negative_prompt)
    if spec.guidance_rescale:
        message.guidance_rescale = spec.guidance_rescale
    if spec.guidance_interval != EVERY_STEP:
        message.guidance_interval.start, message.guidance_interval.end = spec.guidance_interval
    for adapter in spec.adapters:
        message.adapters.add(name=adapter.name, scale=adapter.scale)
    for control in spec.controls:
        made = message.controls.add(name=control.name, image=image_name(control.image), scale=control.scale)
        if (control.start, control.end) != EVERY_STEP:
            made.start, made.end = control.start, control.end
    if spec.init_image:
        message.init_image, message.strength = image_name(spec.init_image), spec.strength
    if spec.mask:
        message.mask = image_name(spec.mask)
    if spec.image_prompt:
        message.image_prompt.image = image_name(spec.image_prompt)
        message.image_prompt.scale = spec.image_prompt_scale
    return message


def image_name(digest: str) -> str:
    """The resource name of an uploaded picture."""
    return f"images/{digest}"


def sampler_message(name: str, spacing: str, sigma_schedule: str) -> pb.SamplerSpec:
    """A sampler and how its steps are placed, as a message."""
    return pb.SamplerSpec(name=name, spacing=SPACINGS[spacing], sigma_schedule=SIGMA_SCHEDULES[sigma_schedule])


def encoding_message(encoding: PixelEncoding) -> pb.PixelEncoding:
    """An encoding as a message, with the fields that its media type has."""
    message = pb.PixelEncoding(media_type=encoding.media_type.value)
    if encoding.media_type in (MediaType.JPEG, MediaType.WEBP):
        message.quality = encoding.quality
    elif encoding.media_type is MediaType.RAW_RGBA8:
        message.row_alignment_bytes = encoding.row_alignment_bytes
        message.row_order = BOTTOM_UP[encoding.bottom_up]
    elif encoding.media_type is MediaType.KTX2:
        message.row_order = BOTTOM_UP[encoding.bottom_up]
        message.texture_format = TEXTURE_FORMATS[encoding.texture_format]
    return message
