"""A job: what the engine needs to know to develop one output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from safelight_server.catalog.catalog import Pipeline
from safelight_server.domain.component import Component
from safelight_server.domain.tensors import FloatArray
from safelight_server.engine.latents import Snapshot
from safelight_server.sampler import SamplerTable
from safelight_server.scheduler import Kind, Priority, ScheduledOutput

COMPONENTS = {
    Kind.ENCODE: Component.TEXT_ENCODER,
    Kind.DENOISE: Component.DENOISER,
    Kind.DECODE: Component.DECODER,
}


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
        """Names of its prompts, one per row; see `prompt_name`."""
        return tuple(prompt_name(self.pipeline, ids) for ids in self.token_ids)

    @property
    def known(self) -> dict[str, FloatArray]:
        """Embeddings (T, D) that are known already, by name."""
        pairs = zip(self.conditioning, self.embeddings, strict=False)
        return {name: embedding for name, embedding in pairs if embedding is not None}

    def as_output(self, key: Callable[[Pipeline, Component, tuple[int, int, int]], str]) -> ScheduledOutput:
        """Converts the job to what the scheduler needs of it. `key`: the batch key of a component (`Batches.key`)."""
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
    """The name of a prompt, equal for prompts with equal embeddings."""
    encoder = pipeline.manifest.components[Component.TEXT_ENCODER].sha256
    return f"{encoder}:{','.join(map(str, token_ids))}"
