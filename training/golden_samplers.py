"""`python -m training.golden_samplers`: whole trajectories of diffusers' schedulers, for tests without torch.

Each starts from our noise and is fed fixed predictions; what is kept is the latent after every step.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safelight_server.sampler import SamplerSpec, gaussian

from tests.training.test_sampler_parity import reference

SHAPE = (2, 3, 3)
CASES = [
    ("euler", "v_prediction", "trailing", "default", True, 8),
    ("euler", "epsilon", "linspace", "karras", False, 8),
    ("ddim", "v_prediction", "trailing", "default", True, 8),
    ("ddim", "epsilon", "leading", "default", False, 20),
    ("dpmpp_2m", "v_prediction", "trailing", "default", True, 8),
    ("dpmpp_2m", "epsilon", "linspace", "karras", False, 20),
    ("flow_match_euler", "flow", "trailing", "default", False, 8),
]


def main() -> None:
    """Writes tests/golden/samplers.npz and noise.json."""
    folder = Path("tests/golden")
    arrays = {}
    for name, prediction, spacing, sigmas, zero_snr, steps in CASES:
        scheduler = reference(name, prediction, spacing, sigmas, zero_snr)
        scheduler.set_timesteps(steps)
        if hasattr(scheduler, "sigmas"):
            scheduler.sigmas = scheduler.sigmas.double()
        sample = float(getattr(scheduler, "init_noise_sigma", 1.0)) * torch.from_numpy(gaussian(5, 0, 0, SHAPE))[None]
        path = []
        for step, timestep in enumerate(scheduler.timesteps):
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(sample, timestep)
            output = torch.from_numpy(gaussian(6, 1, step, SHAPE))[None]
            sample = scheduler.step(output, timestep, sample).prev_sample
            path.append(sample.numpy()[0])
        spec = SamplerSpec(name, spacing, sigmas)
        arrays[f"{spec.name}/{prediction}/{spacing}/{sigmas}/{zero_snr}/{steps}"] = np.stack(path)
    np.savez_compressed(folder / "samplers.npz", **arrays)
    vectors = [
        {"seed": seed, "stream": stream, "step": step, "values": gaussian(seed, stream, step, (4,)).tolist()}
        for seed, stream, step in ((0, 0, 0), (7, 0, 0), (7, 1, 0), (7, 1, 19), (2**64 - 1, 1, 3))
    ]
    (folder / "noise.json").write_text(json.dumps(vectors, indent=1) + "\n")


if __name__ == "__main__":
    main()
