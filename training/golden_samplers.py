"""`python -m training.golden_samplers`: writes trajectories of diffusers' schedulers, for tests without torch.

Each trajectory starts from the server's noise and uses fixed predictions; it has the timesteps and the latent after
every step.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from safelight_server.export.schedulers import FLOW_KEYS
from safelight_server.sampler import NoiseSchedule, gaussian, supported_cells
from safelight_server.sampler.table import Cell

from tests.training.test_sampler_parity import place, reference, schedule_of, trajectory

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
    (Cell("flow_match_euler", "flow", "linspace", "default", False), 8, 0.0),
]


def draws(seed: int):
    """Yields the noise of one seed, step by step."""
    return (torch.from_numpy(gaussian(seed, 1, step, SHAPE))[None] for step in range(1000))


FLOW = [
    (NoiseSchedule(), "trailing"),
    (NoiseSchedule(shift=3.0, use_dynamic_shifting=True), "trailing"),
    (NoiseSchedule(shift=3.0), "linspace"),
    (NoiseSchedule(shift=3.0, use_dynamic_shifting=True, max_shift=1.16, patch_size=4), "linspace"),
]
"""Schedules of FLUX.1-schnell, FLUX.1-dev and Stable Diffusion 3; and of the last, with a shift by the size."""
FLOW_SIZES = [(128, 128), (64, 96), (8, 8)]


def flow_timesteps(schedule: NoiseSchedule, spacing: str, num_steps: int, height: int, width: int) -> list[float]:
    """The timesteps that diffusers' pipelines pass to the denoiser, for a latent of a size."""
    given = {key: value for key, value in asdict(schedule).items() if key in FLOW_KEYS}
    scheduler = FlowMatchEulerDiscreteScheduler(**given)
    num_tokens = (height // schedule.patch_size) * (width // schedule.patch_size)
    config = scheduler.config
    shifts = config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    more = {"mu": calculate_shift(num_tokens, *shifts)} if schedule.use_dynamic_shifting else {}
    if spacing == "trailing":
        more["sigmas"] = np.linspace(1.0, 1 / num_steps, num_steps)
    scheduler.set_timesteps(num_steps, **more)
    return scheduler.timesteps.tolist()


def main() -> None:
    """Writes tests/golden/samplers.npz, sampler_cells.txt, flow_timesteps.json and noise.json."""
    folder = Path("tests/golden")
    arrays = {}
    for cell, steps, eta in CASES:
        scheduler = reference(cell, schedule_of(cell))
        place(scheduler, cell, steps)
        init = float(getattr(scheduler, "init_noise_sigma", 1.0))
        x = init * torch.from_numpy(gaussian(5, 0, 0, SHAPE))[None]
        path = [x_next.numpy()[0] for *_, x_next, _ in trajectory(scheduler, cell, draws(5), draws(6), x, eta)]
        case = "/".join(map(str, (*cell, steps, eta)))
        arrays[f"{case}/latents"] = np.stack(path)
        arrays[f"{case}/timesteps"] = scheduler.timesteps.numpy().astype(np.float32)
    np.savez_compressed(folder / "samplers.npz", **arrays)
    lines = [f"{' '.join(map(str, cell)):62} {why or 'offered'}" for cell, why in supported_cells().items()]
    (folder / "sampler_cells.txt").write_text("\n".join(lines) + "\n")
    placed = [
        {
            "schedule": {key: value for key, value in asdict(schedule).items() if key in (*FLOW_KEYS, "patch_size")},
            "spacing": spacing,
            "size": [height, width],
            "timesteps": flow_timesteps(schedule, spacing, num_steps, height, width),
        }
        for schedule, spacing in FLOW
        for height, width in FLOW_SIZES
        for num_steps in (1, 4, 20)
    ]
    lines = ",\n".join(map(json.dumps, placed))
    (folder / "flow_timesteps.json").write_text(f"[\n{lines}\n]\n")
    vectors = [
        {"seed": seed, "stream": stream, "step": step, "values": gaussian(seed, stream, step, (4,)).tolist()}
        for seed, stream, step in ((0, 0, 0), (7, 0, 0), (7, 1, 0), (7, 1, 19), (2**64 - 1, 1, 3))
    ]
    (folder / "noise.json").write_text(json.dumps(vectors, indent=1) + "\n")


if __name__ == "__main__":
    main()
