"""What the engine is given to develop, and who hears what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from safelight_server.catalog.catalog import Pipeline
from safelight_server.domain.component import Component
from safelight_server.domain.errors import SafelightError
from safelight_server.domain.tensors import FloatArray
from safelight_server.engine.latents import Snapshot
from safelight_server.sampler import SamplerTable
from safelight_server.scheduler import Kind, Priority, ScheduledOutput
from safelight_server.telemetry import Trail

COMPONENTS = {
    Kind.ENCODE: Component.TEXT_ENCODER,
    Kind.DENOISE: Component.DENOISER,
    Kind.DECODE: Component.DECODER,
}


class OutputListener(Protocol):
    """Hears what becomes of one output. Called on the event loop; must not block or raise."""

    def trails(self) -> Sequence[Trail]:
        """Of all who want it and are traced."""

    def started(self) -> None:
        """Its first denoiser batch is on its way."""

    def computed(self, seconds: float, rows: int) -> None:
        """It was in a batch: its share of the time, and denoiser rows."""

    def stepped(self, step: int, batch_size: int) -> None:
        """`step` steps are made; the last call was shared by `batch_size` outputs."""

    def wants_frame(self, step: int) -> bool:
        """Whether someone would take a preview of this step: only then is `frame` called."""

    def frame(self, step: int, denoised: FloatArray) -> None:
        """The denoised estimate (C, h, w) after `step` steps; the listener's own copy."""

    def wants_checkpoint(self, step: int) -> bool:
        """Whether the state after this step is to be kept: only then is `checkpoint` called."""

    def checkpoint(self, snapshot: Snapshot) -> None:
        """The state after `snapshot.step` steps; the listener's own copy."""

    def encoded(self, row: int, embedding: FloatArray) -> None:
        """The embedding (T, D) of one of its prompts, `token_ids[row]`, was computed."""

    def decoded(self, image: FloatArray) -> None:
        """The finished picture (3, H, W) in [-1, 1], unclamped. The output has ended."""

    def failed(self, error: SafelightError) -> None:
        """The output has ended without a picture."""

    def expired(self) -> None:
        """Its deadline has passed. The output has ended without a picture."""


@dataclass(frozen=True, slots=True)
class Job:
    """One output to develop.

    Attributes:
        token_ids: of the prompt and, with guidance, of the negative prompt; each (T,).
        deadline: on the engine's clock.
        start: where it stopped, when it goes on after `suspend`; or where it begins in place of noise.
        embeddings: of `token_ids`, (T, D), where they are known already; may be shorter.
    """

    output_id: int
    caller: str
    priority: Priority
    pipeline: Pipeline
    latent_shape: tuple[int, int, int]
    table: SamplerTable
    seed: int
    guidance_scale: float
    token_ids: tuple[tuple[int, ...], ...]
    deadline: float | None = None
    start: Snapshot | None = None
    embeddings: tuple[FloatArray | None, ...] = ()

    @property
    def conditioning(self) -> tuple[str, ...]:
        """Names of its prompts, row by row; see `prompt_name`."""
        return tuple(prompt_name(self.pipeline, ids) for ids in self.token_ids)

    @property
    def known(self) -> dict[str, FloatArray]:
        """Embeddings (T, D) that are known already, by name."""
        pairs = zip(self.conditioning, self.embeddings, strict=False)
        return {name: embedding for name, embedding in pairs if embedding is not None}

    def as_output(self, key: Callable[[Pipeline, Component, tuple[int, int, int]], str]) -> ScheduledOutput:
        """As the scheduler sees it. `key`: who can share a batch."""
        known = self.known
        keys = {kind: key(self.pipeline, component, self.latent_shape) for kind, component in COMPONENTS.items()}
        return ScheduledOutput(
            output_id=self.output_id,
            caller=self.caller,
            priority=self.priority,
            num_steps=self.table.num_steps,
            rows_per_step=len(self.token_ids),
            keys=keys,
            conditioning=tuple(name for name in self.conditioning if name not in known),
            deadline=self.deadline,
            first_step=self.start.step if self.start else 0,
        )


def prompt_name(pipeline: Pipeline, token_ids: Sequence[int]) -> str:
    """Equal for prompts with equal embeddings."""
    encoder = pipeline.manifest.components[Component.TEXT_ENCODER].sha256
    return f"{encoder}:{','.join(map(str, token_ids))}"
