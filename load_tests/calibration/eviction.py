"""Simulates how many steps the caches save on the trace, by eviction policy and settings.

The trace runs through the real encoder, text guard, skip policy and eviction policies. No picture is computed and no
time passes, so every request finds what all earlier ones stored. A picture computed from noise enters all caches. A
picture that began from another's latent is stored to be served as SIMILAR only or, for comparison, not at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from safelight_server.cache.approximate.embedding import cosines
from safelight_server.cache.approximate.eviction import Eviction, LeastBenefit, LeastRecentlyUsed
from safelight_server.cache.approximate.guard import Guard, TextFacts
from safelight_server.cache.approximate.skip_policy import SkipPolicy
from safelight_server.settings import Settings

from load_tests.bench.runner import Report, Row
from load_tests.calibration.trace import DEFAULT, SEEDS, Asked, trace
from load_tests.calibration.vectors import Encoder, Floats

NUM_STEPS = 20
PICTURE_BYTES = 12_000
LATENT_BYTES = 32 * 8 * 8 * 4
MIN_SIMILARITY = 0.8
MAX_USES: int = Settings.model_fields["cache_similar_uses"].default
CANDIDATES = 64
KINDS = ("exact", "similar", "latent", "miss")
POLICIES: dict[str, Callable[[int], Eviction]] = {
    "LRU": LeastRecentlyUsed,
    "LCBFU": lambda most: LeastBenefit(most, ageing=False),
    "LCBFU, ageing": LeastBenefit,
}
SKIP_POLICY = SkipPolicy()
UNBOUNDED = 10**12
SETTINGS: dict[str, dict[str, Any]] = {
    "EXACT only": {"approximate": False},
    "begun from a latent: not kept": {"keep_approximate": False},
    **{f"served {most} times": {"max_uses": most} for most in (4, 8, 16, 32, 10**6)},
    **{f"min_similarity {least}": {"min_similarity": least} for least in (0.95, 0.9, 0.8, 0.7)},
    "0.8, latents from cosine 0.75 on": {"skip_policy": SkipPolicy((0.75, 0.85, 0.9, 0.95), (0.2, 0.3, 0.4, 0.5))},
    "0.8, latents from cosine 0.85 on": {"skip_policy": SkipPolicy((0.85, 0.9, 0.95), (0.3, 0.4, 0.5))},
}


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to simulate. `shares` are cache sizes, as shares of the bytes that an unbounded cache keeps."""

    seeds: tuple[int, ...] = SEEDS
    num_requests: int = DEFAULT.num_requests
    shares: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5, 1.0)


SMOKE = Plan(seeds=(1,), num_requests=20, shares=(0.5,))


@dataclass
class Result:
    """Result of one replay: requests, and steps saved, by kind of hit."""

    hits: Counter[str] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)
    num_requests: int = 0
    admitted_bytes: int = 0

    @property
    def saved(self) -> float:
        """S: the share of all steps that the caches save."""
        return self.steps.total() / (self.num_requests * NUM_STEPS)


class Replay:
    """Replays one trace against one simulated cache."""

    def __init__(
        self,
        eviction: Eviction,
        skip_policy: SkipPolicy = SKIP_POLICY,
        *,
        approximate: bool = True,
        min_similarity: float = MIN_SIMILARITY,
        keep_approximate: bool = True,
        max_uses: int = MAX_USES,
    ) -> None:
        self._eviction = eviction
        self._skip_policy = skip_policy
        self._approximate = approximate
        self._min_similarity = min_similarity
        self._keep_approximate = keep_approximate
        self._max_uses = max_uses
        self._uses: Counter[int] = Counter()
        self._kept_steps = skip_policy.steps(NUM_STEPS) if approximate else ()
        self._pictures: list[int] = []
        self._latents: list[int] = []
        self._exact: dict[tuple[str, int], int] = {}
        self.result = Result()

    def run(self, asked: tuple[Asked, ...], vectors: Floats, facts: list[TextFacts]) -> Result:
        """Replays all requests in order. `vectors` (N, D) and `facts` belong to their prompts."""
        stored = vectors.astype(np.float16)
        for number, request in enumerate(asked):
            kind, steps = self._answer(number, request, stored, vectors, facts)
            self.result.num_requests += 1
            self.result.hits[kind] += 1
            self.result.steps[kind] += steps
            if kind == "miss":
                self._admit(number, request)
            elif kind == "latent" and self._keep_approximate:
                self._keep(number, ((_picture(number), PICTURE_BYTES, NUM_STEPS),))
        return self.result

    def _answer(
        self, number: int, request: Asked, stored: npt.NDArray[np.float16], vectors: Floats, facts: list[TextFacts]
    ) -> tuple[str, int]:
        if request.seed is not None:
            source = self._exact.get((request.prompt, request.seed))
            if source is not None and _picture(source) in self._eviction:
                self._eviction.hit(_picture(source))
                return "exact", NUM_STEPS
        if not self._approximate:
            return "miss", 0
        for source, cosine in _nearest(self._pictures, stored, vectors[number]):
            same = cosine >= self._min_similarity and facts[source] == facts[number]
            if same and _picture(source) in self._eviction:
                self._uses[source] += 1
                if self._uses[source] > self._max_uses:
                    self._pictures.remove(source)
                    return "miss", 0
                self._eviction.hit(_picture(source))
                return "similar", NUM_STEPS
        return self._latent(_nearest(self._latents, stored, vectors[number]))

    def _latent(self, nearest: list[tuple[int, float]]) -> tuple[str, int]:
        best, key = 0, ""
        for source, cosine in nearest:
            there = [step for step in self._kept_steps if _latent(source, step) in self._eviction]
            start = self._skip_policy.start_step(cosine, NUM_STEPS, there)
            if start > best:
                best, key = start, _latent(source, start)
        if not best:
            return "miss", 0
        self._eviction.hit(key)
        return "latent", best

    def _admit(self, number: int, request: Asked) -> None:
        if request.seed is not None:
            self._exact[request.prompt, request.seed] = number
        latents = ((_latent(number, step), LATENT_BYTES, step) for step in self._kept_steps)
        self._keep(number, ((_picture(number), PICTURE_BYTES, NUM_STEPS), *latents))
        self._latents.append(number)

    def _keep(self, number: int, entries: tuple[tuple[str, int, int], ...]) -> None:
        self._pictures.append(number)
        for key, num_bytes, benefit in entries:
            self._eviction.add(key, num_bytes, benefit)
            self.result.admitted_bytes += num_bytes


def _nearest(sources: list[int], stored: npt.NDArray[np.float16], vector: Floats) -> list[tuple[int, float]]:
    found = cosines(stored[sources], vector)
    return [(sources[row], float(found[row])) for row in np.argsort(-found)[:CANDIDATES]]


def _picture(source: int) -> str:
    return f"{source}/picture"


def _latent(source: int, step: int) -> str:
    return f"{source}/{step}"


def measure(plan: Plan) -> Report:
    """Runs the simulation; returns one table by settings and one by eviction policy."""
    encoder = Encoder()
    guard = Guard(encoder.pipeline.manifest.guard)
    by_settings: list[Row] = []
    by_policy: list[Row] = []
    for seed in plan.seeds:
        asked = trace(seed)[: plan.num_requests]
        prompts = [request.prompt for request in asked]
        vectors, facts = encoder(prompts), [guard.facts(prompt) for prompt in prompts]
        for name, settings in SETTINGS.items():
            whole = Replay(LeastRecentlyUsed(UNBOUNDED), **settings).run(asked, vectors, facts)
            hits = {kind: whole.hits[kind] for kind in KINDS}
            by_settings.append({"seed": seed, "settings": name, "steps_saved": whole.saved, **hits})
        whole = Replay(LeastRecentlyUsed(UNBOUNDED)).run(asked, vectors, facts)
        for share in plan.shares:
            most = round(share * whole.admitted_bytes)
            saved = {name: Replay(policy(most)).run(asked, vectors, facts).saved for name, policy in POLICIES.items()}
            by_policy.append({"seed": seed, "share_of_bytes": share, "max_mb": most / 1e6, **saved})
    return Report(
        "eviction", {"Steps saved without bounds": by_settings, "Steps saved by the share of all bytes": by_policy}
    )
