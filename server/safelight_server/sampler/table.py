"""A sampler is a table: one row of scalars per step, compiled once per generation.

With x the latent and p the (guided) prediction, every sampler offered is

    model_input = in_scale * x
    denoised    = e * x + f * p
    x_next      = a * x + b * p + c * denoised_previous + d * noise

so that outputs with different samplers, steps and lengths share a batch
(`step.py`). What cannot be had is named and refused: see `refusal`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from safelight_server.sampler.schedule import (
    Doubles,
    NoiseSchedule,
    alphas_cumprod,
    karras,
    sigmas_of,
    timestep_of_sigma,
    timesteps_of,
)

Floats = npt.NDArray[np.float32]

LCM_ORIGINAL_STEPS = 50
LCM_TIMESTEP_SCALING = 10.0
LCM_SIGMA_DATA = 0.5

VERSION = 1
"""Part of `numerics_id`: raised whenever a table's values change."""


@dataclass(frozen=True, slots=True)
class SamplerSpec:
    """A sampler and how its steps are placed.

    Attributes:
        name: one of `SAMPLERS`.
        spacing: "leading", "trailing" or "linspace".
        sigma_schedule: "default" or "karras".
        eta: DDIM's share of fresh noise, 0 to 1 (Song et al. 2020, equation 16).
    """

    name: str
    spacing: str = "trailing"
    sigma_schedule: str = "default"
    eta: float = 0.0


class UnsupportedSamplerError(ValueError):
    """A combination that is not offered; the message says which and why."""


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """The compiled sampler.

    Attributes:
        timesteps: (N,) what the denoiser is told.
        in_scale: (N,).
        coefficients: (N, 6) columns a, b, c, d, e, f.
        init_scale: x before the first step is this times unit noise.
    """

    timesteps: Floats
    in_scale: Floats
    coefficients: Floats
    init_scale: float

    @property
    def num_steps(self) -> int:
        """N."""
        return len(self.timesteps)

    @property
    def uses_noise(self) -> bool:
        """Whether any step adds noise."""
        return bool(self.coefficients[:, 3].any())


_Rows = tuple[Doubles, Doubles, Doubles, float]
_Compiler = Callable[[SamplerSpec, NoiseSchedule, str, int], _Rows]


def _table(timesteps: Doubles, in_scale: Doubles, init_scale: float, **columns: Doubles | float) -> _Rows:
    count = len(timesteps)
    stacked = np.stack([np.broadcast_to(np.asarray(columns.get(name, 0.0)), count) for name in "abcdef"], axis=1)
    return timesteps, np.broadcast_to(in_scale, count), stacked, float(init_scale)


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


def _euler(spec: SamplerSpec, schedule: NoiseSchedule, prediction_type: str, num_steps: int) -> _Rows:
    """Karras et al. 2022, algorithm 1 without churn."""
    timesteps, sigmas, init_scale = _euler_sigmas(spec, schedule, num_steps)
    sigma, following = sigmas[:-1], sigmas[1:]
    e, f = _variance_exploding(prediction_type, sigma)
    pull = 1 - following / sigma  # x_next = x + (following - sigma) (x - denoised) / sigma
    return _table(timesteps, 1 / np.sqrt(sigma**2 + 1), init_scale, a=1 - pull + pull * e, b=pull * f, e=e, f=f)


def _euler_ancestral(spec: SamplerSpec, schedule: NoiseSchedule, prediction_type: str, num_steps: int) -> _Rows:
    """k-diffusion's ancestral Euler: steps down further, then adds noise up to the next level."""
    timesteps, sigmas, init_scale = _euler_sigmas(spec, schedule, num_steps)
    sigma, following = sigmas[:-1], sigmas[1:]
    up = np.sqrt(following**2 * (sigma**2 - following**2) / sigma**2)
    down = np.sqrt(np.maximum(following**2 - up**2, 0.0))
    e, f = _variance_exploding(prediction_type, sigma)
    pull = 1 - down / sigma
    return _table(timesteps, 1 / np.sqrt(sigma**2 + 1), init_scale, a=1 - pull + pull * e, b=pull * f, d=up, e=e, f=f)


def _ddim(spec: SamplerSpec, schedule: NoiseSchedule, prediction_type: str, num_steps: int) -> _Rows:
    """Song et al. 2020, equations 12 and 16."""
    alphas = alphas_cumprod(schedule)
    timesteps = np.round(timesteps_of(schedule, spec.spacing, num_steps, endpoint=True)).astype(np.int64)
    previous = timesteps - schedule.num_train_timesteps // num_steps
    bar = alphas[timesteps]
    bar_previous = np.where(previous >= 0, alphas[previous.clip(0)], 1.0 if schedule.set_alpha_to_one else alphas[0])
    alpha, sigma = np.sqrt(bar), np.sqrt(1 - bar)
    e, f = _variance_preserving(prediction_type, alpha, sigma)
    if prediction_type == "epsilon":
        noise_x, noise_p = np.zeros_like(alpha), np.ones_like(alpha)
    elif prediction_type == "v_prediction":
        noise_x, noise_p = sigma, alpha
    else:
        noise_x, noise_p = 1 / sigma, -alpha / sigma
    variance = (1 - bar_previous) / (1 - bar) * (1 - bar / bar_previous)
    spread = spec.eta * np.sqrt(np.maximum(variance, 0.0))
    direction = np.sqrt(np.maximum(1 - bar_previous - spread**2, 0.0))
    root = np.sqrt(bar_previous)
    return _table(
        timesteps.astype(np.float64),
        np.ones(num_steps),
        1.0,
        a=root * e + direction * noise_x,
        b=root * f + direction * noise_p,
        d=spread,
        e=e,
        f=f,
    )


def _dpmpp_2m(spec: SamplerSpec, schedule: NoiseSchedule, prediction_type: str, num_steps: int) -> _Rows:
    """DPM-Solver++ 2M, midpoint (Lu et al. 2022, algorithm 2), first order at both ends."""
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
    if num_steps > 1 and timesteps[0] == timesteps[1]:
        raise UnsupportedSamplerError(f"the first two of {num_steps} steps fall on one timestep")
    sigmas = np.append(sigmas, 0.0).astype(np.float32).astype(np.float64)
    alpha = 1 / np.sqrt(sigmas**2 + 1)
    sigma = sigmas * alpha
    with np.errstate(divide="ignore"):
        h = np.diff(np.log(alpha) - np.log(sigma))
    pull = alpha[1:] * -np.expm1(-h)
    back = np.zeros(num_steps)  # 1 / (2 r): how far the slope of the last two estimates is followed
    back[1:-1] = 0.5 * h[1:-1] / h[:-2]
    e, f = _variance_preserving(prediction_type, alpha[:-1], sigma[:-1])
    gain = pull * (1 + back)
    return _table(
        timesteps,
        np.ones(num_steps),
        1.0,
        a=sigma[1:] / sigma[:-1] + gain * e,
        b=gain * f,
        c=-pull * back,
        e=e,
        f=f,
    )


def _lcm(spec: SamplerSpec, schedule: NoiseSchedule, prediction_type: str, num_steps: int) -> _Rows:
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
        np.ones(num_steps),
        1.0,
        a=following * e,
        b=following * f,
        d=np.append(np.sqrt(1 - bar[1:]), 0.0),
        e=e,
        f=f,
    )


def _flow_match_euler(spec: SamplerSpec, schedule: NoiseSchedule, prediction_type: str, num_steps: int) -> _Rows:
    """Euler along the straight path of rectified flow (Esser et al. 2024, equations 9 and 13)."""
    total, shift = schedule.num_train_timesteps, schedule.shift

    def shifted(sigma: Doubles) -> Doubles:
        return shift * sigma / (1 + (shift - 1) * sigma)

    ends = shifted(np.array([1.0, 1 / total])).astype(np.float32).astype(np.float64)
    sigmas = shifted(np.linspace(ends[0] * total, ends[1] * total, num_steps) / total)
    sigmas = np.append(sigmas, 0.0).astype(np.float32).astype(np.float64)
    sigma, following = sigmas[:-1], sigmas[1:]
    return _table(sigma * total, np.ones(num_steps), 1.0, a=1.0, b=following - sigma, e=1.0, f=-sigma)


@dataclass(frozen=True, slots=True)
class _Cells:
    """What a sampler can be combined with."""

    compile: _Compiler
    prediction_types: frozenset[str]
    spacings: frozenset[str]
    sigma_schedules: frozenset[str] = frozenset({"default"})


_NOISE = frozenset({"epsilon", "v_prediction", "sample"})
_SPACINGS = frozenset({"leading", "trailing", "linspace"})
_BOTH = frozenset({"default", "karras"})

SAMPLERS: dict[str, _Cells] = {
    "euler": _Cells(_euler, _NOISE, _SPACINGS, _BOTH),
    "euler_ancestral": _Cells(_euler_ancestral, _NOISE - {"sample"}, _SPACINGS),
    "ddim": _Cells(_ddim, _NOISE, _SPACINGS),
    "dpmpp_2m": _Cells(_dpmpp_2m, _NOISE, _SPACINGS, _BOTH),
    "lcm": _Cells(_lcm, _NOISE, frozenset({"trailing"})),
    "flow_match_euler": _Cells(_flow_match_euler, frozenset({"flow"}), frozenset({"trailing"})),
}
"""The one table of supported cells. Cells that turn out not to be finite for a schedule are refused as well."""


@functools.lru_cache(maxsize=1024)
def compile_table(spec: SamplerSpec, schedule: NoiseSchedule, prediction_type: str, num_steps: int) -> SamplerTable:
    """Compiles a sampler for a number of steps.

    Raises:
        UnsupportedSamplerError: the combination is not offered.
    """
    cells = SAMPLERS.get(spec.name)
    if cells is None:
        raise UnsupportedSamplerError(f"unknown sampler {spec.name!r}")
    for what, value, offered in (
        ("prediction type", prediction_type, cells.prediction_types),
        ("spacing", spec.spacing, cells.spacings),
        ("sigma schedule", spec.sigma_schedule, cells.sigma_schedules),
    ):
        if value not in offered:
            raise UnsupportedSamplerError(f"{spec.name} has no {what} {value!r}, only {', '.join(sorted(offered))}")
    if num_steps < 1:
        raise UnsupportedSamplerError("at least one step is needed")
    if spec.name == "lcm" and num_steps > LCM_ORIGINAL_STEPS:
        raise UnsupportedSamplerError(f"lcm was distilled for at most {LCM_ORIGINAL_STEPS} steps")
    with np.errstate(all="ignore"):
        timesteps, in_scale, coefficients, init_scale = cells.compile(spec, schedule, prediction_type, num_steps)
    table = SamplerTable(
        timesteps.astype(np.float32), in_scale.astype(np.float32), coefficients.astype(np.float32), init_scale
    )
    if len(timesteps) != num_steps or not np.isfinite(table.coefficients).all():
        raise UnsupportedSamplerError(
            f"{spec.name} with {spec.spacing} spacing and {prediction_type} has no finite step {_first_bad(table)} of "
            f"{num_steps}: a signal of zero cannot be divided by"
        )
    return table


def refusal(spec: SamplerSpec, schedule: NoiseSchedule, prediction_type: str, num_steps: int) -> str | None:
    """Why a combination is not offered, or None where it is."""
    try:
        compile_table(spec, schedule, prediction_type, num_steps)
    except UnsupportedSamplerError as error:
        return str(error)
    return None


def _first_bad(table: SamplerTable) -> int:
    return int(np.argmin(np.isfinite(table.coefficients).all(axis=1))) + 1
