"""`python -m training.golden_samplers`: whole trajectories of diffusers' schedulers, for tests without torch.

Each starts from our noise and is fed fixed predictions; the timesteps and the latent after every step are kept.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safelight_server.sampler import gaussian, supported_cells
from safelight_server.sampler.table import Cell

from tests.training.test_sampler_parity import reference, schedule_of, trajectory

SHAPE = (2, 3, 3)
CASES = [
    (Cell("euler", "v_prediction", "trailing", "default", True), 8, 0.0),
    (Cell("euler", "sample", "leading", "default", False), 8, 0.0),
    (Cell("euler", "epsilon", "linspace", "karras", False), 8, 0.0),
    (Cell("euler_ancestral", "epsilon", "linspace", "default", False), 20, 0.0),
    (Cell("euler_ancestral", "v_prediction", "trailing", "default", True), 8, 0.0),
    (Cell("ddim", "v_prediction", "trailing", "default", True), 8, 0.0),
    (Cell("ddim", "v_prediction", "trailing", "default", True), 8, 0.7),
    (Cell("ddim", "epsilon", "leading", "default", False), 20, 0.0),
    (Cell("ddim", "sample", "linspace", "default", False), 8, 1.0),
    (Cell("dpmpp_2m", "v_prediction", "trailing", "default", True), 8, 0.0),
    (Cell("dpmpp_2m", "sample", "leading", "default", False), 8, 0.0),
    (Cell("dpmpp_2m", "epsilon", "linspace", "karras", False), 20, 0.0),
    (Cell("lcm", "epsilon", "trailing", "default", False), 4, 0.0),
    (Cell("lcm", "v_prediction", "trailing", "default", True), 8, 0.0),
    (Cell("flow_match_euler", "flow", "trailing", "default", False), 8, 0.0),
]


def draws(seed: int):
    """The noise of one seed, step by step."""
    return (torch.from_numpy(gaussian(seed, 1, step, SHAPE))[None] for step in range(1000))


def main() -> None:
    """Writes tests/golden/samplers.npz, sampler_cells.txt and noise.json."""
    folder = Path("tests/golden")
    arrays = {}
    for cell, steps, eta in CASES:
        scheduler = reference(cell, schedule_of(cell))
        scheduler.set_timesteps(steps)
        init = float(getattr(scheduler, "init_noise_sigma", 1.0))
        x = init * torch.from_numpy(gaussian(5, 0, 0, SHAPE))[None]
        path = [x_next.numpy()[0] for *_, x_next, _ in trajectory(scheduler, cell, draws(5), draws(6), x, eta)]
        case = "/".join(map(str, (*cell, steps, eta)))
        arrays[f"{case}/latents"] = np.stack(path)
        arrays[f"{case}/timesteps"] = scheduler.timesteps.numpy().astype(np.float32)
    np.savez_compressed(folder / "samplers.npz", **arrays)
    lines = [f"{' '.join(map(str, cell)):62} {why or 'offered'}" for cell, why in supported_cells().items()]
    (folder / "sampler_cells.txt").write_text("\n".join(lines) + "\n")
    vectors = [
        {"seed": seed, "stream": stream, "step": step, "values": gaussian(seed, stream, step, (4,)).tolist()}
        for seed, stream, step in ((0, 0, 0), (7, 0, 0), (7, 1, 0), (7, 1, 19), (2**64 - 1, 1, 3))
    ]
    (folder / "noise.json").write_text(json.dumps(vectors, indent=1) + "\n")


if __name__ == "__main__":
    main()
