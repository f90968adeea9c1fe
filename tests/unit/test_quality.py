"""Measures of pictures, compared with their definitions, and the sampling of pictures."""

from __future__ import annotations

from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from safelight_server.quality import QualityProbe, measures
from safelight_server.quality.probe import MAX_PENDING
from safelight_server.telemetry.quality_metrics import QualityMetrics

from tests.support.streams import Here

RED = np.full((64, 64, 3), (255, 0, 0), np.uint8)
NOISE = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)


class Later(Executor):
    """Accepts work and does not do it."""

    def submit(self, *_: Any, **__: Any) -> Future[Any]:
        return Future()


class Bench:
    def __init__(self, ratio: float = 1.0, pool: Executor | None = None, chance: float = 0.0) -> None:
        self.registry = CollectorRegistry()
        self.probe = QualityProbe(ratio, QualityMetrics(self.registry), pool or Here(), lambda: chance)

    def develop(self, pixels: np.ndarray, origin: object, *previews: tuple[int, np.ndarray]) -> None:
        sample = self.probe.begin("icons", 20, origin)
        assert sample is not None
        for step, seen in previews:
            sample.preview(step, seen)
        sample.finish(pixels)

    def value(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"safelight_{name}", {"model": "icons"} | labels) or 0.0


def test_measures_have_the_values_of_their_definitions() -> None:
    black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    assert measures.distances(black, np.stack([black, white])).tolist() == [0.0, 1.0]
    assert measures.sharpness(measures.luma(RED)) == pytest.approx(0.0, abs=1e-6)
    checks = (np.indices((10, 10)).sum(axis=0) % 2 * 255).astype(np.float32)
    assert measures.sharpness(checks) == pytest.approx((4 * 255) ** 2), "a checkerboard: the Laplacian is +-1020"
    assert measures.colourfulness(white) == 0.0
    # of one red: R-G = 255, (R+G)/2-B = 127.5, no spread
    assert measures.colourfulness(RED) == pytest.approx(0.3 * np.hypot(255, 127.5))


def test_sharpness_of_what_has_no_inside_is_0() -> None:
    assert measures.sharpness(np.zeros((2, 9), np.float32)) == 0.0


def test_each_preview_counts_in_the_quarter_of_its_step_and_the_newest_of_a_quarter_wins() -> None:
    bench = Bench()
    bench.develop(RED, "a", (1, NOISE), (5, RED), (2, NOISE), (20, RED))
    assert bench.value("preview_agreement_count", quarter="1") == 1
    assert bench.value("preview_agreement_sum", quarter="1") == 1.0, "step 5 of 20 ends the first quarter"
    assert bench.value("preview_agreement_sum", quarter="4") == 1.0
    assert bench.value("preview_agreement_count", quarter="2") == 0


def test_near_duplicates_are_pictures_of_other_words_or_seeds() -> None:
    bench = Bench()
    bench.develop(RED, "a")
    bench.develop(RED, "a")
    assert bench.value("picture_near_duplicates_total") == 0, "the same seed and words give the same picture"
    bench.develop(RED, "b")
    assert bench.value("picture_near_duplicates_total") == 1
    bench.develop(NOISE, "c")
    assert bench.value("picture_near_duplicates_total") == 1
    assert bench.value("picture_sharpness_count") == 4


def test_the_ratio_decides_who_is_sampled() -> None:
    assert Bench(ratio=0.0).probe.begin("icons", 20, "a") is None
    assert Bench(ratio=0.5, chance=0.5).probe.begin("icons", 20, "a") is None
    assert Bench(ratio=0.5, chance=0.49).probe.begin("icons", 20, "a") is not None


def test_measurements_that_wait_are_bounded() -> None:
    bench = Bench(pool=Later())
    for number in range(MAX_PENDING + 3):
        bench.develop(RED, number)
    assert bench.registry.get_sample_value("safelight_quality_samples_skipped_total") == 3


def test_a_measurement_that_fails_costs_nothing() -> None:
    bench = Bench()
    for number in range(MAX_PENDING + 1):
        bench.develop(np.zeros((0, 0, 3), np.uint8), number)
    bench.develop(RED, "a")
    assert bench.value("picture_sharpness_count") == 1
