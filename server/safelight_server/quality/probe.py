"""Samples developed pictures and measures them in threads, for the metrics of creative quality.

A sample keeps a thumbnail of the newest preview of each quarter of its steps; with the picture they are measured in the
pool of threads that encodes pictures. Invariants: a picture that is not sampled costs one random number; the queue of
measurements is bounded, and samples beyond the bound are counted instead of measured; a measurement that fails is
logged and does not affect the client.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Executor, Future
from typing import Protocol

import numpy as np
import structlog

from safelight_server.quality.measures import Pixels, colourfulness, distances, luma, sharpness, thumbnail
from safelight_server.telemetry.quality_metrics import QualityMetrics

log = structlog.get_logger(__name__)

MAX_PENDING = 8
"""Measurements that wait or run at once."""
QUARTERS = 4
WINDOW = 256
"""The newest sampled pictures of a model, among which near-duplicates are looked for."""
NEAR = 0.02
"""Distance of thumbnails up to which two pictures are near-duplicates; docs/operations/watching.md says why."""


class Judge(Protocol):
    """What measures how well a picture agrees with its prompt; see `judge.PromptJudge`."""

    def agreement(self, prompt: str, pixels: Pixels, /) -> float:
        """From -1 to 1."""


class QualityProbe:
    """Decides which outputs are sampled, and measures their pictures.

    Args:
        ratio: share (0 to 1) of the outputs that are sampled.
        pool: threads that measure.
        chance: returns random numbers in [0, 1).
        judge: measures prompt agreement; None: it is not measured.
    """

    def __init__(
        self,
        ratio: float,
        metrics: QualityMetrics,
        pool: Executor,
        chance: Callable[[], float] = random.random,
        judge: Judge | None = None,
    ) -> None:
        self._ratio = ratio
        self._metrics = metrics
        self._pool = pool
        self._chance = chance
        self._judge = judge
        self._lock = threading.Lock()  # guards the attributes below, which threads use
        self._num_pending = 0
        self._newest: dict[str, deque[tuple[Hashable, Pixels]]] = {}

    def begin(self, model: str, num_steps: int, origin: Hashable, prompt: str = "") -> DevelopmentSample | None:
        """Decides about an output that begins. Returns its sample; None: it is not sampled.

        Args:
            origin: equal for outputs with the same seed and prompts, which do not count as near-duplicates.
            prompt: what the picture should show; empty: its prompt agreement is not measured.
        """
        if self._chance() >= self._ratio:
            return None
        return DevelopmentSample(self, model, num_steps, origin, prompt)

    def measure(self, sample: DevelopmentSample, pixels: Pixels) -> None:
        """Measures a finished picture (H, W, 3) in a thread, unless too many wait. Call it on the event loop."""
        with self._lock:
            room = self._num_pending < MAX_PENDING
            self._num_pending += room
        if not room:
            self._metrics.skipped()
            return
        self._pool.submit(self._measure, sample, pixels).add_done_callback(self._measured)

    def _measured(self, done: Future[None]) -> None:
        with self._lock:
            self._num_pending -= 1
        if not done.cancelled() and (fault := done.exception()) is not None:
            log.error("bug", work="quality", exc_info=fault)

    def _measure(self, sample: DevelopmentSample, pixels: Pixels) -> None:
        small = thumbnail(pixels)
        agreement = {
            quarter: 1.0 - float(distances(small, preview[None])[0]) for quarter, preview in sample.previews().items()
        }
        light = luma(pixels)
        self._metrics.measured(
            sample.model,
            sharpness(light),
            colourfulness(pixels),
            float(light.mean()) / 255,
            agreement,
            near_duplicate=self._is_near_duplicate(sample, small),
        )
        if self._judge is not None and sample.prompt:
            self._metrics.judged(sample.model, self._judge.agreement(sample.prompt, pixels))

    def _is_near_duplicate(self, sample: DevelopmentSample, small: Pixels) -> bool:
        with self._lock:
            newest = self._newest.setdefault(sample.model, deque(maxlen=WINDOW))
            others = [seen for origin, seen in newest if origin != sample.origin]
            newest.append((sample.origin, small))
        return bool(others) and float(distances(small, np.stack(others)).min()) <= NEAR


class DevelopmentSample:
    """The thumbnails of the previews of one sampled output.

    Args:
        origin, prompt: see `QualityProbe.begin`.
    """

    def __init__(self, probe: QualityProbe, model: str, num_steps: int, origin: Hashable, prompt: str) -> None:
        self.model = model
        self.origin = origin
        self.prompt = prompt
        self._probe = probe
        self._num_steps = num_steps
        self._newest: dict[int, tuple[int, Pixels]] = {}  # step and thumbnail, by quarter

    def preview(self, step: int, pixels: Pixels) -> None:
        """Keeps a thumbnail of a preview (H, W, 3) after `step` steps, unless its quarter has a later one.

        Called in the thread that makes the preview.
        """
        quarter = min(QUARTERS, 1 + (step - 1) * QUARTERS // self._num_steps)
        if quarter not in self._newest or self._newest[quarter][0] < step:
            self._newest[quarter] = step, thumbnail(pixels)

    def previews(self) -> dict[int, Pixels]:
        """The thumbnails by quarter of the steps, from 1."""
        return {quarter: small for quarter, (_, small) in list(self._newest.items())}

    def finish(self, pixels: Pixels) -> None:
        """Measures the finished picture (H, W, 3) in the background."""
        self._probe.measure(self, pixels)
