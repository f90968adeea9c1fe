"""Prometheus metrics of what sampled pictures look like. docs/operations/watching.md defines each."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram

SHARES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99, 1.0)
LIGHTNESS = tuple(tenth / 10 for tenth in range(1, 11))
COLOURFULNESS = (2, 5, 10, 15, 20, 30, 40, 50, 60, 80, 100, 130, 180)
PROMPT_AGREEMENT = (0.05, 0.1, 0.14, 0.16, 0.18, 0.2, 0.22, 0.24, 0.26, 0.28, 0.3, 0.32, 0.35, 0.4, 0.5, 1.0)
"""Cosines of a CLIP: 0.1 to 0.2 for a picture with another prompt, 0.25 to 0.35 with its own."""
SHARPNESS = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000)


class QualityMetrics:
    """Metrics of the sampled pictures, by model."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._agreement = Histogram(
            "safelight_preview_agreement",
            "1 minus the distance of a preview to its picture, by quarter of the steps",
            ["model", "quarter"],
            buckets=SHARES,
            registry=registry,
        )
        self._sharpness = Histogram(
            "safelight_picture_sharpness",
            "Variance of the Laplacian of the luma, squared levels of 255",
            ["model"],
            buckets=SHARPNESS,
            registry=registry,
        )
        self._colourfulness = Histogram(
            "safelight_picture_colourfulness",
            "Colourfulness by Hasler and Suesstrunk",
            ["model"],
            buckets=COLOURFULNESS,
            registry=registry,
        )
        self._lightness = Histogram(
            "safelight_picture_lightness",
            "Mean luma, 0 black to 1 white",
            ["model"],
            buckets=LIGHTNESS,
            registry=registry,
        )
        self._prompt_agreement = Histogram(
            "safelight_prompt_agreement",
            "Cosine of the judge's embeddings of the prompt and of the picture, 0 where it is negative",
            ["model"],
            buckets=PROMPT_AGREEMENT,
            registry=registry,
        )
        self._near_duplicates = Counter(
            "safelight_picture_near_duplicates",
            "Sampled pictures near to another recent one with other words or another seed",
            ["model"],
            registry=registry,
        )
        self._skipped = Counter(
            "safelight_quality_samples_skipped", "Samples not measured, since too many waited", registry=registry
        )

    def measured(
        self,
        model: str,
        sharpness: float,
        colourfulness: float,
        lightness: float,
        agreement: Mapping[int, float],
        *,
        near_duplicate: bool,
    ) -> None:
        """Records the measures of a sampled picture; `agreement` of its previews by quarter of the steps, from 1."""
        self._sharpness.labels(model).observe(sharpness)
        self._colourfulness.labels(model).observe(colourfulness)
        self._lightness.labels(model).observe(lightness)
        self._near_duplicates.labels(model).inc(near_duplicate)
        for quarter, share in agreement.items():
            self._agreement.labels(model, str(quarter)).observe(share)

    def judged(self, model: str, agreement: float) -> None:
        """Records how well a sampled picture agrees with its prompt, from -1 to 1."""
        self._prompt_agreement.labels(model).observe(max(0.0, agreement))  # sums of metrics must not fall

    def skipped(self) -> None:
        """Counts a sample that was not measured."""
        self._skipped.inc()
