"""Judges a pipeline before any network is loaded: reads its configurations, and reports all faults at once.

This module does not import torch, so a dry run takes only as long as it takes to read a
few JSON files and the headers of the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from safelight_server.catalog.checks import check
from safelight_server.catalog.manifest import (
    ADAPTER_INPUTS,
    CONTROL_INPUTS,
    GUIDANCE_SOURCE,
    IMAGE_PROMPT_INPUTS,
    INPAINTING_INPUTS,
    STABLE_DIFFUSION_INPUTS,
    Manifest,
)
from safelight_server.catalog.pipeline import ONLY_FLOW
from safelight_server.export import defaults, image_prompts, networks, schedulers, weights
from safelight_server.export.image_prompts import IMAGE_ENCODER, ImagePromptSource
from safelight_server.export.options import ExportFormat, ExportOptions
from safelight_server.export.schedulers import SamplerOffer
from safelight_server.export.source import (
    CHECKPOINTS,
    ExportError,
    Findings,
    Source,
    read,
    read_json,
    scheduler_class,
    type_faults,
)
from safelight_server.sampler import NoiseSchedule

ROLES = ("text_encoder", "denoiser", "decoder", "encoder", "preview_decoder", IMAGE_ENCODER)
MAX_ADAPTER_RANK = 256
"""Largest room for adapters: each row of a call brings so many ranks, used or not."""
TEXT_TARGETS = [{"name": "text_encoder", "inputs": 1, "outputs": 1}]
"""A placeholder of what adapters can change in the text encoders."""
MAX_CONTROLS = 8
"""Most control networks of a model: each row of a call brings a picture for each, used or not."""
MAX_GUIDANCE_SCALE = 20.0
MAX_OUTPUTS = 8
LOADED_BYTES = 6
"""Of a weight while the server loads it: what is read, and its float16 as float32."""
OPTION_OF = {
    "name": "--name",
    "revision": "--revision",
    "license": "--licence",
    "description": "--description",
    "defaults.num_inference_steps": "--steps",
    "defaults.guidance_scale": "--guidance-scale",
    "sizes": "--sizes",
    "controls": "--control",
}
"""The option that sets a field of the manifest, for messages."""
FORMS = {
    "--name": "must have lower-case letters, digits and '-', a letter first, at most 63",
    "--revision": "must have lower-case letters, digits, '.' and '-', a letter or a digit first, at most 63",
    "--control": "must have lower-case letters, digits, '.', '_' and '-', a letter or a digit first, at most 63",
}
"""What the value of an option that is a name must be, for messages."""


@dataclass(frozen=True)
class ExportPlan:
    """What will be exported; everything that can be judged without the weights has been.

    Attributes:
        checkpoint: the file, where the weights are in one; else None.
        options: with every choice made.
        factor: pixels of a picture along one edge of a latent's pixel.
        shape: (C, h, w) of the latent at the first size.
        num_values: numbers in the weights of each network; 0 where the headers do not say.
        notes: what will differ from diffusers.
        image_prompt: the IP-Adapter; None: there are no image prompts.
        is_default_assumed: whether the default steps or guidance scale are the family's, since neither the user nor the
            folder says otherwise.
    """

    source: Source
    checkpoint: Path | None
    options: ExportOptions
    factor: int
    shape: tuple[int, int, int]
    offer: SamplerOffer
    num_values: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    image_prompt: ImagePromptSource | None = None
    is_default_assumed: bool = False

    @property
    def latent_sizes(self) -> list[tuple[int, int]]:
        """(h, w) of the latent at each size."""
        return [(height // self.factor, width // self.factor) for width, height in self.options.sizes]

    @property
    def multiple(self) -> int:
        """What the edges of a latent must be multiples of, where there are several sizes."""
        return networks.latent_multiple(self.source)

    @property
    def largest_edge(self) -> int | None:
        """The longest edge of a latent that the denoiser has positions for; None: there is no limit."""
        return networks.largest_edge(self.source)

    @property
    def is_guidance_distilled(self) -> bool:
        """Whether the guidance scale is an input of the denoiser."""
        return networks.is_guidance_distilled(self.source)

    @property
    def is_inpainting(self) -> bool:
        """Whether the denoiser takes a mask and a picture, so that the model only inpaints."""
        return networks.is_inpainting(self.source)

    @property
    def has_text_adapters(self) -> bool:
        """Whether the text encoders get room for adapters: those that are CLIP's."""
        is_wanted = self.options.adapter_rank > 0 and self.options.text_adapters
        return is_wanted and bool(self.source.family.clip_encoders)

    @property
    def peak_bytes(self) -> int:
        """Memory that exporting takes, reckoned; 0 where the headers do not say how many weights there are.

        All networks are in float32; beside them the one that is compared is loaded as the server does it. The text
        encoders come first, and their weights are given up then. Of torch's files nothing is compared.
        """
        family, numbers = self.source.family, self.num_values
        if not numbers or not all(numbers.values()):
            return 0
        total, of_text = sum(numbers.values()), sum(numbers[name] for name in family.text_encoders)
        if self.options.format is ExportFormat.TORCH:
            return 4 * total
        of_denoiser = total - of_text - numbers["vae"]  # with its control networks
        return max(4 * total + LOADED_BYTES * of_text, 4 * (total - of_text) + LOADED_BYTES * of_denoiser)

    def max_rows(self, role: str) -> int:
        """Largest batch of a component."""
        return self.options.max_rows if role == "denoiser" else max(1, self.options.max_rows // 4)

    def roles(self) -> tuple[str, ...]:
        """The components that will be written."""
        absent = set() if (self.source.folder / "preview_decoder").is_dir() else {"preview_decoder"}
        absent |= set() if self.image_prompt is not None else {IMAGE_ENCODER}
        return tuple(role for role in ROLES if role not in absent)


def make(folder: Path, options: ExportOptions) -> ExportPlan:
    """Judges a folder, or a checkpoint in one file, with the options.

    Raises:
        ExportError: it cannot be exported; the message has every fault.
    """
    findings, checkpoint = Findings(), None
    if folder.is_file() and folder.suffix in CHECKPOINTS:
        checkpoint, folder = folder, _configuration_for(folder, options)
    elif options.config is not None:
        raise ExportError(f"--config is for a checkpoint in one file; {folder} has its own configuration")
    source = read(folder, findings)
    configs = source.configs
    networks.judge(source, findings)
    offer = _scheduler(source, options, findings)
    found = _weights(source, checkpoint, options.variant, findings)
    factor = networks.latent_factor(configs["vae"])
    sizes = defaults.sizes_of(source, factor, options.sizes, findings)
    if options.guidance_scale == 0:
        findings.faults.append("--guidance-scale 0: what diffusers calls 0, a model without guidance, is 1 here")
    if options.max_rows < 1:
        findings.faults.append(f"--max-rows {options.max_rows}: must be at least 1")
    if not 0 <= options.adapter_rank <= MAX_ADAPTER_RANK:
        findings.faults.append(
            f"--adapter-rank {options.adapter_rank}: must be from 0 (no adapters) to {MAX_ADAPTER_RANK}"
        )
    if not options.text_adapters and not options.adapter_rank:
        findings.faults.append("--no-text-adapters: goes with --adapter-rank; leave it out")
    if source.family.is_torch_alone and options.format is not ExportFormat.TORCH:
        findings.faults.append(
            f"--format {options.format}: this denoiser computes with complex numbers, which ONNX cannot express; use"
            " --format torch and serve it with --runtime torch"
        )
    found |= _controls(source, factor, options, checkpoint is None, findings)
    image_prompt = None
    if options.image_prompt is not None:
        image_prompt = _image_prompt(options.image_prompt, source, findings)
    if image_prompt is not None:
        found = {**found, IMAGE_ENCODER: image_prompt.num_values} if found else {}
    licence = options.licence or source.licence
    if not licence:
        findings.faults.append(
            "--licence: say what the weights' licence is (SPDX); the folder has no model card that does"
        )
    if offer is None:
        raise ExportError("; ".join(findings.faults))
    if networks.is_inpainting(source):
        findings.notes.append("only inpaints: each request needs a picture and a mask, and strength is 1 by default")
    distilled = defaults.why_distilled(source, checkpoint, options.name, offer)
    is_guided = networks.is_guidance_distilled(source)
    if distilled and offer.default["name"] != "lcm" and None in (options.steps, options.guidance_scale):
        few = f"{source.family.distilled_steps} steps" + ("" if is_guided else " without guidance")
        findings.notes.append(
            f"taken for a distilled model, as {distilled}: {few} are the default"
            " where --steps and --guidance-scale do not say otherwise"
        )
    if is_guided:
        findings.notes.append(
            "guidance is an input of the denoiser: a step has one row, and a negative prompt has no effect"
        )
    if source.family.name == "z-image":
        findings.notes.append(
            "guidance_scale is one more than what ZImagePipeline is given: its 0, no guidance, is 1 here"
        )
    made = ExportPlan(
        source=source,
        checkpoint=checkpoint,
        options=defaults.completed(source, checkpoint, replace(options, licence=licence), sizes, bool(distilled)),
        factor=factor,
        shape=(networks.latent_channels(source), sizes[0][1] // factor, sizes[0][0] // factor),
        offer=offer,
        num_values=found,
        notes=tuple(findings.notes),
        image_prompt=image_prompt,
        is_default_assumed=not distilled and None in (options.steps, options.guidance_scale),
    )
    findings.faults += faults_of(draft(made))
    findings.require()
    return made


def draft(plan: ExportPlan) -> dict[str, Any]:
    """The manifest as far as it is known before the export.

    Digests, the tokenizer's ids and the targets of adapters are placeholders.
    """
    options, offer, (channels, height, width) = plan.options, plan.offer, plan.shape
    schedule, vae = offer.schedule, plan.source.configs["vae"]
    tiny = plan.source.index["vae"][1] == "AutoencoderTiny"
    family, nothing = plan.source.family, {"sha256": "0" * 64}
    is_transformer = family.denoiser == "transformer"
    inputs = {**family.inputs, **(ADAPTER_INPUTS if options.adapter_rank else {})}
    inputs |= CONTROL_INPUTS if options.controls else {}
    if plan.image_prompt is not None:
        inputs |= IMAGE_PROMPT_INPUTS
    if networks.is_guidance_distilled(plan.source):
        inputs["guidance"] = GUIDANCE_SOURCE
    if plan.is_inpainting:
        inputs |= INPAINTING_INPUTS
    tokenizer = {"file": "tokenizer.json", **nothing, "max_tokens": 77, "pad_id": 0, "bos_id": 0, "eos_id": 0}
    room = {"max_rank": options.adapter_rank, "targets": [{"name": "attention", "inputs": 1, "outputs": 1}]}
    return {
        "format": 1,
        "name": options.name,
        "revision": options.revision,
        "description": options.description,
        "license": options.licence,
        "family": family.name,
        "components": {
            role: {"model": f"{options.name}_{role}", "version": options.version, **nothing} for role in plan.roles()
        },
        **({} if inputs == STABLE_DIFFUSION_INPUTS else {"inputs": inputs}),
        "tokenizer": tokenizer,
        **({"second_tokenizer": tokenizer} if len(family.tokenizers) > 1 else {}),
        **({"third_tokenizer": tokenizer} if len(family.tokenizers) > 2 else {}),
        "latent": {
            "channels": channels,
            "height": height,
            "width": width,
            "scaling_factor": vae.get("scaling_factor", 1.0 if tiny else 0.18215),
            "shift_factor": (vae.get("shift_factor") or 0.0) if is_transformer else 0.0,
        },
        "sizes": [{"width_px": width, "height_px": height} for width, height in options.sizes],
        "prediction_type": offer.prediction_type,
        "noise_schedule": _noise_schedule(schedule, offer.prediction_type),
        "samplers": offer.cells,
        "defaults": {
            "num_inference_steps": options.steps,
            "guidance_scale": options.guidance_scale,
            "sampler": offer.default,
        },
        "limits": {
            "max_num_inference_steps": offer.max_steps,
            "max_guidance_scale": MAX_GUIDANCE_SCALE,
            "max_outputs": MAX_OUTPUTS,
        },
        **({"adapters": room} if options.adapter_rank else {}),
        **({"text_adapters": {**room, "targets": TEXT_TARGETS}} if plan.has_text_adapters else {}),
        **({"controls": [name for name, _ in options.controls]} if options.controls else {}),
        **({} if plan.image_prompt is None else {"image_prompt": plan.image_prompt.room}),
        "linear_preview": {"block": 1, "weights": [[0.0] * 3] * channels, "bias": [0.0] * 3},
        **({"notes": list(plan.notes)} if plan.notes else {}),
    }


def _noise_schedule(schedule: NoiseSchedule, prediction_type: str) -> dict[str, Any]:
    """What the manifest says of it: the numbers of flow matching, or those of betas."""
    values = dataclasses.asdict(schedule)
    if prediction_type != "flow":
        return {key: value for key, value in values.items() if key not in ("shift", *ONLY_FLOW)}
    dynamic = ONLY_FLOW if schedule.use_dynamic_shifting else ()
    return {key: values[key] for key in ("num_train_timesteps", "shift", *dynamic)}


def faults_of(manifest: Mapping[str, Any]) -> list[str]:
    """The faults that the server's catalog will find in a manifest, named by the options that set the fields."""
    try:
        made = Manifest.model_validate(manifest)
    except ValidationError as error:
        return list(map(_fault_of, error.errors()))
    return [f"{_option(place)}: {what}" for place, _, what in (fault.partition(": ") for fault in check(made))]


def _fault_of(error: ErrorDetails) -> str:
    option = _option(".".join(str(part) for part in error["loc"]))
    if error["type"] == "string_pattern_mismatch" and option in FORMS:
        return f"{option} {error['input']!r}: {FORMS[option]}"
    return f"{option}: {error['msg']}"


def _option(place: str) -> str:
    return OPTION_OF.get(place, OPTION_OF.get(place.partition(".")[0], place))


def _image_prompt(given: Path, source: Source, findings: Findings) -> ImagePromptSource | None:
    if source.family.denoiser == "transformer":
        findings.faults.append(f"{image_prompts.OPTION}: only UNets take image prompts; leave it out")
        return None
    return image_prompts.judge(given, source, findings)


def _configuration_for(checkpoint: Path, options: ExportOptions) -> Path:
    if options.config is None:
        raise ExportError(
            f"{checkpoint} is a checkpoint in one file, which has no configuration: say --config FOLDER, a diffusers"
            " folder of the same architecture (its weights are not needed)"
        )
    return options.config


def _scheduler(source: Source, options: ExportOptions, findings: Findings) -> SamplerOffer | None:
    kind, config, family = scheduler_class(source), source.configs["scheduler"], source.family
    if family.denoiser == "transformer":
        patch = networks.latent_multiple(source)
        return schedulers.judge_flow(kind, config, family.spacing, patch, options.sampler, options.steps, findings)
    mends = family.mends_scheduler, source.mends_clip_sample
    return schedulers.judge(kind, config, options.sampler, options.steps, *mends, findings)


def _weights(source: Source, checkpoint: Path | None, variant: str, findings: Findings) -> dict[str, int]:
    if checkpoint is not None and source.family.denoiser == "transformer":
        findings.faults.append(f"{checkpoint}: of this class a folder can be exported, no checkpoint in one file")
    if checkpoint is None:
        found = {name: weights.find(source.folder / name, variant, findings) for name in source.family.networks}
        return {name: files.num_values for name, files in found.items()}
    fault, _ = weights.check(checkpoint)
    if not fault and weights.is_adapter(checkpoint):
        fault = "is an adapter (LoRA) and no model: put it into MODELS_DIR/adapters (docs/adapters.md)"
    if fault:
        findings.faults.append(f"{checkpoint} {fault}")
    return {}


def _controls(
    source: Source, factor: int, options: ExportOptions, is_counted: bool, findings: Findings
) -> dict[str, int]:
    """Judges the control networks.

    Args:
        is_counted: whether the weights of the other networks are.

    Returns:
        The numbers in the weights of each, by option.
    """
    found = {}
    if len(options.controls) > MAX_CONTROLS:
        findings.faults.append(f"--control: there are {len(options.controls)}; at most {MAX_CONTROLS} are taken")
    for name, folder in options.controls[:MAX_CONTROLS]:
        if not (folder / "config.json").is_file():
            what = "is no folder of diffusers with a ControlNetModel: it has no config.json"
            findings.faults.append(f"--control {name}={folder}: {what}")
            continue
        config = read_json(folder / "config.json")
        if faults := type_faults(f"--control {name}: config.json", config):
            findings.faults += faults
            continue
        networks.judge_control(source, name, config, factor, findings)
        found[f"--control {name}"] = weights.find(folder, options.variant, findings).num_values
    return found if is_counted else {}
