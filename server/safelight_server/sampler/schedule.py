"""Noise schedules and the timesteps and sigmas of a sampler's steps, as diffusers 0.42.1 computes them.

Alphas are rounded to float32 at the same places as there, since a sampler near
zero terminal SNR shows every last bit; all that follows is float64. torch's own
last bits depend on the machine's vector width, so they are met to 5e-5, not exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]

ZERO_SNR_ALPHA = 2.0**-24
"""Value that samplers in sigma use for a last alpha of zero, so that the first sigma is finite."""

KARRAS_RHO = 7.0


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """The noise schedule that a model was trained with.

    Attributes:
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2".
        rescale_zero_terminal_snr: the last timestep is pure noise (Lin et al. 2023, algorithm 1).
        steps_offset: added to the timesteps of "leading" spacing.
        set_alpha_to_one: whether DDIM's last step ends at alpha 1 rather than at the first alpha.
        shift: how far flow matching's sigmas are shifted towards noise; 1 is not at all.
        use_dynamic_shifting: whether it is that of the size of the picture, which `at` computes.
        base_shift: logarithm of the shift of a picture of `base_image_seq_len` tokens.
        max_shift: likewise of `max_image_seq_len` tokens; between and beyond them it is linear in the tokens.
        patch_size: pixels of the latent along an edge of a token.
    """

    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    rescale_zero_terminal_snr: bool = False
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    patch_size: int = 2

    def at(self, height: int, width: int) -> NoiseSchedule:
        """The schedule for a latent of that size: with its own shift, where that depends on the size."""
        if not self.use_dynamic_shifting:
            return self
        num_tokens = (height // self.patch_size) * (width // self.patch_size)
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        mu = num_tokens * slope + (self.base_shift - slope * self.base_image_seq_len)
        return replace(self, shift=math.exp(mu))


@dataclass(frozen=True, slots=True)
class SamplerSpec:
    """A sampler and how its steps are placed.

    Attributes:
        name: one of `cells.SAMPLERS`.
        spacing: "leading", "trailing" or "linspace".
        sigma_schedule: "default" or "karras".
        eta: DDIM's share of fresh noise, 0 to 1 (Song et al. 2020, equation 16).
    """

    name: str
    spacing: str = "trailing"
    sigma_schedule: str = "default"
    eta: float = 0.0


def alphas_cumprod(schedule: NoiseSchedule) -> Doubles:
    """The cumulative product of the alphas by training timestep, (num_train_timesteps,), float32 values."""
    betas = _betas(schedule)
    if schedule.rescale_zero_terminal_snr:
        betas = _rescaled(betas)
    return _cumprod(np.float32(1) - betas).astype(np.float64)


def sigmas_of(alphas: Doubles, floor: bool = False) -> Doubles:
    """Noise levels sqrt((1 - alpha) / alpha), float32 values; `floor` keeps the last one finite."""
    values = alphas.astype(np.float32)
    if floor:
        values[-1] = ZERO_SNR_ALPHA
    sigmas: Doubles = np.sqrt((np.float32(1) - values) / values).astype(np.float64)
    return sigmas


def timesteps_of(schedule: NoiseSchedule, spacing: str, num_steps: int, endpoint: bool) -> Doubles:
    """Training timesteps of the steps, falling, (num_steps,) (Lin et al. 2023, table 2).

    Args:
        endpoint: whether the last step may be at the clean end; without it one more position is left free.
    """
    total, places = schedule.num_train_timesteps, num_steps + (not endpoint)
    if spacing == "linspace":
        return np.linspace(0, total - 1, places)[::-1][:num_steps]
    if spacing == "leading":
        return ((np.arange(places) * (total // places))[::-1] + schedule.steps_offset)[:num_steps].astype(np.float64)
    return np.round(np.arange(total, 0, -total / num_steps)) - 1


def karras(sigma_max: float, sigma_min: float, num_steps: int) -> Doubles:
    """Karras sigmas (Karras et al. 2022, equation 5) without the final zero, (num_steps,)."""
    high, low = sigma_max ** (1 / KARRAS_RHO), sigma_min ** (1 / KARRAS_RHO)
    sigmas: Doubles = (high + np.linspace(0, 1, num_steps) * (low - high)) ** KARRAS_RHO
    return sigmas


def timestep_of_sigma(sigmas: Doubles, levels: Doubles) -> Doubles:
    """The timesteps of `sigmas`, interpolated by logarithm between the training timesteps' `levels`; float64."""
    logs = np.log(levels.astype(np.float32))  # as in diffusers: where timesteps are cut to integers, last bits show
    wanted = np.log(np.maximum(sigmas, 1e-10))
    low = (np.searchsorted(logs.astype(np.float64), wanted, side="right") - 1).clip(0, len(logs) - 2)
    weight = ((logs[low] - wanted) / (logs[low] - logs[low + 1])).clip(0, 1)
    timesteps: Doubles = low + weight
    return timesteps


def _betas(schedule: NoiseSchedule) -> npt.NDArray[np.float32]:
    count = schedule.num_train_timesteps
    if schedule.beta_schedule == "linear":
        return _linspace(schedule.beta_start, schedule.beta_end, count)
    if schedule.beta_schedule == "scaled_linear":
        roots = _linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, count)
        return np.multiply(roots, roots)
    if schedule.beta_schedule == "squaredcos_cap_v2":
        bar = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
        betas: npt.NDArray[np.float32] = np.minimum(1 - bar[1:] / bar[:-1], 0.999).astype(np.float32)
        return betas
    raise ValueError(f"unknown beta_schedule {schedule.beta_schedule!r}")


def _linspace(start: float, end: float, count: int) -> npt.NDArray[np.float32]:
    """torch.linspace's float32 values: each half is counted from its own end."""
    first, last = np.float32(start), np.float32(end)
    step = (last - first) / np.float32(count - 1)
    index = np.arange(count, dtype=np.float32)
    return np.where(index < count // 2, first + step * index, last - step * (np.float32(count - 1) - index))


def _cumprod(alphas: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """torch's float32 cumprod: accumulated in float64."""
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32)


def _rescaled(betas: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    roots = np.sqrt(_cumprod(np.float32(1) - betas))
    first, last = roots[0], roots[-1]
    roots = (roots - last) * (first / (first - last))
    bars = roots**2
    alphas = np.concatenate([bars[:1], bars[1:] / bars[:-1]])
    return np.float32(1) - alphas
