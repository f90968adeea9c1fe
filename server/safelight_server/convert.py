"""The domain to the wire: statuses, specs, usage, models. Nothing is decided here."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import code_pb2, error_details_pb2, status_pb2

from safelight.v1 import generation_pb2 as pb
from safelight.v1 import models_pb2
from safelight_server.catalog import Pipeline
from safelight_server.errors import InvalidRequestError, QueueFullError, SafelightError
from safelight_server.request import MediaType, PixelEncoding, Spec
from safelight_server.resolve import PRIORITIES, SIGMA_SCHEDULES, SPACINGS
from safelight_server.runtime.base import Component, Runtime
from safelight_server.scheduler import Priority

DOMAIN = "safelight"
_SPACINGS = {name: value for value, name in SPACINGS.items()}
_SIGMAS = {name: value for value, name in SIGMA_SCHEDULES.items()}
_PRIORITIES = {priority: value for value, priority in PRIORITIES.items() if value}
OK = status_pb2.Status(code=code_pb2.OK)


def status_of(error: SafelightError) -> status_pb2.Status:
    """An error with its details: ErrorInfo always, BadRequest, RetryInfo and QuotaFailure where they say more."""
    status = status_pb2.Status(code=error.status.value[0], message=error.message)
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    status.details.add().Pack(info)
    if isinstance(error, InvalidRequestError):
        bad = error_details_pb2.BadRequest()
        for violation in error.violations:
            bad.field_violations.add(field=violation.field, description=violation.description)
        status.details.add().Pack(bad)
    if isinstance(error, QueueFullError) and "bound" in error.metadata:
        quota = error_details_pb2.QuotaFailure()
        quota.violations.add(subject=error.metadata["bound"], description=error.message)
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
    return pb.SamplerSpec(name=name, spacing=_SPACINGS[spacing], sigma_schedule=_SIGMAS[sigma_schedule])


def encoding_message(encoding: PixelEncoding) -> pb.PixelEncoding:
    """An encoding, with the fields that count for it."""
    message = pb.PixelEncoding(media_type=encoding.media_type.value)
    if encoding.media_type in (MediaType.JPEG, MediaType.WEBP):
        message.quality = encoding.quality
    elif encoding.media_type is MediaType.RAW_RGBA8:
        message.row_alignment_bytes = encoding.row_alignment_bytes
        orders = pb.PixelEncoding
        message.row_order = orders.ROW_ORDER_BOTTOM_UP if encoding.bottom_up else orders.ROW_ORDER_TOP_DOWN
    return message


def priority_message(priority: Priority) -> pb.Priority:
    """A class."""
    return _PRIORITIES[priority]


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
                spacings=[_SPACINGS[spacing] for spacing in cells.spacings],
                sigma_schedules=[_SIGMAS[sigmas] for sigmas in cells.sigma_schedules],
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
