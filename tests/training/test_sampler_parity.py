"""Every sampler cell against diffusers' own schedulers, step by step, from their own samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from safelight_server.sampler import SAMPLERS, NoiseSchedule, SamplerSpec, advance, compile_table, refusal

STEPS = [*range(1, 26), 28, 30, 33, 35, 40, 45, 47, 49, 50]
SHAPE = (1, 4, 4, 4)
CLASSES = {
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "ddim": DDIMScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "lcm": LCMScheduler,
    "flow_match_euler": FlowMatchEulerDiscreteScheduler,
}
CANCELLING = {("dpmpp_2m", "sample", True), ("euler", "sample", True), ("euler", "v_prediction", True)}
"""Terms a hundred times the result cancel near zero SNR: two float32 orders of the same sum differ by up to 1.4e-5."""

CELLS = [
    pytest.param(name, prediction, spacing, sigmas, zero_snr, id=f"{name}-{prediction}-{spacing}-{sigmas}-{zero_snr}")
    for name, cells in SAMPLERS.items()
    for prediction in sorted(cells.prediction_types)
    for spacing in sorted(cells.spacings)
    for sigmas in sorted(cells.sigma_schedules)
    for zero_snr in ((False,) if name == "flow_match_euler" else (False, True))
]


def reference(name: str, prediction: str, spacing: str, sigmas: str, zero_snr: bool):
    """diffusers' scheduler for a cell."""
    if name == "flow_match_euler":
        return FlowMatchEulerDiscreteScheduler()
    options = dict(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction,
        rescale_betas_zero_snr=zero_snr,
    )
    if name != "lcm":
        options |= dict(timestep_spacing=spacing, steps_offset=1)
    if name in ("ddim", "lcm"):
        options |= dict(clip_sample=False)
    if sigmas == "karras":
        options |= dict(use_karras_sigmas=True)
    return CLASSES[name](**options)


def deviation(ours: np.ndarray, theirs: torch.Tensor) -> float:
    """max |a - b| / max |reference|."""
    theirs = theirs.numpy()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize(("name", "prediction", "spacing", "sigmas", "zero_snr"), CELLS)
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_each_step_agrees(name, prediction, spacing, sigmas, zero_snr, eta, monkeypatch):
    if eta and name != "ddim":
        pytest.skip("eta is DDIM's")
    spec = SamplerSpec(name, spacing, sigmas, eta)
    schedule = NoiseSchedule(rescale_zero_terminal_snr=zero_snr, steps_offset=1)
    refused = {n for n in STEPS if refusal(spec, schedule, prediction, n)}
    for num_steps in STEPS:
        if num_steps in refused:
            assert fails(spec, prediction, zero_snr, num_steps), (
                f"{num_steps} steps are refused, but diffusers has them"
            )
        else:
            compare(spec, schedule, prediction, zero_snr, num_steps, monkeypatch)


def compare(spec, schedule, prediction, zero_snr, num_steps, monkeypatch):
    scheduler = reference(spec.name, prediction, spec.spacing, spec.sigma_schedule, zero_snr)
    scheduler.set_timesteps(num_steps)
    table = compile_table(spec, schedule, prediction, num_steps)
    assert len(scheduler.timesteps) == num_steps
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.double()  # its own scalars in float32 are off by up to 1.4e-5
    np.testing.assert_allclose(table.timesteps, scheduler.timesteps.numpy(), rtol=5e-5, atol=5e-5)
    init = float(getattr(scheduler, "init_noise_sigma", 1.0))
    assert table.init_scale == pytest.approx(init, rel=1e-6)
    generator = torch.Generator().manual_seed(num_steps)
    sample = init * torch.randn(SHAPE, generator=generator)
    previous = np.zeros(SHAPE, np.float32)
    for step, timestep in enumerate(scheduler.timesteps):
        x = sample.numpy().copy()
        scaled = (
            sample if not hasattr(scheduler, "scale_model_input") else scheduler.scale_model_input(sample, timestep)
        )
        assert deviation(table.in_scale[step] * x, scaled) <= 2e-6
        output = torch.randn(SHAPE, generator=generator)
        noise = torch.randn(SHAPE, generator=generator)
        for module in ("euler_ancestral_discrete", "ddim", "lcm"):
            monkeypatch.setattr(
                f"diffusers.schedulers.scheduling_{module}.randn_tensor", lambda *_args, _n=noise, **_kwargs: _n
            )
        extra = {"eta": spec.eta} if spec.name == "ddim" else {}
        result = scheduler.step(output, timestep, sample, **extra)
        x_next, denoised = advance(x, output.numpy(), previous, noise.numpy(), table.coefficients[step][None])
        sigma = float(scheduler.sigmas[step]) if spec.name.startswith("euler") else 0.0
        tolerance = 1e-3 if sigma > 1000 else 2e-5 if (spec.name, prediction, zero_snr) in CANCELLING else 1e-5
        where = f"step {step + 1} of {num_steps}"
        assert deviation(x_next, result.prev_sample) <= tolerance, where
        estimate = getattr(result, "pred_original_sample", None)
        estimate = getattr(result, "denoised", None) if estimate is None else estimate
        if estimate is not None:
            assert deviation(denoised, estimate) <= tolerance, where
        if spec.name == "dpmpp_2m":
            assert deviation(denoised, scheduler.model_outputs[-1]) <= tolerance, where
        previous = denoised
        sample = result.prev_sample


def fails(spec, prediction, zero_snr, num_steps) -> bool:
    """Whether diffusers raises or gives something that is not a number."""
    scheduler = reference(spec.name, prediction, spec.spacing, spec.sigma_schedule, zero_snr)
    try:
        scheduler.set_timesteps(num_steps)
        sample = torch.ones(SHAPE)
        for timestep in scheduler.timesteps:
            sample = scheduler.step(torch.ones(SHAPE), timestep, sample).prev_sample
    except (IndexError, ValueError, NotImplementedError):
        return True
    return not bool(torch.isfinite(sample).all())
