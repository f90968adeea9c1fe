"""Messages to drafts, and the domain to messages: the wire's words in place of ours. Nothing is decided here.

Drafts take everything that protobuf parses; `resolve` judges them. Statuses
fit into a call's trailing metadata.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from datetime import datetime
from itertools import islice
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import code_pb2, error_details_pb2, status_pb2
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import models_pb2
from safelight_server.catalog import Pipeline
from safelight_server.draft import (
    MAX_ENTRIES,
    DisconnectDraft,
    Draft,
    EncodingDraft,
    PreviewDraft,
    PromptDraft,
    Role,
    SamplerDraft,
    SpecDraft,
    Unknown,
)
from safelight_server.errors import QueueFullError, SafelightError
from safelight_server.request import MediaType, PixelEncoding, PreviewMethod, Spec
from safelight_server.runtime.base import Component, Runtime
from safelight_server.scheduler import Priority

DOMAIN = "safelight"
OK = status_pb2.Status(code=code_pb2.OK)

T = TypeVar("T")
PRIORITIES = {
    Priority.INTERACTIVE: pb.PRIORITY_INTERACTIVE,
    Priority.STANDARD: pb.PRIORITY_STANDARD,
    Priority.BATCH: pb.PRIORITY_BATCH,
}
PREVIEW_METHODS = {
    PreviewMethod.AUTO: pb.PREVIEW_METHOD_AUTO,
    PreviewMethod.LINEAR: pb.PREVIEW_METHOD_LINEAR,
    PreviewMethod.TINY_DECODER: pb.PREVIEW_METHOD_TINY_DECODER,
    PreviewMethod.FULL_DECODER: pb.PREVIEW_METHOD_FULL_DECODER,
    PreviewMethod.NONE: pb.PREVIEW_METHOD_NONE,
}
SPACINGS = {
    "leading": pb.TIMESTEP_SPACING_LEADING,
    "trailing": pb.TIMESTEP_SPACING_TRAILING,
    "linspace": pb.TIMESTEP_SPACING_LINSPACE,
}
SIGMA_SCHEDULES = {"default": pb.SIGMA_SCHEDULE_DEFAULT, "karras": pb.SIGMA_SCHEDULE_KARRAS}
ROLES = {Role.POSITIVE: pb.Prompt.ROLE_POSITIVE, Role.NEGATIVE: pb.Prompt.ROLE_NEGATIVE}
BOTTOM_UP = {False: pb.PixelEncoding.ROW_ORDER_TOP_DOWN, True: pb.PixelEncoding.ROW_ORDER_BOTTOM_UP}
DETACH = {False: pb.DisconnectPolicy.ACTION_CANCEL, True: pb.DisconnectPolicy.ACTION_DETACH}


# --- messages to drafts ---


def draft_request(message: pb.GenerateRequest) -> Draft:
    """What was sent, as it was sent."""
    return Draft(
        spec=_draft_spec(message.spec),
        preview=draft_preview(message.preview),
        encoding=_draft_encoding(message.encoding) if message.HasField("encoding") else None,
        priority=draft_priority(message.scheduling),
        disconnect=DisconnectDraft(
            _enum(DETACH.items(), message.disconnect.action),
            _seconds(message.disconnect.resume_grace) if message.disconnect.HasField("resume_grace") else None,
        ),
        request_id=message.request_id,
        labels=dict(islice(message.labels.items(), MAX_ENTRIES)),
        body_digest=_body_digest(message) if message.request_id else b"",
    )


def draft_preview(message: pb.PreviewPolicy) -> PreviewDraft:
    """A preview policy as it was sent."""
    return PreviewDraft(
        accept=tuple(_draft_encoding(encoding) for encoding in message.accept[:MAX_ENTRIES]),
        max_edge_px=message.max_edge_px if message.HasField("max_edge_px") else None,
        every_n_steps=message.every_n_steps if message.HasField("every_n_steps") else None,
        min_interval_s=_seconds(message.min_interval) if message.HasField("min_interval") else None,
        method=_enum(PREVIEW_METHODS.items(), message.method),
        max_bytes_per_second=message.max_bytes_per_second if message.HasField("max_bytes_per_second") else None,
    )


def draft_priority(message: pb.Scheduling) -> Priority | Unknown | None:
    """A priority as it was sent."""
    return _enum(PRIORITIES.items(), message.priority)


def _draft_spec(message: pb.GenerationSpec) -> SpecDraft:
    sampler = message.sampler
    return SpecDraft(
        model=message.model,
        prompt=message.prompt,
        prompts=tuple(
            PromptDraft(_enum(ROLES.items(), entry.role), entry.text) for entry in message.prompts[:MAX_ENTRIES]
        ),
        width_px=message.width_px if message.HasField("width_px") else None,
        height_px=message.height_px if message.HasField("height_px") else None,
        num_inference_steps=message.num_inference_steps if message.HasField("num_inference_steps") else None,
        guidance_scale=message.guidance_scale if message.HasField("guidance_scale") else None,
        sampler=SamplerDraft(
            name=sampler.name,
            sigma_schedule=_enum(SIGMA_SCHEDULES.items(), sampler.sigma_schedule),
            spacing=_enum(SPACINGS.items(), sampler.spacing),
            eta=sampler.eta if sampler.HasField("eta") else None,
        ),
        seeds=tuple(output.seed if output.HasField("seed") else None for output in message.outputs[:MAX_ENTRIES]),
    )


def _draft_encoding(message: pb.PixelEncoding) -> EncodingDraft:
    return EncodingDraft(
        media_type=message.media_type,
        quality=message.quality if message.HasField("quality") else None,
        row_alignment_bytes=message.row_alignment_bytes if message.HasField("row_alignment_bytes") else None,
        bottom_up=_enum(BOTTOM_UP.items(), message.row_order),
    )


def _enum(names: Iterable[tuple[T, int]], number: int) -> T | Unknown | None:
    """0 is absent; proto3 enums are open, so that any other number may come."""
    if not number:
        return None
    return next((ours for ours, theirs in names if theirs == number), Unknown(number))


def _seconds(duration: Duration) -> float:
    """Seconds; NaN where the message breaks the rules of google.protobuf.Duration."""
    seconds, nanos = duration.seconds, duration.nanos
    valid = abs(seconds) <= 315_576_000_000 and abs(nanos) < 1_000_000_000 and seconds * nanos >= 0
    return seconds + nanos / 1e9 if valid else math.nan


def _body_digest(message: pb.GenerateRequest) -> bytes:
    body = pb.GenerateRequest()
    body.CopyFrom(message)
    body.ClearField("request_id")
    return hashlib.sha256(body.SerializeToString(deterministic=True)).digest()


# --- errors to statuses ---


def status_of(error: SafelightError) -> status_pb2.Status:
    """An error with its details: ErrorInfo always, BadRequest, RetryInfo and QuotaFailure where they say more."""
    status = status_pb2.Status(code=error.status.value[0], message=error.message)
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    status.details.add().Pack(info)
    if error.violations:
        bad = error_details_pb2.BadRequest()
        for violation in error.violations:
            bad.field_violations.add(field=violation.field, description=violation.description)
        status.details.add().Pack(bad)
    if isinstance(error, QueueFullError) and "subject" in error.metadata:
        quota = error_details_pb2.QuotaFailure()
        quota.violations.add(subject=error.metadata["subject"], description=error.message)
        status.details.add().Pack(quota)
    if error.retry_after_s is not None:
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=duration(error.retry_after_s)))
    return status


def duration(seconds: float) -> Duration:
    """Seconds as a Duration."""
    result = Duration()
    result.FromNanoseconds(round(seconds * 1e9))
    return result


def timestamp(at: datetime) -> Timestamp:
    """A time as a Timestamp."""
    result = Timestamp()
    result.FromDatetime(at)
    return result


def spec_message(spec: Spec) -> pb.GenerationSpec:
    """A spec with every default filled in; sent again it gives the same pixels."""
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
    return message


def sampler_message(name: str, spacing: str, sigma_schedule: str) -> pb.SamplerSpec:
    """A sampler."""
    return pb.SamplerSpec(name=name, spacing=SPACINGS[spacing], sigma_schedule=SIGMA_SCHEDULES[sigma_schedule])


def encoding_message(encoding: PixelEncoding) -> pb.PixelEncoding:
    """An encoding, with the fields that count for it."""
    message = pb.PixelEncoding(media_type=encoding.media_type.value)
    if encoding.media_type in (MediaType.JPEG, MediaType.WEBP):
        message.quality = encoding.quality
    elif encoding.media_type is MediaType.RAW_RGBA8:
        message.row_alignment_bytes = encoding.row_alignment_bytes
        message.row_order = BOTTOM_UP[encoding.bottom_up]
    return message


def priority_message(priority: Priority) -> pb.Priority.ValueType:
    """A class."""
    return PRIORITIES[priority]


def model_message(pipeline: Pipeline, runtime: Runtime, is_default: bool) -> models_pb2.Model:
    """What a pipeline offers on a runtime."""
    manifest, defaults = pipeline.manifest, pipeline.manifest.defaults
    methods = [pb.PREVIEW_METHOD_LINEAR, pb.PREVIEW_METHOD_FULL_DECODER]
    if pipeline.has_preview_decoder:
        methods.insert(1, pb.PREVIEW_METHOD_TINY_DECODER)
    cost = runtime.cost(pipeline.name, Component.DENOISER)
    at = defaults.sampler
    ordered = sorted(manifest.samplers, key=lambda cells: cells.name != at.name)
    return models_pb2.Model(
        name=f"models/{pipeline.name}",
        revision=manifest.revision,
        description=manifest.description,
        license=manifest.license,
        runtime=runtime.name,
        numerics_id=runtime.numerics_id(pipeline.name),
        is_default=is_default,
        sizes=[models_pb2.Size(width_px=size.width_px, height_px=size.height_px) for size in manifest.sizes],
        samplers=[
            models_pb2.SamplerOffer(
                name=cells.name,
                spacings=[SPACINGS[spacing] for spacing in cells.spacings],
                sigma_schedules=[SIGMA_SCHEDULES[sigmas] for sigmas in cells.sigma_schedules],
            )
            for cells in ordered
        ],
        preview_methods=[pb.PREVIEW_METHOD_AUTO, *methods],
        media_types=[media_type.value for media_type in MediaType],
        defaults=models_pb2.ModelDefaults(
            num_inference_steps=defaults.num_inference_steps,
            guidance_scale=defaults.guidance_scale,
            sampler=sampler_message(at.name, at.spacing, at.sigma_schedule),
        ),
        limits=models_pb2.ModelLimits(
            max_num_inference_steps=manifest.limits.max_num_inference_steps,
            max_guidance_scale=manifest.limits.max_guidance_scale,
            max_outputs=manifest.limits.max_outputs,
            max_prompt_tokens=manifest.tokenizer.max_tokens,
        ),
        step_times=[
            models_pb2.StepTime(num_rows=rows, duration=duration(seconds))
            for rows, seconds in zip(cost.rows, cost.seconds, strict=True)
        ],
    )


def trailing_metadata(status: status_pb2.Status) -> Mapping[str, bytes]:
    """How gRPC carries a status with details."""
    return {"grpc-status-details-bin": status.SerializeToString()}
