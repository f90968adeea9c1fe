"""A runtime without arithmetic: sleeps along a cost curve and yields synthetic pictures.

For load tests and scheduler benchmarks only, and says so in its name. Calls of
the denoiser cost base + rows x row; the other components a tenth of that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import structlog
from safelight_server.catalog import Manifest, Pipeline, assemble
from safelight_server.runtime.base import Component, CostCurve, FloatArray, Inputs
from safelight_server.tokenizer import Tokens

log = structlog.get_logger(__name__)

MAX_ROWS = 64
LATENT = (4, 16, 16)
SIZE_PX = 128
TOKENS, WIDTH = 16, 8
OTHERS = 0.1


class SimulatedTokenizer:
    """Bytes of the text, cut to the context."""

    max_tokens = TOKENS

    def encode(self, text: str) -> Tokens:
        """Token ids of `text`."""
        data = text.encode()
        ids = tuple(data[:TOKENS]) + (0,) * (TOKENS - len(data))
        return Tokens(ids, len(data), len(data) > TOKENS)


def simulated_pipeline() -> Pipeline:
    """The one pipeline of the simulated runtime."""
    manifest = Manifest.model_validate(
        {
            "format": 1,
            "name": "simulated",
            "revision": "1",
            "description": "SIMULATED: sleeps instead of computing, yields synthetic pictures. For load tests only.",
            "license": "Apache-2.0",
            "family": "stable-diffusion",
            "components": {
                role.value: {"model": f"simulated_{role.value}", "version": 1, "sha256": ""} for role in Component
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
    """See `runtime.base.Runtime`.

    Args:
        base_s: seconds of a denoiser call.
        row_s: seconds that each row adds.
    """

    name = "simulated"

    def __init__(self, num_instances: int, base_s: float, row_s: float) -> None:
        self.num_instances = num_instances
        self._denoiser = CostCurve((1, MAX_ROWS), (base_s + row_s, base_s + MAX_ROWS * row_s))
        self._other = CostCurve((1, MAX_ROWS), tuple(OTHERS * s for s in self._denoiser.seconds))
        ramp = np.linspace(-1, 1, SIZE_PX, dtype=np.float32)
        image = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], np.float32(0)))
        half = image[:, ::2, ::2]
        self._results = {
            Component.TEXT_ENCODER: ("last_hidden_state", np.zeros((MAX_ROWS, TOKENS, WIDTH), np.float32)),
            Component.DENOISER: ("prediction", np.zeros((MAX_ROWS, *LATENT), np.float32)),
            Component.DECODER: ("image", np.broadcast_to(image, (MAX_ROWS, *image.shape))),
            Component.PREVIEW_DECODER: ("image", np.broadcast_to(half, (MAX_ROWS, *half.shape))),
        }

    async def start(self) -> None:
        """Says what it is."""
        log.warning("simulated_runtime", meaning="sleeps instead of computing; pictures are synthetic")

    @property
    def num_live(self) -> int:
        """All of them."""
        return self.num_instances

    def usable(self, free: Collection[int]) -> Sequence[int]:
        """All of them."""
        return sorted(free)

    def watch(self, changed: Callable[[], None]) -> None:
        """They neither come nor go."""

    async def run(self, instance: int, model: str, component: Component, inputs: Inputs) -> Mapping[str, FloatArray]:
        """Sleeps for what the call costs."""
        rows = len(next(iter(inputs.values())))
        await asyncio.sleep(self.cost(model, component).at(rows))
        name, results = self._results[component]
        return {name: results[:rows]}

    def max_rows(self, model: str, component: Component) -> int:
        """The same for all."""
        return MAX_ROWS

    def cost(self, model: str, component: Component) -> CostCurve:
        """The configured curve."""
        return self._denoiser if component is Component.DENOISER else self._other

    def numerics_id(self, model: str) -> str:
        """No numerics at all."""
        return "simulated"

    async def close(self) -> None:
        """Nothing to release."""
