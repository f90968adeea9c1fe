"""Checks what to generate: prompts, size, steps, guidance, sampler and seeds, against what the model offers."""

from __future__ import annotations

import re
import secrets
import unicodedata

import numpy as np
from safelight.v1 import generation_pb2 as pb

from safelight_server.catalog.adapters import AdapterLibrary
from safelight_server.catalog.pipeline import Pipeline
from safelight_server.domain.request import EVERY_STEP, AdapterUse, ControlUse, Notice, Spec
from safelight_server.domain.roles import Role
from safelight_server.sampler import SamplerSpec, guided_steps, refusal, steps_left_out
from safelight_server.validation.images import source_image
from safelight_server.validation.violations import Violations, listed, shown
from safelight_server.wire.enums import ROLES, SIGMA_SCHEDULES, SPACINGS, from_number

MAX_PROMPTS = 4
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters and surrogates (Cc and Cs of Unicode), without tabs and line breaks."""
MAX_ADAPTERS = 4
"""Adapters of one request."""
MAX_ADAPTER_SCALE = 10.0
MAX_CONTROL_SCALE = 10.0
SHARE_OF_STEPS = "a share of the steps"
MAX_IMAGE_PROMPT_SCALE = 2.0
DEFAULT_STRENGTH = 0.8
INPAINTING_STRENGTH = 1.0
"""Of a model that only inpaints: the part is drawn from noise, as its training had it and diffusers does."""
WITHOUT_GUIDANCE = "goes with guidance; leave it out, or ask for a guidance_scale above 1"
DISTILLED = "the model has its guidance from training and draws one row a step; leave it out"


def check_spec(
    message: pb.GenerationSpec,
    pipeline: Pipeline,
    max_prompt_chars: int,
    max_request_rows: int,
    faults: Violations,
    notices: list[Notice],
    library: AdapterLibrary,
    tenant: str,
) -> Spec | None:
    """Checks a GenerationSpec message of a tenant. None if there are faults."""
    manifest = pipeline.manifest
    prompt, negative = _prompts(message, max_prompt_chars, faults)
    steps, most = manifest.defaults.num_inference_steps, manifest.limits.max_num_inference_steps
    if message.HasField("num_inference_steps"):
        steps = message.num_inference_steps
    steps_good = faults.check(1 <= steps <= most, "spec.num_inference_steps", f"must be from 1 to {most}")
    guidance = _guidance_scale(message, pipeline, faults)
    is_guided = guidance != 1.0 and not manifest.is_guidance_distilled
    why = DISTILLED if manifest.is_guidance_distilled else WITHOUT_GUIDANCE
    rescale = _guidance_rescale(message, is_guided, why, faults)
    interval = _guidance_interval(message.guidance_interval, is_guided, why, faults)
    width, height = _size(message, pipeline, faults)
    sampler = _sampler(message.sampler, pipeline, steps if steps_good else None, faults)
    seeds = _seeds(message, manifest.limits.max_outputs, faults)
    init_image, strength, mask = _init_image(message, pipeline, steps if steps_good else None, faults)
    adapters = _adapters(message, pipeline, library, tenant, faults)
    image_prompt, image_prompt_scale = _image_prompt(message, pipeline, faults)
    made = None if faults else range(steps_left_out(steps, strength), steps)
    controls = _controls(message, pipeline, made, faults)
    if faults or made is None:
        return None
    num_guided = sum(step in guided_steps(steps, *interval) for step in made) if is_guided else 0
    what = f"leaves none of {len(made)} steps with guidance; widen it, or set guidance_scale to 1 and leave it out"
    fits = faults.check(num_guided > 0 or not is_guided, "spec.guidance_interval", what)
    rows = len(seeds) * (len(made) + num_guided)
    if not fits or not faults.check(
        rows <= max_request_rows,
        "spec.num_inference_steps",
        f"with {len(seeds)} outputs costs {rows} denoiser rows{' with guidance' if is_guided else ''}; "
        f"at most {max_request_rows} are taken: ask for fewer steps or outputs",
    ):
        return None
    if negative and not is_guided:
        what = "with this model" if manifest.is_guidance_distilled else "at guidance_scale 1"
        notices.append(Notice("NEGATIVE_PROMPT_UNUSED", f"a negative prompt has no effect {what}"))
    negative = negative if is_guided else ""
    return Spec(
        model=pipeline.name,
        revision=manifest.revision,
        prompt=prompt,
        negative_prompt=negative,
        token_ids=_token_ids(pipeline, prompt, "prompt", notices),
        negative_token_ids=_token_ids(pipeline, negative, "negative prompt", notices) if is_guided else None,
        width_px=width,
        height_px=height,
        num_inference_steps=steps,
        guidance_scale=guidance,
        sampler=sampler,
        seeds=seeds,
        init_image=init_image,
        strength=strength,
        mask=mask,
        guidance_rescale=rescale,
        guidance_interval=interval,
        adapters=adapters,
        controls=controls,
        image_prompt=image_prompt,
        image_prompt_scale=image_prompt_scale,
    )


def _prompts(message: pb.GenerationSpec, max_chars: int, faults: Violations) -> tuple[str, str]:
    """The prompt and the negative prompt; "" for a blank negative prompt."""
    texts: dict[Role, str] = {}
    if len(message.prompts) > MAX_PROMPTS:
        faults.add("spec.prompts", f"has more than {MAX_PROMPTS} entries; at most one of each role is taken")
    for index, entry in enumerate(message.prompts[:MAX_PROMPTS]):
        _add_prompt(texts, entry, f"spec.prompts[{index}]", max_chars, faults)
    if message.prompt and Role.POSITIVE in texts:
        faults.add("spec.prompt", "there is a ROLE_POSITIVE entry in spec.prompts as well; keep one of them")
    if message.prompt:
        _check_text(message.prompt, "spec.prompt", max_chars, faults)
    elif Role.POSITIVE not in texts:
        faults.add("spec.prompt", "must say what the picture shows")
    negative = texts.get(Role.NEGATIVE, "")
    return message.prompt or texts.get(Role.POSITIVE, ""), "" if _is_blank(negative) else negative


def _add_prompt(texts: dict[Role, str], entry: pb.Prompt, field: str, max_chars: int, faults: Violations) -> None:
    role = from_number(ROLES, entry.role, default=None)
    if role is None:
        faults.add(f"{field}.role", "must be ROLE_POSITIVE or ROLE_NEGATIVE")
    elif role in texts:
        faults.add(f"{field}.role", f"there is a ROLE_{role.name} entry before it; keep one of them")
    else:
        texts[role] = entry.text
        _check_text(entry.text, f"{field}.text", max_chars, faults, blank=role is Role.NEGATIVE)


def _check_text(text: str, field: str, max_chars: int, faults: Violations, *, blank: bool = False) -> None:
    if not faults.check(len(text) <= max_chars, field, f"has {len(text)} characters; at most {max_chars} are taken"):
        return
    if (odd := CONTROL.search(text)) is not None:
        faults.add(field, f"has the control character U+{ord(odd[0]):04X}; take it out")
    elif not blank:
        faults.check(not _is_blank(text), field, "must not be blank")


def _is_blank(text: str) -> bool:
    """Whether a text has only white space and invisible format characters."""
    return all(c.isspace() or unicodedata.category(c) == "Cf" for c in text)


def _guidance_scale(message: pb.GenerationSpec, pipeline: Pipeline, faults: Violations) -> float:
    if not message.HasField("guidance_scale"):
        return pipeline.manifest.defaults.guidance_scale
    scale, most = message.guidance_scale, pipeline.manifest.limits.max_guidance_scale
    least = "1" if pipeline.manifest.is_guidance_distilled else "1 (without guidance)"
    faults.check(1 <= scale <= most, "spec.guidance_scale", f"must be a number from {least} to {most:g}")
    return scale


def _guidance_rescale(message: pb.GenerationSpec, is_guided: bool, why: str, faults: Violations) -> float:
    share = _shortest(message.guidance_rescale)
    if faults.check(0 <= share <= 1, "spec.guidance_rescale", "must be from 0 (none) to 1"):
        faults.check(not share or is_guided, "spec.guidance_rescale", why)
    return share


def _guidance_interval(
    message: pb.GuidanceInterval, is_guided: bool, why: str, faults: Violations
) -> tuple[float, float]:
    """Start and end of guidance as shares of the steps."""
    field = "spec.guidance_interval"
    start, end, good = _interval(message, field, faults)
    if good:
        faults.check((start, end) == EVERY_STEP or is_guided, field, why)
    return start, end


def _interval(message: pb.GuidanceInterval | pb.Control, field: str, faults: Violations) -> tuple[float, float, bool]:
    """The `start` and `end` of a message, and whether they are good."""
    start = _shortest(message.start) if message.HasField("start") else EVERY_STEP[0]
    end = _shortest(message.end) if message.HasField("end") else EVERY_STEP[1]
    good = faults.check(0 <= start < 1, f"{field}.start", f"must be from 0 to below 1, {SHARE_OF_STEPS}")
    good = faults.check(0 < end <= 1, f"{field}.end", f"must be above 0 and at most 1, {SHARE_OF_STEPS}") and good
    good = good and faults.check(start < end, field, f"must end after it starts; {start:g} to {end:g} is empty")
    return start, end, good


def _shortest(value: float) -> float:
    """The shortest decimal of a float32: 0.7 instead of 0.699999988, which would be 6 of 10 steps."""
    return float(str(np.float32(value))) if value else value


def _size(message: pb.GenerationSpec, pipeline: Pipeline, faults: Violations) -> tuple[int, int]:
    """Width and height: the first size of the model that agrees with the fields that are set."""
    sizes = [(size.width_px, size.height_px) for size in pipeline.manifest.sizes]
    width = message.width_px if message.HasField("width_px") else None
    height = message.height_px if message.HasField("height_px") else None
    for offered in sizes:
        if width in (None, offered[0]) and height in (None, offered[1]):
            return offered
    width_known = width is None or any(width == offered[0] for offered in sizes)
    field = "spec.height_px" if width_known else "spec.width_px"
    faults.add(field, f"models/{pipeline.name} makes {listed(f'{w}x{h}' for w, h in sizes)}")
    return sizes[0]


def _sampler(message: pb.SamplerSpec, pipeline: Pipeline, steps: int | None, faults: Violations) -> SamplerSpec:
    """Checks a SamplerSpec message; also that the sampler works with that many steps, unless `steps` is None."""
    manifest, default = pipeline.manifest, pipeline.manifest.defaults.sampler
    name = message.name or default.name
    cells = next((cells for cells in manifest.samplers if cells.name == name), None)
    if cells is None:
        offered = listed(cells.name for cells in manifest.samplers)
        faults.add("spec.sampler.name", f"models/{pipeline.name} has no {shown(name)}; it has {offered}")
        return SamplerSpec(default.name, default.spacing, default.sigma_schedule, default.eta)
    is_default = name == default.name
    default_spacing = default.spacing if is_default else cells.spacings[0]
    default_sigmas = default.sigma_schedule if is_default else cells.sigma_schedules[0]
    spacing = from_number(SPACINGS, message.spacing, default_spacing)
    if message.spacing and spacing not in cells.spacings:
        spacing = None
        faults.add("spec.sampler.spacing", f"{name} is offered with {listed(cells.spacings)} only")
    sigma_schedule = from_number(SIGMA_SCHEDULES, message.sigma_schedule, default_sigmas)
    if message.sigma_schedule and sigma_schedule not in cells.sigma_schedules:
        sigma_schedule = None
        faults.add("spec.sampler.sigma_schedule", f"{name} is offered with {listed(cells.sigma_schedules)} only")
    eta = _eta(message, name, default.eta if is_default else 0.0, faults)
    if spacing is None or sigma_schedule is None or eta is None:
        return SamplerSpec(name)
    sampler = SamplerSpec(name, spacing, sigma_schedule, eta)
    if steps is not None:
        why = refusal(sampler, pipeline.schedule, manifest.prediction_type, steps)
        faults.check(why is None, "spec.sampler", f"{why}; use another sampler or number of steps")
    return sampler


def _eta(message: pb.SamplerSpec, sampler: str, default: float, faults: Violations) -> float | None:
    if not message.HasField("eta"):
        return default
    good = faults.check(sampler == "ddim", "spec.sampler.eta", f"only ddim has it, {sampler} has not; leave it out")
    good = good and faults.check(0 <= message.eta <= 1, "spec.sampler.eta", "must be from 0 to 1")
    return message.eta if good else None


def default_strength(pipeline: Pipeline) -> float:
    """The strength of requests with a picture that name none."""
    return INPAINTING_STRENGTH if pipeline.manifest.is_inpainting else DEFAULT_STRENGTH


def _init_image(
    message: pb.GenerationSpec, pipeline: Pipeline, steps: int | None, faults: Violations
) -> tuple[str, float, str]:
    """The picture to start from, the strength, and the mask."""
    is_inpainting, model = pipeline.manifest.is_inpainting, f"models/{pipeline.name}"
    if is_inpainting:
        what = f"{model} only develops a part of a picture anew: give the picture, and in mask which part"
        faults.check(bool(message.init_image), "spec.init_image", what)
        # True of both forms: a mask over HTTP has an alpha channel, and over gRPC that channel counts if there is one.
        what = (
            f"{model} only develops a part of a picture anew: say which; a fully transparent PNG stands for all of it"
        )
        faults.check(bool(message.mask), "spec.mask", what)
        if not message.init_image:
            return "", 1.0, ""
    if not message.init_image:
        what = "goes with init_image: give that too, or leave this out"
        faults.check(not message.HasField("strength"), "spec.strength", what)
        faults.check(not message.mask, "spec.mask", what)
        return "", 1.0, ""
    what = f"{model} cannot start from a picture: it has no encoder; ListModels shows which models can"
    faults.check(pipeline.has_encoder, "spec.init_image", what)
    init_image = source_image(message.init_image, "spec.init_image", faults)
    mask = source_image(message.mask, "spec.mask", faults) if message.mask else ""
    strength = default_strength(pipeline)
    if message.HasField("strength"):
        strength = _shortest(message.strength)
    if faults.check(0 < strength <= 1, "spec.strength", "must be above 0 and at most 1") and steps is not None:
        enough = steps_left_out(steps, strength) < steps
        faults.check(enough, "spec.strength", f"leaves none of {steps} steps; must be at least {1 / steps:.2g}")
    return init_image, strength, mask


def _adapters(
    message: pb.GenerationSpec, pipeline: Pipeline, library: AdapterLibrary, tenant: str, faults: Violations
) -> tuple[AdapterUse, ...]:
    """The adapters that have an effect, in the order of their names."""
    if not message.adapters:
        return ()
    room, model, field = pipeline.manifest.adapters, f"models/{pipeline.name}", "spec.adapters"
    if room is None:
        faults.add(field, f"{model} takes no adapters: its denoiser was exported without room for them; leave them out")
        return ()
    if len(message.adapters) > MAX_ADAPTERS:
        faults.add(field, f"has {len(message.adapters)} entries; at most {MAX_ADAPTERS} are taken")
        return ()
    offered, used, rank = library.of(pipeline.name, tenant), dict[str, AdapterUse](), 0
    named = set[str]()
    for index, entry in enumerate(message.adapters):
        at = f"{field}[{index}]"
        scale = _shortest(entry.scale) if entry.HasField("scale") else 1.0
        good = abs(scale) <= MAX_ADAPTER_SCALE
        faults.check(good, f"{at}.scale", f"must be from -{MAX_ADAPTER_SCALE:g} to {MAX_ADAPTER_SCALE:g}")
        faults.check(entry.name not in named, f"{at}.name", f"{shown(entry.name)} is there twice; keep one of them")
        named.add(entry.name)
        if (file := offered.get(entry.name)) is None:
            why = library.misfit(pipeline.name, entry.name, tenant)
            has = f"it has {listed(offered)}" if offered else "it has none"
            missing = f"{model} has no adapter {shown(entry.name)}"
            if why:
                faults.add(f"{at}.name", f"{missing}; the one in the folder {why}")
            else:
                faults.add_missing(f"{at}.name", f"{missing}; {has}", "ADAPTER_NOT_FOUND")
        elif scale:
            used[entry.name] = AdapterUse(entry.name, scale, file.sha256)
            rank += file.rank
    what = f"have ranks of {rank} together; {model} has room for {room.max_rank}: name fewer"
    faults.check(rank <= room.max_rank, field, what)
    return tuple(used[name] for name in sorted(used))


def _controls(
    message: pb.GenerationSpec, pipeline: Pipeline, made: range | None, faults: Violations
) -> tuple[ControlUse, ...]:
    """The controls that have an effect, in the order of their names.

    Args:
        made: the steps that will be made, the last of all; None: unknown, as something else is at fault.
    """
    offered, model, field = pipeline.manifest.controls, f"models/{pipeline.name}", "spec.controls"
    if not message.controls:
        return ()
    if not offered:
        faults.add(field, f"{model} takes no controls: it was exported without control networks; leave them out")
        return ()
    if len(message.controls) > len(offered):
        what = f"has {len(message.controls)} entries; at most one of each is taken, of {listed(offered)}"
        faults.add(field, what)
        return ()
    used, named = dict[str, ControlUse](), set[str]()
    for index, entry in enumerate(message.controls):
        at, name = f"{field}[{index}]", entry.name
        scale = _shortest(entry.scale) if entry.HasField("scale") else 1.0
        faults.check(0 <= scale <= MAX_CONTROL_SCALE, f"{at}.scale", f"must be from 0 to {MAX_CONTROL_SCALE:g}")
        what = f"{model} has no control {shown(name)}; it has {listed(offered)}"
        faults.check(name in offered, f"{at}.name", what)
        faults.check(name not in named, f"{at}.name", f"{shown(name)} is there twice; keep one of them")
        named.add(name)
        image = source_image(entry.image, f"{at}.image", faults)
        start, end, good = _interval(entry, at, faults)
        control = ControlUse(name, image, scale, start, end)
        if good and made is not None:
            acts = any(step in made for step in control.steps(made.stop))
            faults.check(acts, at, f"from {start:g} to {end:g} it acts in none of {len(made)} steps; widen it")
        if scale:
            used[name] = control
    return tuple(used[name] for name in sorted(used))


def _image_prompt(message: pb.GenerationSpec, pipeline: Pipeline, faults: Violations) -> tuple[str, float]:
    """The picture that says what to draw, and how much it counts; "" and 0 where it has no effect."""
    if not message.HasField("image_prompt"):
        return "", 0.0
    given, field = message.image_prompt, "spec.image_prompt"
    if pipeline.manifest.image_prompt is None:
        what = f"models/{pipeline.name} takes no image prompt: it was exported without an IP-Adapter; leave it out"
        faults.add(field, f"{what}, or ask ListModels for a model with image_prompt")
        return "", 0.0
    image = source_image(given.image, f"{field}.image", faults)
    scale = _shortest(given.scale) if given.HasField("scale") else 1.0
    good = 0 <= scale <= MAX_IMAGE_PROMPT_SCALE
    faults.check(good, f"{field}.scale", f"must be from 0 (no effect) to {MAX_IMAGE_PROMPT_SCALE:g}")
    return (image, scale) if scale else ("", 0.0)


def _seeds(message: pb.GenerationSpec, max_outputs: int, faults: Violations) -> tuple[int, ...]:
    """The seed of each output, random if none is given. A request without outputs gets one."""
    outputs = message.outputs
    if not faults.check(len(outputs) <= max_outputs, "spec.outputs", f"must have at most {max_outputs} entries"):
        return ()
    return tuple(
        output.seed if output.HasField("seed") else secrets.randbits(64) for output in outputs or [pb.OutputSpec()]
    )


def _token_ids(pipeline: Pipeline, text: str, what: str, notices: list[Notice]) -> tuple[int, ...]:
    """The token ids of `text`. Adds a notice if the model does not read all of them."""
    if pipeline.tokenizer is None:
        raise ValueError(f"pipeline {pipeline.name} was assembled without its tokenizer")
    tokens = pipeline.tokenizer.encode(text)
    if tokens.truncated:
        most = pipeline.tokenizer.max_tokens
        message = f"the {what} has {tokens.num_tokens} tokens; the model reads {most}, the rest has no effect"
        notices.append(Notice("PROMPT_TRUNCATED", message))
    return tokens.ids
