"""The interface through which the progress of an output is reported.

The engine reports to an execution (or to the leased runner before it), and an
execution to its members and its recorder. Each overrides the methods that it needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from safelight_server.domain.errors import SafelightError
from safelight_server.domain.picture import FinishedPicture, Pixels
from safelight_server.domain.tensors import Embedding, FloatArray
from safelight_server.engine.latents import Snapshot
from safelight_server.telemetry import Trail


class ExecutionObserver:
    """Base class of observers of an execution: every method does nothing.

    All methods are called on the event loop and must neither block nor raise.
    """

    @property
    def next_due(self) -> float:
        """The first step whose frame is needed; infinity: none is. The engine copies no latent before that step."""
        return math.inf

    def trails(self) -> Sequence[Trail]:
        """The traces in which calls of the runtime for this output are recorded."""
        return ()

    def started(self) -> None:
        """The first denoiser batch with this output is in flight."""

    def computed(self, seconds: float, rows: int) -> None:
        """A batch with this output was run. `seconds` is the output's share of its time, `rows` its denoiser rows."""

    def stepped(self, step: int, batch_size: int) -> None:
        """`step` steps are made. `batch_size` outputs shared the last call."""

    def frame(self, step: int, denoised: FloatArray) -> None:
        """The denoised estimate (C, h, w) after `step` steps, a copy; only called from step `next_due` on."""

    def wants_checkpoint(self, step: int) -> bool:
        """Whether `checkpoint` is to be called with the state after this step."""
        return False

    def checkpoint(self, snapshot: Snapshot) -> None:
        """Gets a copy of the state after `snapshot.step` steps."""

    def encoded(self, row: int, embedding: Embedding) -> None:
        """The embedding of prompt number `row` (`Job.token_ids`), or behind them of the image prompt, was computed."""

    def decoded(self, image: FloatArray) -> None:
        """The finished image (3, H, W) in [-1, 1], unclamped. The output has ended."""

    def failed(self, error: SafelightError) -> None:
        """The output has ended without a picture."""

    def expired(self) -> None:
        """The deadline has passed. The output has ended without a picture."""

    def heard(self, step: int, batch_size: int, denoised: FloatArray | None) -> None:
        """Another replica, which runs this execution, has made `step` steps; `denoised`: as in `frame`."""

    def found(self, pixels: Pixels) -> None:
        """The finished picture is in the shared storage, whichever replica made it. The output has ended."""

    async def keep(self, picture: FinishedPicture, compute_s: float) -> None:
        """Keeps the finished picture, which took `compute_s`; the execution can be joined until this returns."""
