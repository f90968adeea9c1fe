"""What is developed: prompts, size, steps, guidance, sampler and seeds against what the model offers."""

from __future__ import annotations

import secrets
import unicodedata

from safelight_server.catalog.catalog import Pipeline
from safelight_server.domain.request import Notice, Spec
from safelight_server.domain.roles import Role
from safelight_server.sampler import SamplerSpec, refusal
from safelight_server.validation.draft import PromptDraft, SamplerDraft, SpecDraft, Unknown
from safelight_server.validation.violations import Violations, listed, shown

MAX_SEED = 2**64 - 1
MAX_PROMPTS = 4
LINE_BREAKS = "\t\n\r"


def spec_of(
    draft: SpecDraft, pipeline: Pipeline, max_prompt_chars: int, faults: Violations, notices: list[Notice]
) -> Spec | None:
    """What a draft means; None where a fault leaves nothing to tokenize or to sample."""
    manifest = pipeline.manifest
    prompt, negative = _prompts(draft, max_prompt_chars, faults)
    steps, most = draft.num_inference_steps, manifest.limits.max_num_inference_steps
    steps = manifest.defaults.num_inference_steps if steps is None else steps
    steps_good = faults.check(1 <= steps <= most, "spec.num_inference_steps", f"must be from 1 to {most}")
    guidance = _guidance(draft, pipeline, faults)
    width, height = _size(draft, pipeline, faults)
    sampler = _sampler(draft.sampler, pipeline, steps if steps_good else None, faults)
    seeds = _seeds(draft, manifest.limits.max_outputs, faults)
    if faults:
        return None
    guided = guidance != 1.0
    if negative and not guided:
        notices.append(Notice("NEGATIVE_PROMPT_UNUSED", "a negative prompt has no effect at guidance_scale 1"))
    negative = negative if guided else ""
    return Spec(
        model=pipeline.name,
        revision=manifest.revision,
        prompt=prompt,
        negative_prompt=negative,
        token_ids=_token_ids(pipeline, prompt, "prompt", notices),
        negative_token_ids=_token_ids(pipeline, negative, "negative prompt", notices) if guided else None,
        width_px=width,
        height_px=height,
        num_inference_steps=steps,
        guidance_scale=guidance,
        sampler=sampler,
        seeds=seeds,
    )


def _prompts(draft: SpecDraft, max_chars: int, faults: Violations) -> tuple[str, str]:
    texts: dict[Role, str] = {}
    if len(draft.prompts) > MAX_PROMPTS:
        faults.add("spec.prompts", f"has more than {MAX_PROMPTS} entries; at most one of each role is taken")
    for index, entry in enumerate(draft.prompts[:MAX_PROMPTS]):
        _add_prompt(texts, entry, f"spec.prompts[{index}]", max_chars, faults)
    if draft.prompt and Role.POSITIVE in texts:
        faults.add("spec.prompt", "there is a ROLE_POSITIVE entry in spec.prompts as well; keep one of them")
    if draft.prompt:
        _check_text(draft.prompt, "spec.prompt", max_chars, faults)
    elif Role.POSITIVE not in texts:
        faults.add("spec.prompt", "must say what the picture shows")
    negative = texts.get(Role.NEGATIVE, "")
    return draft.prompt or texts.get(Role.POSITIVE, ""), "" if _is_blank(negative) else negative


def _add_prompt(texts: dict[Role, str], entry: PromptDraft, field: str, max_chars: int, faults: Violations) -> None:
    role = entry.role
    if role is None or isinstance(role, Unknown):
        faults.add(f"{field}.role", "must be ROLE_POSITIVE or ROLE_NEGATIVE")
    elif role in texts:
        faults.add(f"{field}.role", f"there is a ROLE_{role.name} entry before it; keep one of them")
    else:
        texts[role] = entry.text
        _check_text(entry.text, f"{field}.text", max_chars, faults, blank=role is Role.NEGATIVE)


def _check_text(text: str, field: str, max_chars: int, faults: Violations, *, blank: bool = False) -> None:
    if not faults.check(len(text) <= max_chars, field, f"has {len(text)} characters; at most {max_chars} are taken"):
        return
    odd = next((c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c not in LINE_BREAKS), None)
    if odd is not None:
        faults.add(field, f"has the control character U+{ord(odd):04X}; take it out")
    elif not blank:
        faults.check(not _is_blank(text), field, "must not be blank")


def _is_blank(text: str) -> bool:
    """Whether there is nothing to read: white space and invisible format characters."""
    return all(c.isspace() or unicodedata.category(c) == "Cf" for c in text)


def _guidance(draft: SpecDraft, pipeline: Pipeline, faults: Violations) -> float:
    scale, most = draft.guidance_scale, pipeline.manifest.limits.max_guidance_scale
    if scale is None:
        return pipeline.manifest.defaults.guidance_scale
    faults.check(1 <= scale <= most, "spec.guidance_scale", f"must be a number from 1 (without guidance) to {most:g}")
    return scale


def _size(draft: SpecDraft, pipeline: Pipeline, faults: Violations) -> tuple[int, int]:
    sizes = [(size.width_px, size.height_px) for size in pipeline.manifest.sizes]
    width, height = draft.width_px, draft.height_px
    for offered in sizes:
        if width in (None, offered[0]) and height in (None, offered[1]):
            return offered
    width_known = width is None or any(width == offered[0] for offered in sizes)
    field = "spec.height_px" if width_known else "spec.width_px"
    faults.add(field, f"models/{pipeline.name} makes {listed(f'{w}x{h}' for w, h in sizes)}")
    return sizes[0]


def _sampler(draft: SamplerDraft, pipeline: Pipeline, steps: int | None, faults: Violations) -> SamplerSpec:
    """The sampler; `steps` None: not to be checked against them."""
    manifest, default = pipeline.manifest, pipeline.manifest.defaults.sampler
    name = draft.name or default.name
    cells = next((cells for cells in manifest.samplers if cells.name == name), None)
    if cells is None:
        offered = listed(cells.name for cells in manifest.samplers)
        faults.add("spec.sampler.name", f"models/{pipeline.name} has no {shown(name)}; it has {offered}")
        return SamplerSpec(default.name, default.spacing, default.sigma_schedule, default.eta)
    is_default = name == default.name
    spacing = _choice(
        draft.spacing, default.spacing if is_default else cells.spacings[0], cells.spacings, "spacing", name, faults
    )
    sigmas = _choice(
        draft.sigma_schedule,
        default.sigma_schedule if is_default else cells.sigma_schedules[0],
        cells.sigma_schedules,
        "sigma_schedule",
        name,
        faults,
    )
    eta = _eta(draft.eta, name, default.eta if is_default else 0.0, faults)
    if spacing is None or sigmas is None or eta is None:
        return SamplerSpec(name)
    sampler = SamplerSpec(name, spacing, sigmas, eta)
    if steps is not None:
        why = refusal(sampler, pipeline.schedule, manifest.prediction_type, steps)
        faults.check(why is None, "spec.sampler", f"{why}; use another sampler or number of steps")
    return sampler


def _choice(
    given: str | Unknown | None, default: str, offered: tuple[str, ...], field: str, sampler: str, faults: Violations
) -> str | None:
    if given is None:
        return default
    if isinstance(given, Unknown) or given not in offered:
        faults.add(f"spec.sampler.{field}", f"{sampler} is offered with {listed(offered)} only")
        return None
    return given


def _eta(given: float | None, sampler: str, default: float, faults: Violations) -> float | None:
    if given is None:
        return default
    good = faults.check(sampler == "ddim", "spec.sampler.eta", f"only ddim has it, {sampler} has not; leave it out")
    good = good and faults.check(0 <= given <= 1, "spec.sampler.eta", "must be from 0 to 1")
    return given if good else None


def _seeds(draft: SpecDraft, max_outputs: int, faults: Violations) -> tuple[int, ...]:
    if not faults.check(len(draft.seeds) <= max_outputs, "spec.outputs", f"at most {max_outputs} pictures a request"):
        return ()
    for index, seed in enumerate(draft.seeds):
        in_range = seed is None or 0 <= seed <= MAX_SEED
        faults.check(in_range, f"spec.outputs[{index}].seed", "must be from 0 to 2**64 - 1")
    return tuple(secrets.randbits(64) if seed is None else seed for seed in draft.seeds or (None,))


def _token_ids(pipeline: Pipeline, text: str, what: str, notices: list[Notice]) -> tuple[int, ...]:
    if pipeline.tokenizer is None:
        raise ValueError(f"pipeline {pipeline.name} was assembled without its tokenizer")
    tokens = pipeline.tokenizer.encode(text)
    if tokens.truncated:
        most = pipeline.tokenizer.max_tokens
        message = f"the {what} has {tokens.num_tokens} tokens; the model reads {most}, the rest has no effect"
        notices.append(Notice("PROMPT_TRUNCATED", message))
    return tokens.ids
