"""Pipelines as Model messages."""

from __future__ import annotations

from collections.abc import Iterable

from safelight.v1 import generation_pb2 as pb
from safelight.v1 import models_pb2

from safelight_server.catalog.adapters import AdapterFile
from safelight_server.catalog.catalog import UnavailablePipeline
from safelight_server.catalog.pipeline import Pipeline
from safelight_server.domain.component import Component
from safelight_server.domain.request import MediaType
from safelight_server.runtime.base import CostCurve, Runtime
from safelight_server.wire.enums import SIGMA_SCHEDULES, SPACINGS
from safelight_server.wire.specs import sampler_message
from safelight_server.wire.times import duration


def model_message(
    pipeline: Pipeline, runtime: Runtime, is_default: bool, adapters: Iterable[AdapterFile] = ()
) -> models_pb2.Model:
    """What a pipeline offers and how fast `runtime` runs it. The default sampler comes first."""
    manifest, defaults = pipeline.manifest, pipeline.manifest.defaults
    methods = [pb.PREVIEW_METHOD_LINEAR, pb.PREVIEW_METHOD_FULL_DECODER]
    if pipeline.has_preview_decoder:
        methods.insert(1, pb.PREVIEW_METHOD_TINY_DECODER)
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
            max_prompt_tokens=max(file.max_tokens for file in manifest.tokenizers),
            max_adapter_rank=0 if manifest.adapters is None else manifest.adapters.max_rank,
        ),
        notes=[*manifest.notes, *_tolerance_note(runtime.batch_tolerance(pipeline.name))],
        step_times=_times(runtime.cost(pipeline.name, Component.DENOISER)),
        component_times=[
            models_pb2.ComponentTime(component=component.value, times=_times(runtime.cost(pipeline.name, component)))
            for component in Component
            if component is not Component.DENOISER and component in manifest.components
        ],
        tasks=_tasks(pipeline),
        adapters=[
            models_pb2.AdapterInfo(name=at.name, sha256=at.sha256, rank=at.rank, components=at.components)
            for at in adapters
        ],
        controls=[models_pb2.ControlInfo(name=name) for name in manifest.controls],
        image_prompt=manifest.image_prompt is not None,
    )


def _tasks(pipeline: Pipeline) -> list[models_pb2.Task.ValueType]:
    if pipeline.manifest.is_inpainting:
        return [models_pb2.TASK_INPAINTING]
    of_pictures = [models_pb2.TASK_IMAGE_TO_IMAGE, models_pb2.TASK_INPAINTING] if pipeline.has_encoder else []
    return [models_pb2.TASK_TEXT_TO_IMAGE, *of_pictures]


def _tolerance_note(tolerance: float) -> list[str]:
    if not tolerance:
        return []
    how = f"rows of a batch are within {tolerance:g} of what they are alone, relative to the largest value"
    return [f"{how}: pictures of a spec look the same each time, and bytes may differ by their rounding"]


def unavailable_model(at: UnavailablePipeline) -> models_pb2.UnavailableModel:
    """A pipeline that cannot be served, and why."""
    return models_pb2.UnavailableModel(name=f"models/{at.name}", revision=at.revision, reason=at.reason)


def _times(cost: CostCurve) -> list[models_pb2.StepTime]:
    return [
        models_pb2.StepTime(num_rows=rows, duration=duration(seconds))
        for rows, seconds in zip(cost.rows, cost.seconds, strict=True)
    ]
