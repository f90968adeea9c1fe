"""The faults of a manifest that its types do not exclude, by itself and beside the config.pbtxt of its components."""

from __future__ import annotations

from collections.abc import Mapping

from safelight_server.catalog import config_pbtxt, revisions
from safelight_server.catalog.adapter_files import is_of_text
from safelight_server.catalog.manifest import (
    ADAPTER_INPUTS,
    ADAPTER_SCALES_SOURCE,
    ADAPTER_WEIGHTS_SOURCE,
    CONTEXT_TOKENIZERS,
    CONTROL_IMAGES_SOURCE,
    CONTROL_INPUTS,
    CONTROL_SCALES_SOURCE,
    ENCODER_SOURCE,
    GUIDANCE_SOURCE,
    IMAGE_PROMPT_INPUTS,
    IMAGE_PROMPT_OUTPUTS,
    IMAGE_PROMPT_SCALE_SOURCE,
    IMAGE_PROMPT_TOKENS_SOURCE,
    INPAINTING_INPUTS,
    LATENT_SOURCE,
    MASK_SOURCE,
    MASKED_IMAGE_SOURCE,
    SIZE_IDS_SOURCE,
    TIMESTEP_SOURCE,
    AdapterRoom,
    Manifest,
)
from safelight_server.catalog.pipeline import Pipeline, assemble
from safelight_server.domain.component import Component
from safelight_server.sampler import SamplerSpec, refusal


def check(manifest: Manifest) -> list[str]:
    """The faults of a manifest by itself. Each fault begins with the name of its field."""
    pipeline = assemble(manifest, {})
    first, latent, preview = manifest.sizes[0], manifest.latent, manifest.linear_preview
    faults = [
        f"sizes: {size.width_px}x{size.height_px} is no multiple of the latent's pixels"
        for size in manifest.sizes
        if size.width_px * latent.width % first.width_px or size.height_px * latent.height % first.height_px
    ]
    columns = 3 * preview.block**2
    if pipeline.linear_weights.shape != (latent.channels, columns) or pipeline.linear_bias.shape != (columns,):
        faults.append(f"linear_preview: weights must be {latent.channels} x {columns} and bias {columns}")
    sources = set(manifest.inputs.values()) & set(ADAPTER_INPUTS.values())
    if len(sources) != (0 if manifest.adapters is None else len(ADAPTER_INPUTS)):
        faults.append("adapters: goes with inputs of both adapter_weights and adapter_scales")
    faults += _check_text_adapters(manifest)
    sources = set(manifest.inputs.values()) & set(CONTROL_INPUTS.values())
    if len(sources) != (len(CONTROL_INPUTS) if manifest.controls else 0):
        faults.append("controls: goes with inputs of both control_images and control_scales")
    if len(set(manifest.controls)) < len(manifest.controls):
        faults.append("controls: has a name twice")
    prompted = (
        manifest.image_prompt is not None,
        Component.IMAGE_ENCODER in manifest.components,
        *(source in manifest.inputs.values() for source in IMAGE_PROMPT_INPUTS.values()),
    )
    if len(set(prompted)) > 1:
        both = " and ".join(IMAGE_PROMPT_INPUTS)
        faults.append(f"image_prompt: goes with a component image_encoder and inputs of {both}")
    inpainting = set(manifest.inputs.values()) & set(INPAINTING_INPUTS.values())
    if inpainting and (len(inpainting) < len(INPAINTING_INPUTS) or Component.ENCODER not in manifest.components):
        faults.append("inputs: mask and masked_image go together, and with a component encoder")
    faults += _check_tokenizers(manifest)
    if manifest.defaults.num_inference_steps > manifest.limits.max_num_inference_steps:
        faults.append("defaults.num_inference_steps: above the limit")
    if manifest.defaults.guidance_scale > manifest.limits.max_guidance_scale:
        faults.append("defaults.guidance_scale: above the limit")
    stated = manifest.quantization.scheme if manifest.quantization is not None else ""
    if revisions.scheme(manifest.revision) != stated:
        faults.append(f"revision: {manifest.revision} is the name of one that is {'not ' if stated else ''}quantized")
    at = manifest.defaults.sampler
    specs = [SamplerSpec(at.name, at.spacing, at.sigma_schedule, at.eta)]
    specs += [
        SamplerSpec(cells.name, spacing, sigmas)
        for cells in manifest.samplers
        for spacing in cells.spacings
        for sigmas in cells.sigma_schedules
    ]
    for spec in specs:
        why = refusal(spec, pipeline.schedule, manifest.prediction_type, manifest.defaults.num_inference_steps)
        if why:
            faults.append(f"samplers: {why}")
    if at.name not in {cells.name for cells in manifest.samplers}:
        faults.append(f"defaults.sampler: {at.name} is not among the samplers")
    return faults


def _check_text_adapters(manifest: Manifest) -> list[str]:
    room, text_room = manifest.adapters, manifest.text_adapters
    if text_room is None:
        return []
    if room is None:
        return ["text_adapters: goes with adapters"]
    if room.max_rank != text_room.max_rank:
        return [f"text_adapters.max_rank: {text_room.max_rank} is not that of adapters, {room.max_rank}"]
    others = [target.name for target in text_room.targets if not is_of_text(target.name)]
    return [f"text_adapters.targets: {name} is no layer of a text encoder" for name in others]


def _check_tokenizers(manifest: Manifest) -> list[str]:
    second, places = manifest.second_tokenizer, CONTEXT_TOKENIZERS.get(manifest.family, (0,))
    needed = ("tokenizer", "second_tokenizer", "third_tokenizer")[: max(places) + 1]
    faults = [f"{name}: {manifest.family} needs one" for name in needed if getattr(manifest, name) is None]
    if manifest.third_tokenizer is not None and second is None:
        faults.append("third_tokenizer: there is no second one")
    if second is not None and manifest.family != "flux" and second.max_tokens != manifest.tokenizer.max_tokens:
        faults.append(f"second_tokenizer.max_tokens: {second.max_tokens} is not the first tokenizer's")
    return faults


def check_configs(pipeline: Pipeline, configs: Mapping[Component, config_pbtxt.ModelConfig]) -> list[str]:
    """Checks batch bounds and shapes of the components against the manifest, at every picture size; returns faults."""
    manifest = pipeline.manifest
    faults = [
        f"components.{role}: max_batch_size must be at least 1" for role, at in configs.items() if at.max_rows < 1
    ]
    num_ids = sum(at.max_tokens for at in manifest.tokenizers)
    context = sum(at.max_tokens for at in manifest.context_tokenizers)
    encoder = configs.get(Component.TEXT_ENCODER)
    made = {} if encoder is None else encoder.outputs
    faults += [
        f"inputs: the text encoder has no output {name}; it has {', '.join(made)}"
        for name in pipeline.embedding_outputs
        if encoder is not None and name not in made
    ]
    of_prompts = {} if manifest.text_adapters is None else _adapter_shapes(manifest.text_adapters)
    extra = set() if encoder is None else (encoder.inputs.keys() & ADAPTER_INPUTS.keys()) - of_prompts.keys()
    faults += [f"text_adapters: {name} of the text encoder is bound to nothing" for name in sorted(extra)]
    for size in manifest.sizes:
        latent = pipeline.latent_shape(size.width_px, size.height_px)
        shapes = {ENCODER_SOURCE + name: shape for name, shape in made.items()}
        shapes |= {LATENT_SOURCE: latent, TIMESTEP_SOURCE: (1,), GUIDANCE_SOURCE: (1,), SIZE_IDS_SOURCE: (6,)}
        shapes |= {MASK_SOURCE: (1, *latent[1:]), MASKED_IMAGE_SOURCE: latent}
        if (room := manifest.adapters) is not None:
            shapes |= _adapter_shapes(room)
        if count := len(manifest.controls):
            pictures = (count, 3, size.height_px, size.width_px)
            shapes |= {CONTROL_IMAGES_SOURCE: pictures, CONTROL_SCALES_SOURCE: (count,)}
        prompt_tokens: tuple[int, ...] = ()
        edge = 0
        if (prompts := manifest.image_prompt) is not None:
            prompt_tokens, edge = (prompts.num_tokens, prompts.width), prompts.edge_px
            shapes |= {IMAGE_PROMPT_TOKENS_SOURCE: prompt_tokens, IMAGE_PROMPT_SCALE_SOURCE: (1,)}
        inputs: dict[Component, dict[str, tuple[int, ...]]] = {
            Component.TEXT_ENCODER: {"input_ids": (num_ids,), **of_prompts},
            Component.DENOISER: {name: shapes.get(at, (context, -1)) for name, at in manifest.inputs.items()},
            Component.DECODER: {"latent": latent},
            Component.PREVIEW_DECODER: {"latent": latent},
            Component.ENCODER: {"image": (3, size.height_px, size.width_px)},
            Component.IMAGE_ENCODER: {"image": (3, edge, edge)},
        }
        outputs: dict[Component, dict[str, tuple[int, ...]]] = {
            Component.TEXT_ENCODER: {"last_hidden_state": (context, -1)},
            Component.DENOISER: {"prediction": latent},
            Component.DECODER: {"image": (3, size.height_px, size.width_px)},
            Component.PREVIEW_DECODER: {"image": (3, -1, -1)},
            Component.ENCODER: {"mean": latent},
            Component.IMAGE_ENCODER: dict.fromkeys(IMAGE_PROMPT_OUTPUTS, prompt_tokens),
        }
        if Component.ENCODER in configs and "std" in configs[Component.ENCODER].outputs:
            outputs[Component.ENCODER]["std"] = latent
        denoiser = configs.get(Component.DENOISER)
        unbound = () if denoiser is None else denoiser.inputs.keys() - manifest.inputs.keys()
        faults += [f"inputs: {name} of the denoiser is bound to nothing" for name in sorted(unbound)]
        for role, at in configs.items():
            wrong = config_pbtxt.mismatches(at.inputs, inputs[role])
            wrong += config_pbtxt.mismatches(at.outputs, outputs[role])
            faults += [f"components.{role}: config.pbtxt: {fault}" for fault in wrong]
    return list(dict.fromkeys(faults))


def _adapter_shapes(room: AdapterRoom) -> dict[str, tuple[int, ...]]:
    return {ADAPTER_WEIGHTS_SOURCE: (room.max_rank, room.width), ADAPTER_SCALES_SOURCE: (room.max_rank,)}
