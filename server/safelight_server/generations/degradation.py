"""Graceful degradation: what a request gives up while its class is under pressure, as its quality floor allows.

Decided once, after the caches were asked and before anything is written or
computed: the request that is recorded, fingerprinted and accepted is the one
that is developed, here and at a replica that takes it over. Neighbours:
`pressure` says when, `planner` looks again, `registry` calls it.
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
"""Methods of previews that take compute; AUTO leaves them by itself when the instances are busy."""
NO_FLOOR = QualityFloor()


async def degrade(planner: Planner, generation: Generation, plans: list[OutputPlan]) -> list[OutputPlan]:
    """Plans a new generation whose class is under pressure again, as far as its quality floor allows.

    What is cheapest comes first: similar pictures, then fewer steps, and only where something is left to be developed.
    A request of which anything is there, or under way, is left alone: less quality would save nothing of that.

    Args:
        plans: what was found for its outputs as they were asked for.

    Returns:
        What it is to be submitted with; its `request` then says what was given up.
    """
    asked, floor = generation.request, generation.request.quality_floor
    if floor == NO_FLOOR or not planner.is_new(plans):
        return plans
    if floor.min_similarity is not None:
        plans = await planner.plan_similar(plans, floor.min_similarity)
    num_steps = asked.spec.num_inference_steps if floor.min_num_steps is None else floor.min_num_steps
    if _is_left(plans) and num_steps < asked.spec.num_inference_steps:
        generation.request = replace(asked, spec=replace(asked.spec, num_inference_steps=num_steps))
        plans = await planner.plan(generation, None)
        if floor.min_similarity is not None:
            plans = await planner.plan_similar(plans, floor.min_similarity)
    generation.request = with_degradations(asked, generation.request.spec.num_inference_steps, plans)
    return plans


def _is_left(plans: Sequence[OutputPlan]) -> bool:
    """Whether an output must be developed."""
    return any(plan.picture is None for plan in plans)


def with_degradations(asked: Request, num_steps: int, plans: Sequence[OutputPlan]) -> Request:
    """The request that is developed, with what it gave up.

    Args:
        asked: as the client sent it.
        num_steps: that it is developed with.
        plans: what is there of its outputs.
    """
    given_up: list[Degradation] = []
    spec, preview = asked.spec, asked.preview
    if num_steps < spec.num_inference_steps:
        steps = str(spec.num_inference_steps), str(num_steps)
        given_up.append(Degradation(DegradationKind.FEWER_STEPS, *steps))
        spec = replace(spec, num_inference_steps=num_steps)
    if asked.quality_floor.cheaper_previews and preview.method in DECODED and _is_left(plans):
        methods = (f"PREVIEW_METHOD_{method.name}" for method in (preview.method, PreviewMethod.LINEAR))
        given_up.append(Degradation(DegradationKind.CHEAPER_PREVIEWS, *methods))
        preview = replace(preview, method=PreviewMethod.LINEAR)
    allowed = asked.cache.mode is CacheMode.ALLOW_SIMILAR
    least = asked.cache.min_similarity if allowed else 1.0
    similar = [plan.origin.similarity for plan in plans if plan.origin.disposition is Disposition.SIMILAR]
    if similar and not (allowed and min(similar) >= least):
        given_up.append(Degradation(DegradationKind.SIMILAR_PICTURE, f"{least:.6g}", f"{min(similar):.6g}"))
    return replace(asked, spec=spec, preview=preview, degradations=tuple(given_up))
