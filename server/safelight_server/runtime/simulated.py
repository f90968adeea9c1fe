"""The `simulated` runtime: sleeps instead of computing and returns synthetic pictures. For load tests only.

A denoiser call takes base_s + rows * row_s seconds, a call of another component
a tenth of that. The output for a row depends on that row alone, so pictures
differ by seed, and a step that is lost or made twice changes the picture.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import structlog

from safelight_server.catalog.manifest import Manifest
from safelight_server.catalog.pipeline import Pipeline, assemble
from safelight_server.catalog.tokenizer import Tokens
from safelight_server.domain.component import Component
from safelight_server.domain.tensors import Array, FloatArray
from safelight_server.runtime.base import CostCurve, Inputs, RuntimeFailure, StableRows

log = structlog.get_logger(__name__)

MAX_ROWS = 64
LATENT = (4, 16, 16)
SIZE_PX = 128
TOKENS, WIDTH = 16, 8
OTHERS = 0.1


class SimulatedTokenizer:
    """Uses the UTF-8 bytes of a text as token ids."""

    max_tokens = TOKENS

    def encode(self, text: str) -> Tokens:
        """Token ids of `text`, cut or padded with 0 to the context."""
        data = text.encode()
        ids = tuple(data[:TOKENS]) + (0,) * (TOKENS - len(data))
        return Tokens(ids, len(data), len(data) > TOKENS)


def simulated_pipeline() -> Pipeline:
    """The only pipeline of the simulated runtime."""
    manifest = Manifest.model_validate(
        {
            "format": 1,
            "name": "simulated",
            "revision": "1",
            "description": "SIMULATED: sleeps instead of computing, yields synthetic pictures. For load tests only.",
            "license": "Apache-2.0",
            "family": "stable-diffusion",
            "components": {
                role.value: {"model": f"simulated_{role.value}", "version": 1, "sha256": ""}
                for role in Component
                if role is not Component.IMAGE_ENCODER
            },
            "tokenizer": {"file": "", "sha256": "", "max_tokens": TOKENS, "pad_id": 0, "bos_id": 0, "eos_id": 0},
            "latent": {"channels": LATENT[0], "height": LATENT[1], "width": LATENT[2], "scaling_factor": 1.0},
            "sizes": [{"width_px": SIZE_PX, "height_px": SIZE_PX}],
            "prediction_type": "v_prediction",
            "noise_schedule": {"rescale_zero_terminal_snr": True},
            "samplers": [
                {"name": name, "spacings": ["trailing"], "sigma_schedules": ["default"]} for name in ("ddim", "euler")
            ],
            "defaults": {
                "num_inference_steps": 20,
                "guidance_scale": 1.0,
                "sampler": {"name": "ddim", "spacing": "trailing"},
            },
            "limits": {"max_num_inference_steps": 1000, "max_guidance_scale": 20.0, "max_outputs": 64},
            "linear_preview": {"block": 1, "weights": [[0.2] * 3] * LATENT[0], "bias": [0.0] * 3},
        }
    )
    return assemble(manifest, {}, SimulatedTokenizer())


class SimulatedRuntime:
    """Sleeps instead of computing; implements `runtime.base.Runtime`.

    Args:
        base_s: seconds that a denoiser call takes without its rows.
        row_s: seconds that each row adds.
    """

    name = "simulated"

    def __init__(self, num_instances: int, base_s: float, row_s: float) -> None:
        self.num_instances = num_instances
        self._denoiser = CostCurve((1, MAX_ROWS), (base_s + row_s, base_s + MAX_ROWS * row_s))
        self._other = CostCurve((1, MAX_ROWS), tuple(OTHERS * s for s in self._denoiser.seconds))
        self._embeddings = np.zeros((MAX_ROWS, TOKENS, WIDTH), np.float32)

    async def start(self) -> None:
        """Logs a warning that pictures are synthetic."""
        log.warning("simulated_runtime", meaning="sleeps instead of computing; pictures are synthetic")

    @property
    def num_live(self) -> int:
        """Every instance: all are always live."""
        return self.num_instances

    def usable(self, free: Collection[int]) -> Sequence[int]:
        """Every free instance, in the order of their numbers."""
        return sorted(free)

    def watch(self, changed: Callable[[], None]) -> None:
        """Does nothing: instances neither come nor go."""

    async def run(self, instance: int, model: str, component: Component, inputs: Inputs) -> Mapping[str, FloatArray]:
        """Sleeps for the duration of the call, then returns synthetic outputs."""
        rows = len(next(iter(inputs.values())))
        await asyncio.sleep(self.cost(model, component).at(rows))
        match component:
            case Component.TEXT_ENCODER:
                return {"last_hidden_state": self._embeddings[:rows]}
            case Component.DENOISER:
                return {"prediction": _array(inputs["sample"]) * np.float32(-0.1)}
            case Component.DECODER:
                return {"image": _enlarged(_array(inputs["latent"]), SIZE_PX // LATENT[1])}
            case Component.PREVIEW_DECODER:
                return {"image": _enlarged(_array(inputs["latent"]), SIZE_PX // 2 // LATENT[1])}
            case Component.ENCODER:
                return {"mean": _reduced(_array(inputs["image"]), SIZE_PX // LATENT[1])}
            case Component.IMAGE_ENCODER:
                raise RuntimeFailure("the simulated model takes no image prompts", retryable=False)

    def max_rows(self, model: str, component: Component) -> int:
        """Largest batch, the same for every component."""
        return MAX_ROWS

    def cost(self, model: str, component: Component) -> CostCurve:
        """The configured cost curve."""
        return self._denoiser if component is Component.DENOISER else self._other

    def batch_tolerance(self, model: str) -> float:
        """0: a row's result depends on that row alone."""
        return 0.0

    def numerics_id(self, model: str) -> str:
        """A fixed name: nothing is computed."""
        return "simulated"

    async def close(self) -> None:
        """Nothing to release."""


def _array(given: Array | StableRows) -> FloatArray:
    return given.array() if isinstance(given, StableRows) else np.asarray(given, np.float32)


def _enlarged(latent: FloatArray, factor: int) -> FloatArray:
    """Three channels of a latent (B, C, h, w) as an image (B, 3, H, W)."""
    image = latent[:, :3]
    return image.repeat(factor, axis=2).repeat(factor, axis=3)


def _reduced(image: FloatArray, factor: int) -> FloatArray:
    """An image (B, 3, H, W) as a latent (B, 4, h, w), whose fourth channel is 0."""
    rows, channels, height, width = image.shape
    blocks = image.reshape(rows, channels, height // factor, factor, width // factor, factor)
    latent: FloatArray = blocks.mean(axis=(3, 5), dtype=np.float32)
    return np.concatenate([latent, np.zeros_like(latent[:, :1])], axis=1)
