"""Degradation stays within the floor, is reported, and affects only requests that would be developed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from hypothesis import given
from hypothesis import strategies as st
from safelight_server.domain.events import Disposition, Origin
from safelight_server.domain.picture import EncodedPicture
from safelight_server.domain.request import (
    CacheMode,
    CachePolicy,
    Degradation,
    DegradationKind,
    DisconnectPolicy,
    PixelEncoding,
    PreviewMethod,
    PreviewPolicy,
    QualityFloor,
    Request,
)
from safelight_server.generations.degradation import degrade
from safelight_server.scheduler import Priority

from tests.support.streams import PICTURE, SPEC

STEPS, FEWER, PREVIEWS, SIMILAR = SPEC.num_inference_steps, *DegradationKind
MISS = Origin()


@dataclass(frozen=True)
class Plan:
    """The part of an `OutputPlan` that degradation uses."""

    origin: Origin = MISS
    picture: EncodedPicture | None = None


@dataclass
class Held:
    """The part of a `Generation` that degradation uses."""

    request: Request


def near(similarity: float) -> Plan:
    return Plan(Origin(Disposition.SIMILAR, similarity), PICTURE)


@dataclass
class Caches:
    """A fake planner, with plans for each number of steps, and similar pictures of each output.

    Attributes:
        there: plans by the number of steps; without a plan, each output is a miss.
        similar: similarity of the nearest picture of each output, by the number of steps.
    """

    num_outputs: int = 1
    there: dict[int, list[Plan]] = field(default_factory=dict)
    similar: dict[int, list[float]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    steps: int = STEPS

    def first(self) -> list[Plan]:
        return self.there.get(STEPS, [Plan()] * self.num_outputs)

    def is_new(self, plans: Sequence[Plan]) -> bool:
        return all(plan == Plan() for plan in plans)

    async def plan(self, generation: Held, branched_from: None) -> list[Plan]:
        self.steps = generation.request.spec.num_inference_steps
        self.asked.append(f"{self.steps} steps")
        return self.there.get(self.steps, [Plan()] * self.num_outputs)

    async def plan_similar(self, plans: Sequence[Plan], min_similarity: float) -> list[Plan]:
        self.asked.append(f"similar {min_similarity:g}")
        nearest = self.similar.get(self.steps, [0.0] * self.num_outputs)
        return [
            near(at) if plan.picture is None and at >= min_similarity else plan
            for plan, at in zip(plans, nearest, strict=True)
        ]


def request(
    floor: QualityFloor, method: PreviewMethod = PreviewMethod.AUTO, policy: CachePolicy | None = None
) -> Request:
    return Request(
        SPEC,
        PreviewPolicy(method=method),
        PixelEncoding(),
        Priority.STANDARD,
        DisconnectPolicy(False, 30.0),
        policy or CachePolicy(),
        quality_floor=floor,
    )


async def degraded(caches: Caches, asked: Request) -> tuple[Request, list[Plan]]:
    generation = Held(asked)
    plans = await degrade(caches, generation, caches.first())  # type: ignore[arg-type, assignment]
    return generation.request, plans


async def test_without_a_floor_nothing_is_looked_up_again() -> None:
    caches = Caches(similar={STEPS: [1.0]})
    asked = request(QualityFloor(), PreviewMethod.FULL_DECODER)
    assert await degraded(caches, asked) == (asked, [Plan()])
    assert caches.asked == []


async def test_steps_go_down_to_the_floor() -> None:
    got, plans = await degraded(Caches(), request(QualityFloor(min_num_steps=8)))
    assert got.spec == replace(SPEC, num_inference_steps=8)
    assert got.degradations == (Degradation(FEWER, "50", "8"),)
    assert got.requested_spec == SPEC
    assert plans == [Plan()]


async def test_a_floor_of_all_steps_changes_nothing() -> None:
    asked = request(QualityFloor(min_num_steps=STEPS))
    assert (await degraded(Caches(), asked))[0] == asked


async def test_previews_become_linear_where_a_decoder_was_asked_for() -> None:
    for method in PreviewMethod:
        asked = request(QualityFloor(cheaper_previews=True), method)
        got, _ = await degraded(Caches(), asked)
        if method in (PreviewMethod.TINY_DECODER, PreviewMethod.FULL_DECODER):
            told = Degradation(PREVIEWS, f"PREVIEW_METHOD_{method.name}", "PREVIEW_METHOD_LINEAR")
            assert got == replace(asked, preview=PreviewPolicy(method=PreviewMethod.LINEAR), degradations=(told,))
        else:
            assert got == asked


async def test_a_similar_picture_comes_before_fewer_steps_and_needs_no_previews() -> None:
    caches = Caches(similar={STEPS: [0.9]})
    floor = QualityFloor(min_num_steps=8, cheaper_previews=True, min_similarity=0.8)
    got, plans = await degraded(caches, request(floor, PreviewMethod.TINY_DECODER))
    assert plans == [near(0.9)]
    assert got.spec == SPEC
    assert got.preview.method is PreviewMethod.TINY_DECODER
    assert got.degradations == (Degradation(SIMILAR, "1", "0.9"),)
    assert caches.asked == ["similar 0.8"]


async def test_what_is_not_near_enough_is_not_served() -> None:
    caches = Caches(similar={STEPS: [0.79], 8: [0.85]})
    got, plans = await degraded(caches, request(QualityFloor(min_num_steps=8, min_similarity=0.8)))
    assert plans == [near(0.85)], "pictures with fewer steps are looked at too"
    assert [one.kind for one in got.degradations] == [FEWER, SIMILAR]
    assert caches.asked == ["similar 0.8", "8 steps", "similar 0.8"]


async def test_what_the_cache_mode_allows_is_no_degradation() -> None:
    allowed = CachePolicy(CacheMode.ALLOW_SIMILAR, 0.9)
    caches = Caches(there={8: [near(0.95)]})
    got, _ = await degraded(caches, request(QualityFloor(min_num_steps=8), policy=allowed))
    assert [one.kind for one in got.degradations] == [FEWER]
    caches = Caches(similar={STEPS: [0.85]})
    got, _ = await degraded(caches, request(QualityFloor(min_similarity=0.8), policy=allowed))
    assert got.degradations == (Degradation(SIMILAR, "0.9", "0.85"),)


async def test_what_is_there_or_under_way_is_not_degraded() -> None:
    exact = Plan(Origin(Disposition.EXACT), PICTURE)
    for plans in ([exact], [exact, Plan()], [Plan(Origin(Disposition.LATENT)), Plan()]):
        caches = Caches(len(plans), there={STEPS: plans})
        asked = request(QualityFloor(8, True, 0.5), PreviewMethod.FULL_DECODER)
        assert await degraded(caches, asked) == (asked, plans)


@given(
    floor=st.builds(
        QualityFloor,
        min_num_steps=st.none() | st.integers(1, STEPS),
        cheaper_previews=st.booleans(),
        min_similarity=st.none() | st.floats(0.01, 1.0),
    ),
    method=st.sampled_from(PreviewMethod),
    nearest=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=3),
    kept=st.booleans(),
)
async def test_nothing_goes_below_the_floor_and_all_that_goes_is_told(
    floor: QualityFloor, method: PreviewMethod, nearest: list[float], kept: bool
) -> None:
    similar = dict.fromkeys(range(1, STEPS + 1), nearest)
    there = {STEPS: [Plan(Origin(Disposition.EXACT), PICTURE)] * len(nearest)} if kept else {}
    asked = request(floor, method)
    got, plans = await degraded(Caches(len(nearest), there, similar), asked)
    told = {one.kind: one for one in got.degradations}
    assert got.spec.num_inference_steps >= (floor.min_num_steps or STEPS)
    assert (FEWER in told) is (got.spec.num_inference_steps < STEPS)
    assert (PREVIEWS in told) is (got.preview != asked.preview)
    assert (SIMILAR in told) is any(plan.origin.disposition is Disposition.SIMILAR for plan in plans)
    for plan in plans:
        if plan.origin.disposition is Disposition.SIMILAR:
            assert floor.min_similarity is not None and plan.origin.similarity >= floor.min_similarity
    assert replace(got, degradations=(), spec=SPEC, preview=asked.preview) == asked, "nothing else changes"
    assert not kept or not told
