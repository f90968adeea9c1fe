"""Requests from the wire: everything is checked, every fault is named, every default filled in.

The one way into `request.Request`. What passes here reaches the engine; what
does not is an InvalidRequestError with a violation per field.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import unicodedata
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration

from safelight.v1 import generation_pb2 as pb
from safelight_server.catalog import Catalog, Pipeline
from safelight_server.errors import FieldViolation, InvalidRequestError, NotFoundError
from safelight_server.request import (
    DisconnectPolicy,
    MediaType,
    Notice,
    PixelEncoding,
    PreviewMethod,
    PreviewPolicy,
    Request,
    Spec,
)
from safelight_server.sampler import SamplerSpec, refusal
from safelight_server.scheduler import Priority
from safelight_server.tokenizer import Tokens

MAX_LABELS, MAX_LABEL_KEY, MAX_LABEL_VALUE = 16, 63, 255
MIN_EDGE_PX = 8
MIN_BYTES_PER_SECOND = 1024
MAX_ROW_ALIGNMENT = 4096

PRIORITIES = {
    pb.PRIORITY_UNSPECIFIED: Priority.STANDARD,
    pb.PRIORITY_INTERACTIVE: Priority.INTERACTIVE,
    pb.PRIORITY_STANDARD: Priority.STANDARD,
    pb.PRIORITY_BATCH: Priority.BATCH,
}
METHODS = {
    pb.PREVIEW_METHOD_UNSPECIFIED: PreviewMethod.AUTO,
    pb.PREVIEW_METHOD_AUTO: PreviewMethod.AUTO,
    pb.PREVIEW_METHOD_LINEAR: PreviewMethod.LINEAR,
    pb.PREVIEW_METHOD_TINY_DECODER: PreviewMethod.TINY_DECODER,
    pb.PREVIEW_METHOD_FULL_DECODER: PreviewMethod.FULL_DECODER,
    pb.PREVIEW_METHOD_NONE: PreviewMethod.NONE,
}
SPACINGS = {
    pb.TIMESTEP_SPACING_LEADING: "leading",
    pb.TIMESTEP_SPACING_TRAILING: "trailing",
    pb.TIMESTEP_SPACING_LINSPACE: "linspace",
}
SIGMA_SCHEDULES = {pb.SIGMA_SCHEDULE_DEFAULT: "default", pb.SIGMA_SCHEDULE_KARRAS: "karras"}


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What the server bounds beside the model."""

    max_prompt_chars: int
    resume_grace_s: float
    max_resume_grace_s: float


class _Faults:
    """Collects violations."""

    def __init__(self) -> None:
        self.found: list[FieldViolation] = []

    def add(self, field: str, description: str) -> None:
        self.found.append(FieldViolation(field, description))

    def check(self, good: bool, field: str, description: str) -> None:
        if not good:
            self.add(field, description)

    def done(self) -> None:
        if self.found:
            raise InvalidRequestError(self.found)


def resolve_request(message: pb.GenerateRequest, catalog: Catalog, limits: RequestLimits) -> Request:
    """A valid request.

    Raises:
        InvalidRequestError: with all faults.
        NotFoundError: no such model.
    """
    faults = _Faults()
    pipeline = find_model(message.spec.model, catalog, "spec.model")
    notices: list[Notice] = []
    spec = _spec(message.spec, pipeline, limits, faults, notices)
    request = Request(
        spec=spec,
        preview=_preview(message.preview, pipeline, faults),
        encoding=_encoding(message.encoding, "encoding", faults) if message.HasField("encoding") else PixelEncoding(),
        priority=_priority(message.scheduling, faults),
        disconnect=_disconnect(message.disconnect, limits, faults),
        request_id=_request_id(message.request_id, faults),
        body_digest=_body_digest(message),
        labels=_labels(message.labels, faults),
        warnings=tuple(notices),
    )
    faults.done()
    return request


def resolve_preview(message: pb.PreviewPolicy, pipeline: Pipeline) -> PreviewPolicy:
    """A valid preview policy; an empty message is the default one."""
    faults = _Faults()
    policy = _preview(message, pipeline, faults)
    faults.done()
    return policy


def resolve_priority(message: pb.Scheduling) -> Priority:
    """A valid priority."""
    faults = _Faults()
    priority = _priority(message, faults)
    faults.done()
    return priority


def resolve_name(name: str, collection: str) -> str:
    """The id in "collection/id"."""
    prefix, _, identifier = name.partition("/")
    if prefix != collection or not identifier or "/" in identifier:
        raise InvalidRequestError([FieldViolation("name", f"must be {collection}/ID")])
    return identifier


def find_model(name: str, catalog: Catalog, field: str) -> Pipeline:
    """The pipeline that "models/ID" names; empty means the default."""
    if name and not name.startswith("models/"):
        known = ", ".join(f"models/{known}" for known in catalog.pipelines)
        raise NotFoundError(f"{field} must be models/ID; there is {known}", reason="MODEL_NOT_FOUND")
    return catalog.get(name.removeprefix("models/"))


def _spec(
    message: pb.GenerationSpec, pipeline: Pipeline, limits: RequestLimits, faults: _Faults, notices: list[Notice]
) -> Spec:
    manifest = pipeline.manifest
    guidance = _guidance(message, pipeline, faults)
    prompt, negative = _prompts(message, limits, faults)
    assert pipeline.tokenizer is not None
    tokens = _tokens(pipeline, prompt, "prompt", notices)
    negative_tokens = None
    if guidance != 1.0:
        negative_tokens = _tokens(pipeline, negative, "negative prompt", notices)
    elif negative:
        notices.append(Notice("NEGATIVE_PROMPT_UNUSED", "a negative prompt has no effect at guidance_scale 1"))
    steps = message.num_inference_steps if message.HasField("num_inference_steps") else None
    if steps is None:
        steps = manifest.defaults.num_inference_steps
    most = manifest.limits.max_num_inference_steps
    faults.check(1 <= steps <= most, "spec.num_inference_steps", f"must be from 1 to {most}")
    width, height = _size(message, pipeline, faults)
    return Spec(
        model=pipeline.name,
        revision=manifest.revision,
        prompt=prompt,
        negative_prompt=negative,
        token_ids=tokens.ids,
        negative_token_ids=None if negative_tokens is None else negative_tokens.ids,
        width_px=width,
        height_px=height,
        num_inference_steps=steps,
        guidance_scale=guidance,
        sampler=_sampler(message.sampler, pipeline, steps if 1 <= steps <= most else 0, faults),
        seeds=_seeds(message, manifest.limits.max_outputs, faults),
    )


def _guidance(message: pb.GenerationSpec, pipeline: Pipeline, faults: _Faults) -> float:
    if not message.HasField("guidance_scale"):
        return pipeline.manifest.defaults.guidance_scale
    scale, most = message.guidance_scale, pipeline.manifest.limits.max_guidance_scale
    good = math.isfinite(scale) and 1 <= scale <= most
    faults.check(good, "spec.guidance_scale", f"must be a number from 1 (no guidance) to {most:g}")
    return scale if good else 1.0


def _prompts(message: pb.GenerationSpec, limits: RequestLimits, faults: _Faults) -> tuple[str, str]:
    texts: dict[int, str] = {}
    for index, entry in enumerate(message.prompts):
        field = f"spec.prompts[{index}]"
        if entry.role not in (pb.Prompt.ROLE_POSITIVE, pb.Prompt.ROLE_NEGATIVE):
            faults.add(f"{field}.role", "must be ROLE_POSITIVE or ROLE_NEGATIVE")
        elif entry.role in texts:
            faults.add(f"{field}.role", "there is one of this role already")
        else:
            texts[entry.role] = entry.text
            _check_text(entry.text, f"{field}.text", limits, faults)
    if message.prompt and pb.Prompt.ROLE_POSITIVE in texts:
        faults.add("spec.prompt", "give either prompt or a ROLE_POSITIVE entry of prompts")
    if message.prompt:
        _check_text(message.prompt, "spec.prompt", limits, faults)
    elif pb.Prompt.ROLE_POSITIVE not in texts:
        faults.add("spec.prompt", "say what the picture shows")
    prompt = message.prompt or texts.get(pb.Prompt.ROLE_POSITIVE, "")
    return prompt, texts.get(pb.Prompt.ROLE_NEGATIVE, "")


def _check_text(text: str, field: str, limits: RequestLimits, faults: _Faults) -> None:
    faults.check(bool(text.strip()), field, "must not be blank")
    faults.check(len(text) <= limits.max_prompt_chars, field, f"at most {limits.max_prompt_chars} characters")
    odd = next((c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r"), None)
    if odd is not None:
        faults.add(field, f"has the control character U+{ord(odd):04X}")


def _tokens(pipeline: Pipeline, text: str, what: str, notices: list[Notice]) -> Tokens:
    assert pipeline.tokenizer is not None
    tokens = pipeline.tokenizer.encode(text)
    if tokens.truncated:
        kept = pipeline.tokenizer.max_tokens
        notices.append(Notice("PROMPT_TRUNCATED", f"the {what} has {tokens.num_tokens} tokens; {kept} are used"))
    return tokens


def _size(message: pb.GenerationSpec, pipeline: Pipeline, faults: _Faults) -> tuple[int, int]:
    sizes = pipeline.manifest.sizes
    width = message.width_px if message.HasField("width_px") else None
    height = message.height_px if message.HasField("height_px") else None
    for size in sizes:
        if width in (None, size.width_px) and height in (None, size.height_px):
            return size.width_px, size.height_px
    offered = ", ".join(f"{size.width_px}x{size.height_px}" for size in sizes)
    faults.add("spec.height_px" if width is None else "spec.width_px", f"this model makes {offered}")
    return sizes[0].width_px, sizes[0].height_px


def _sampler(message: pb.SamplerSpec, pipeline: Pipeline, steps: int, faults: _Faults) -> SamplerSpec:
    manifest, default = pipeline.manifest, pipeline.manifest.defaults.sampler
    name = message.name or default.name
    cells = next((cells for cells in manifest.samplers if cells.name == name), None)
    fallback = SamplerSpec(default.name, default.spacing, default.sigma_schedule, default.eta)
    if cells is None:
        offered = ", ".join(cells.name for cells in manifest.samplers)
        faults.add("spec.sampler.name", f"this model has {offered}")
        return fallback
    spacing = SPACINGS.get(message.spacing, "" if message.spacing else cells.spacings[0])
    sigmas = SIGMA_SCHEDULES.get(message.sigma_schedule, "" if message.sigma_schedule else cells.sigma_schedules[0])
    faults.check(spacing in cells.spacings, "spec.sampler.spacing", f"{name} has {', '.join(cells.spacings)} here")
    faults.check(
        sigmas in cells.sigma_schedules,
        "spec.sampler.sigma_schedule",
        f"{name} has {', '.join(cells.sigma_schedules)} here",
    )
    eta = default.eta if name == default.name else 0.0
    if message.HasField("eta"):
        eta = message.eta
        faults.check(name == "ddim", "spec.sampler.eta", "only ddim takes it")
        good = math.isfinite(eta) and 0 <= eta <= 1
        faults.check(good, "spec.sampler.eta", "must be from 0 to 1")
        eta = eta if good else 0.0
    spec = SamplerSpec(name, spacing, sigmas, eta)
    if spacing in cells.spacings and sigmas in cells.sigma_schedules and steps:
        why = refusal(spec, pipeline.schedule, manifest.prediction_type, steps)
        faults.check(why is None, "spec.sampler", why or "")
    return spec


def _seeds(message: pb.GenerationSpec, max_outputs: int, faults: _Faults) -> tuple[int, ...]:
    if len(message.outputs) > max_outputs:
        faults.add("spec.outputs", f"at most {max_outputs} pictures a request")
        return (0,)
    outputs = list(message.outputs) or [pb.OutputSpec()]
    return tuple(output.seed if output.HasField("seed") else secrets.randbits(64) for output in outputs)


def _encoding(message: pb.PixelEncoding, field: str, faults: _Faults) -> PixelEncoding:
    try:
        media_type = MediaType(message.media_type)
    except ValueError:
        faults.add(f"{field}.media_type", f"must be one of {', '.join(MediaType)}")
        return PixelEncoding()
    encoding = PixelEncoding(media_type)
    lossy, raw = media_type in (MediaType.JPEG, MediaType.WEBP), media_type is MediaType.RAW_RGBA8
    quality, alignment = encoding.quality, encoding.row_alignment_bytes
    if message.HasField("quality"):
        quality = message.quality
        faults.check(lossy, f"{field}.quality", "only image/jpeg and image/webp take it")
        faults.check(1 <= quality <= 100, f"{field}.quality", "must be from 1 to 100")
    if message.HasField("row_alignment_bytes"):
        alignment = message.row_alignment_bytes
        power = 4 <= alignment <= MAX_ROW_ALIGNMENT and alignment & (alignment - 1) == 0
        faults.check(raw, f"{field}.row_alignment_bytes", f"only {MediaType.RAW_RGBA8} takes it")
        faults.check(power, f"{field}.row_alignment_bytes", f"must be a power of two from 4 to {MAX_ROW_ALIGNMENT}")
    if message.row_order:
        known = message.row_order in (pb.PixelEncoding.ROW_ORDER_TOP_DOWN, pb.PixelEncoding.ROW_ORDER_BOTTOM_UP)
        faults.check(raw, f"{field}.row_order", f"only {MediaType.RAW_RGBA8} takes it")
        faults.check(known, f"{field}.row_order", "must be ROW_ORDER_TOP_DOWN or ROW_ORDER_BOTTOM_UP")
    bottom_up = message.row_order == pb.PixelEncoding.ROW_ORDER_BOTTOM_UP
    return PixelEncoding(media_type, quality, alignment, bottom_up)


def _preview(message: pb.PreviewPolicy, pipeline: Pipeline, faults: _Faults) -> PreviewPolicy:
    policy = PreviewPolicy()
    method = METHODS.get(message.method)
    if method is None:
        faults.add("preview.method", "is not a method of this server")
        return policy
    if method is PreviewMethod.NONE:
        others = [field.name for field, _ in message.ListFields() if field.name != "method"]
        faults.check(not others, "preview.method", f"PREVIEW_METHOD_NONE contradicts {', '.join(others)}")
        return PreviewPolicy(method=method)
    if method is PreviewMethod.TINY_DECODER and not pipeline.has_preview_decoder:
        faults.add("preview.method", f"models/{pipeline.name} has no preview decoder")
    encodings = [_encoding(entry, f"preview.accept[{i}]", faults) for i, entry in enumerate(message.accept)]
    every, interval, edge, rate = policy.every_n_steps, 0.0, None, None
    if message.HasField("every_n_steps"):
        every = message.every_n_steps
        faults.check(every >= 1, "preview.every_n_steps", "must be at least 1")
    if message.HasField("min_interval"):
        interval = seconds(message.min_interval)
        faults.check(interval > 0, "preview.min_interval", "must be more than 0")
    if message.HasField("max_edge_px"):
        edge = message.max_edge_px
        faults.check(edge >= MIN_EDGE_PX, "preview.max_edge_px", f"must be at least {MIN_EDGE_PX}")
    if message.HasField("max_bytes_per_second"):
        rate = message.max_bytes_per_second
        good = rate >= MIN_BYTES_PER_SECOND
        faults.check(good, "preview.max_bytes_per_second", f"must be at least {MIN_BYTES_PER_SECOND}")
    return PreviewPolicy(
        encoding=encodings[0] if encodings else policy.encoding,
        method=method,
        max_edge_px=edge,
        every_n_steps=max(1, every),
        min_interval_s=interval,
        max_bytes_per_second=rate,
    )


def _priority(message: pb.Scheduling, faults: _Faults) -> Priority:
    priority = PRIORITIES.get(message.priority)
    faults.check(priority is not None, "scheduling.priority", "is not a priority of this server")
    return Priority.STANDARD if priority is None else priority


def _disconnect(message: pb.DisconnectPolicy, limits: RequestLimits, faults: _Faults) -> DisconnectPolicy:
    actions = pb.DisconnectPolicy
    known = message.action in (actions.ACTION_UNSPECIFIED, actions.ACTION_CANCEL, actions.ACTION_DETACH)
    faults.check(known, "disconnect.action", "is not an action of this server")
    detach = message.action == actions.ACTION_DETACH
    grace = limits.resume_grace_s
    if message.HasField("resume_grace"):
        grace = seconds(message.resume_grace)
        good = 0 <= grace <= limits.max_resume_grace_s
        faults.check(good, "disconnect.resume_grace", f"must be from 0 to {limits.max_resume_grace_s:g} s")
        faults.check(not detach, "disconnect.resume_grace", "has no meaning with ACTION_DETACH")
    return DisconnectPolicy(detach, grace)


def _request_id(request_id: str, faults: _Faults) -> str:
    if not request_id:
        return ""
    try:
        return str(uuid.UUID(request_id))
    except ValueError:
        faults.add("request_id", "must be a UUID")
        return ""


def _labels(labels: Mapping[str, str], faults: _Faults) -> dict[str, str]:
    faults.check(len(labels) <= MAX_LABELS, "labels", f"at most {MAX_LABELS}")
    for key, value in labels.items():
        good = 0 < len(key) <= MAX_LABEL_KEY and len(value) <= MAX_LABEL_VALUE
        faults.check(good, f"labels[{key[:MAX_LABEL_KEY]!r}]", "keys have 1 to 63 characters, values at most 255")
    return dict(labels)


def _body_digest(message: pb.GenerateRequest) -> bytes:
    body = pb.GenerateRequest()
    body.CopyFrom(message)
    body.ClearField("request_id")
    return hashlib.sha256(body.SerializeToString(deterministic=True)).digest()


def seconds(duration: Duration) -> float:
    """A duration in seconds."""
    return float(duration.seconds + duration.nanos / 1e9)
