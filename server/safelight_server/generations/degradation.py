"""Graceful degradation: while its class is under pressure, a request gives up quality as far as its floor allows.

This is decided once, after the lookup in the caches and before anything is written
or computed: the request that is recorded, fingerprinted and accepted is the one
that is developed, here and at a replica that takes it over. `pressure` says when,
`planner` looks up the changed request, and `registry` calls this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from safelight_server.domain.events import Disposition
from safelight_server.domain.request import (
    CacheMode,
    Degradation,
    DegradationKind,
    PreviewMethod,
    QualityFloor,
    Request,
)
from safelight_server.generations.generation import Generation
from safelight_server.generations.planner import OutputPlan, Planner

DECODED = frozenset({PreviewMethod.TINY_DECODER, PreviewMethod.FULL_DECODER})
"""Preview methods that take compute on an instance; AUTO avoids them by itself while the instances are busy."""
NO_FLOOR = QualityFloor()


async def degrade(planner: Planner, generation: Generation, plans: list[OutputPlan]) -> list[OutputPlan]:
    """Plans a new generation whose class is under pressure again, as far as its quality floor allows.

    The smallest loss comes first: similar pictures, then fewer steps, and only where something is left to be developed.
    A request of which any output is in the cache or being developed keeps its quality: less would save nothing there.

    Args:
        plans: what was found for the outputs as the client requested them.

    Returns:
        The plans to submit the generation with. `generation.request` then lists what was given up.
    """
    requested, floor = generation.request, generation.request.quality_floor
    if floor == NO_FLOOR or not planner.is_new(plans):
        return plans
    if floor.min_similarity is not None:
        plans = await planner.plan_similar(plans, floor.min_similarity)
    num_steps = requested.spec.num_inference_steps if floor.min_num_steps is None else floor.min_num_steps
    if _must_develop(plans) and num_steps < requested.spec.num_inference_steps:
        generation.request = replace(requested, spec=replace(requested.spec, num_inference_steps=num_steps))
        plans = await planner.plan(generation, None)
        if floor.min_similarity is not None:
            plans = await planner.plan_similar(plans, floor.min_similarity)
    generation.request = with_degradations(requested, generation.request.spec.num_inference_steps, plans)
    return plans


def _must_develop(plans: Sequence[OutputPlan]) -> bool:
    """Whether any output has no picture yet and must be developed."""
    return any(plan.picture is None for plan in plans)


def with_degradations(requested: Request, num_steps: int, plans: Sequence[OutputPlan]) -> Request:
    """The request that is developed, with the list of what it gave up.

    Args:
        requested: the request as the client sent it.
        num_steps: the number of steps that it is developed with.
        plans: what was found for its outputs.
    """
    given_up: list[Degradation] = []
    spec, preview = requested.spec, requested.preview
    if num_steps < spec.num_inference_steps:
        steps = str(spec.num_inference_steps), str(num_steps)
        given_up.append(Degradation(DegradationKind.FEWER_STEPS, *steps))
        spec = replace(spec, num_inference_steps=num_steps)
    if requested.quality_floor.cheaper_previews and preview.method in DECODED and _must_develop(plans):
        methods = (f"PREVIEW_METHOD_{method.name}" for method in (preview.method, PreviewMethod.LINEAR))
        given_up.append(Degradation(DegradationKind.CHEAPER_PREVIEWS, *methods))
        preview = replace(preview, method=PreviewMethod.LINEAR)
    allowed = requested.cache.mode is CacheMode.ALLOW_SIMILAR
    least = requested.cache.min_similarity if allowed else 1.0
    similar = [plan.origin.similarity for plan in plans if plan.origin.disposition is Disposition.SIMILAR]
    if similar and not (allowed and min(similar) >= least):
        given_up.append(Degradation(DegradationKind.SIMILAR_PICTURE, f"{least:.6g}", f"{min(similar):.6g}"))
    return replace(requested, spec=spec, preview=preview, degradations=tuple(given_up))
