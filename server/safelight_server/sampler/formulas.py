"""The samplers' formulas: each computes its table's columns in float64 for a schedule, prediction type and step count.

The values need not be finite: `table.py` refuses combinations whose values are not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from safelight_server.sampler.schedule import (
    Doubles,
    NoiseSchedule,
    SamplerSpec,
    alphas_cumprod,
    karras,
    sigmas_of,
    timestep_of_sigma,
    timesteps_of,
)

DDIM_LEAST_KEPT = 1e-12
"""A variance of kept noise below this is float64's rounding error of zero."""

LCM_ORIGINAL_STEPS = 50
LCM_TIMESTEP_SCALING = 10.0
LCM_SIGMA_DATA = 0.5


class Rows(NamedTuple):
    """The columns that a formula computes; see `table.SamplerTable`.

    Attributes:
        levels: (N + 1, 2) columns signal and noise.
    """

    timesteps: Doubles
    in_scale: Doubles
    coefficients: Doubles
    init_scale: float
    levels: Doubles


Compiler = Callable[[SamplerSpec, NoiseSchedule, str, int, int], Rows]
"""Arguments: sampler, schedule, prediction type, number of steps N, and the first step that is made."""


def _table(
    timesteps: Doubles,
    in_scale: Doubles | float,
    init_scale: float,
    signal: Doubles | float,
    noise: Doubles,
    **columns: Doubles | float,
) -> Rows:
    """Joins the columns. `signal` and `noise` are levels before each step, (N,); after the last they are 1 and 0."""
    count = len(timesteps)
    stacked = np.stack([np.broadcast_to(np.asarray(columns.get(name, 0.0)), count) for name in "abcdef"], axis=1)
    levels = np.stack([np.broadcast_to(np.asarray(signal), count), noise], axis=1)
    scale = np.broadcast_to(np.asarray(in_scale), count)
    return Rows(timesteps, scale, stacked, float(init_scale), np.concatenate([levels, [[1.0, 0.0]]]))


def _variance_preserving(prediction_type: str, alpha: Doubles, sigma: Doubles) -> tuple[Doubles, Doubles]:
    """denoised = e x + f p for x = alpha x0 + sigma noise (Salimans & Ho 2022, appendix D)."""
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction_type == "v_prediction":
        return alpha, -sigma
    return np.zeros_like(alpha), np.ones_like(alpha)


def _variance_exploding(prediction_type: str, sigma: Doubles) -> tuple[Doubles, Doubles]:
    """denoised = e x + f p for x = x0 + sigma noise (Karras et al. 2022, table 1)."""
    if prediction_type == "epsilon":
        return np.ones_like(sigma), -sigma
    if prediction_type == "v_prediction":
        return 1 / (sigma**2 + 1), -sigma / np.sqrt(sigma**2 + 1)
    return np.zeros_like(sigma), np.ones_like(sigma)


def _euler_sigmas(spec: SamplerSpec, schedule: NoiseSchedule, num_steps: int) -> tuple[Doubles, Doubles, float]:
    alphas = alphas_cumprod(schedule)
    levels = sigmas_of(alphas, floor=schedule.rescale_zero_terminal_snr)
    timesteps = timesteps_of(schedule, spec.spacing, num_steps, endpoint=True).astype(np.float32).astype(np.float64)
    sigmas = np.interp(timesteps, np.arange(len(levels)), levels)
    if spec.sigma_schedule == "karras":
        sigmas = karras(sigmas[0], sigmas[-1], num_steps)
        timesteps = timestep_of_sigma(sigmas, levels)
    sigmas = np.append(sigmas, 0.0).astype(np.float32).astype(np.float64)
    top = sigmas.max()
    return timesteps, sigmas, top if spec.spacing != "leading" else np.sqrt(top**2 + 1)


def euler(spec: SamplerSpec, schedule: NoiseSchedule, prediction_type: str, num_steps: int, first_step: int) -> Rows:
    """Euler method (Karras et al. 2022, algorithm 1 without churn)."""
    timesteps, sigmas, init_scale = _euler_sigmas(spec, schedule, num_steps)
    sigma, following = sigmas[:-1], sigmas[1:]
    e, f = _variance_exploding(prediction_type, sigma)
    pull = 1 - following / sigma  # x_next = x + (following - sigma) (x - denoised) / sigma
    return _table(
        timesteps, 1 / np.sqrt(sigma**2 + 1), init_scale, 1.0, sigma, a=1 - pull + pull * e, b=pull * f, e=e, f=f
    )


def euler_ancestral(
    spec: SamplerSpec, schedule: NoiseSchedule, prediction_type: str, num_steps: int, first_step: int
) -> Rows:
    """k-diffusion's ancestral Euler: steps down further, then adds noise up to the next level."""
    timesteps, sigmas, init_scale = _euler_sigmas(spec, schedule, num_steps)
    sigma, following = sigmas[:-1], sigmas[1:]
    up = np.sqrt(following**2 * (sigma**2 - following**2) / sigma**2)
    down = np.sqrt(np.maximum(following**2 - up**2, 0.0))
    e, f = _variance_exploding(prediction_type, sigma)
    pull = 1 - down / sigma
    return _table(
        timesteps,
        1 / np.sqrt(sigma**2 + 1),
        init_scale,
        1.0,
        sigma,
        a=1 - pull + pull * e,
        b=pull * f,
        d=up,
        e=e,
        f=f,
    )


def ddim(spec: SamplerSpec, schedule: NoiseSchedule, prediction_type: str, num_steps: int, first_step: int) -> Rows:
    """DDIM (Song et al. 2020, equations 12 and 16)."""
    alphas = alphas_cumprod(schedule)
    timesteps = np.round(timesteps_of(schedule, spec.spacing, num_steps, endpoint=True)).astype(np.int64)
    previous = timesteps - schedule.num_train_timesteps // num_steps
    bar = alphas[timesteps.clip(max=len(alphas) - 1)]
    bar_previous = np.where(previous >= 0, alphas[previous.clip(0)], 1.0 if schedule.set_alpha_to_one else alphas[0])
    alpha, sigma = np.sqrt(bar), np.sqrt(1 - bar)
    e, f = _variance_preserving(prediction_type, alpha, sigma)
    if prediction_type == "epsilon":
        noise_x, noise_p = np.zeros_like(alpha), np.ones_like(alpha)
    elif prediction_type == "v_prediction":
        noise_x, noise_p = sigma, alpha
    else:
        noise_x, noise_p = 1 / sigma, -alpha / sigma
    spread, direction = _ddim_noise(spec.eta, bar, bar_previous)
    root = np.sqrt(bar_previous)
    return _table(
        timesteps.astype(np.float64),
        1.0,
        1.0,
        alpha,
        sigma,
        a=root * e + direction * noise_x,
        b=root * f + direction * noise_p,
        d=spread,
        e=e,
        f=f,
    )


def _ddim_noise(eta: float, bar: Doubles, bar_previous: Doubles) -> tuple[Doubles, Doubles]:
    """Standard deviations of the fresh noise and of the predicted noise that is kept (equation 16), (N,) each."""
    variance = (1 - bar_previous) / (1 - bar) * (1 - bar / bar_previous)
    spread = eta * np.sqrt(np.maximum(variance, 0.0))
    kept = 1 - bar_previous - spread**2
    # With eta 1 a step from a signal of zero (zero terminal SNR) keeps nothing: all its noise is fresh. diffusers takes
    # the root of a float32 rounding error there, which is NaN where the error is negative.
    return spread, np.where(kept < DDIM_LEAST_KEPT, 0.0, np.sqrt(np.maximum(kept, 0.0)))


def dpmpp_2m(spec: SamplerSpec, schedule: NoiseSchedule, prediction_type: str, num_steps: int, first_step: int) -> Rows:
    """DPM-Solver++ 2M, midpoint (Lu et al. 2022, algorithm 2), first order at `first_step` and at the end."""
    levels = sigmas_of(alphas_cumprod(schedule), floor=schedule.rescale_zero_terminal_snr)
    if spec.sigma_schedule == "karras":
        sigmas = karras(levels[-1], levels[0], num_steps)
        timesteps = timestep_of_sigma(sigmas, levels)
        if schedule.beta_schedule != "squaredcos_cap_v2":
            timesteps = np.round(timesteps)
        timesteps = np.trunc(timesteps)
    else:
        timesteps = np.round(timesteps_of(schedule, spec.spacing, num_steps, endpoint=spec.spacing == "trailing"))
        sigmas = np.interp(timesteps, np.arange(len(levels)), levels)
    sigmas = np.append(sigmas, 0.0).astype(np.float32).astype(np.float64)
    alpha = 1 / np.sqrt(sigmas**2 + 1)
    sigma = sigmas * alpha
    with np.errstate(divide="ignore"):
        h = np.diff(np.log(alpha) - np.log(sigma))
    pull = alpha[1:] * -np.expm1(-h)
    back = np.zeros_like(h)  # 1 / (2 r): how far the slope of the last two estimates is followed
    back[1:-1] = 0.5 * h[1:-1] / h[:-2]
    back[first_step] = 0.0  # the step before it is not made
    e, f = _variance_preserving(prediction_type, alpha[:-1], sigma[:-1])
    gain = pull * (1 + back)
    return _table(
        timesteps,
        1.0,
        1.0,
        alpha[:-1],
        sigma[:-1],
        a=sigma[1:] / sigma[:-1] + gain * e,
        b=gain * f,
        c=-pull * back,
        e=e,
        f=f,
    )


def lcm(spec: SamplerSpec, schedule: NoiseSchedule, prediction_type: str, num_steps: int, first_step: int) -> Rows:
    """Multistep consistency sampling (Luo et al. 2023, algorithm 3)."""
    alphas = alphas_cumprod(schedule)
    stride = schedule.num_train_timesteps // LCM_ORIGINAL_STEPS
    origin = (np.arange(1, LCM_ORIGINAL_STEPS + 1) * stride - 1)[::-1]
    timesteps = origin[np.floor(np.linspace(0, len(origin), num_steps, endpoint=False)).astype(np.int64)]
    bar = alphas[timesteps]
    scaled = timesteps * LCM_TIMESTEP_SCALING
    skip = LCM_SIGMA_DATA**2 / (scaled**2 + LCM_SIGMA_DATA**2)
    out = scaled / np.sqrt(scaled**2 + LCM_SIGMA_DATA**2)
    e, f = _variance_preserving(prediction_type, np.sqrt(bar), np.sqrt(1 - bar))
    e, f = out * e + skip, out * f
    following = np.append(np.sqrt(bar[1:]), 1.0)
    return _table(
        timesteps.astype(np.float64),
        1.0,
        1.0,
        np.sqrt(bar),
        np.sqrt(1 - bar),
        a=following * e,
        b=following * f,
        d=np.append(np.sqrt(1 - bar[1:]), 0.0),
        e=e,
        f=f,
    )


def flow_match_euler(
    spec: SamplerSpec, schedule: NoiseSchedule, prediction_type: str, num_steps: int, first_step: int
) -> Rows:
    """Euler along the straight path of rectified flow (Esser et al. 2024, equations 9 and 13).

    Trailing sigmas are FLUX's, 1 to 1 / N before they are shifted; those of linspace end at the last one of the
    training, as Stable Diffusion 3's.
    """
    total, shift = schedule.num_train_timesteps, schedule.shift

    def shifted(sigma: Doubles) -> Doubles:
        return shift * sigma / (1 + (shift - 1) * sigma)

    if spec.spacing == "trailing":
        sigmas = np.linspace(1.0, 1 / num_steps, num_steps).astype(np.float32).astype(np.float64)
    else:
        ends = np.array([1.0, 1 / total])
        if not schedule.use_dynamic_shifting:  # diffusers shifts the ends and then all
            ends = shifted(ends)
        ends = ends.astype(np.float32).astype(np.float64)
        sigmas = np.linspace(ends[0] * total, ends[1] * total, num_steps) / total
    sigmas = np.append(shifted(sigmas), 0.0).astype(np.float32).astype(np.float64)
    sigma, following = sigmas[:-1], sigmas[1:]
    return _table(sigma * total, 1.0, 1.0, 1 - sigma, sigma, a=1.0, b=following - sigma, e=1.0, f=-sigma)
