"""Compiles a sampler to a table: one row of scalars per step, once per generation.

With x the latent and p the (guided) prediction, every sampler offered is

    model_input = in_scale * x
    denoised    = e * x + f * p
    x_next      = a * x + b * p + c * denoised_previous + d * noise

so that outputs with different samplers, steps and lengths share a batch
(`step.py`). Combinations that are not offered are refused: see `supported_cells`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from safelight_server.sampler.cells import PREDICTION_TYPES, SAMPLERS, SIGMA_SCHEDULES, SPACINGS, refused_by_name
from safelight_server.sampler.schedule import Doubles, NoiseSchedule, SamplerSpec

Floats = npt.NDArray[np.float32]

VERSION = 2
"""Part of `numerics_id`: increased whenever the values of a table change."""


class UnsupportedSamplerError(ValueError):
    """The combination is not offered; the message says which and why."""


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """The compiled sampler. Its arrays are shared and read-only.

    Attributes:
        timesteps: (N,) the denoiser's timestep input at each step.
        in_scale: (N,) factor of the denoiser's input.
        coefficients: (N, 6) columns a, b, c, d, e, f.
        init_scale: x before the first step is this factor times unit noise.
        levels: (N + 1, 2) columns signal and noise: x before step n of a clean latent z is signal z + noise (unit
            noise); after the last step 1 and 0.
        first_step: the first step that is made; the steps before it are skipped.
    """

    timesteps: Floats
    in_scale: Floats
    coefficients: Floats
    init_scale: float
    levels: Floats
    first_step: int = 0

    @property
    def num_steps(self) -> int:
        """Number of steps, N."""
        return len(self.timesteps)

    @property
    def uses_noise(self) -> bool:
        """Whether any step adds noise."""
        return bool(self.coefficients[:, 3].any())


class Cell(NamedTuple):
    """One combination of the table of `supported_cells`."""

    sampler: str
    prediction_type: str
    spacing: str
    sigma_schedule: str
    zero_terminal_snr: bool


@functools.lru_cache(maxsize=1024)
def compile_table(
    spec: SamplerSpec, schedule: NoiseSchedule, prediction_type: str, num_steps: int, first_step: int = 0
) -> SamplerTable:
    """Compiles a sampler for a number of steps.

    Args:
        first_step: less than `num_steps`; above 0 where development begins from a picture.

    Raises:
        UnsupportedSamplerError: the combination is not offered.
    """
    why = refused_by_name(spec, schedule, prediction_type, num_steps)
    if why is not None:
        raise UnsupportedSamplerError(why)
    with np.errstate(all="ignore"):
        rows = SAMPLERS[spec.name].compile(spec, schedule, prediction_type, num_steps, first_step)
    arrays = _frozen(rows.timesteps), _frozen(rows.in_scale), _frozen(rows.coefficients)
    table = SamplerTable(*arrays, rows.init_scale, _frozen(rows.levels), first_step)
    why = _refused_by_value(table, spec, schedule, prediction_type, num_steps)
    if why is not None:
        raise UnsupportedSamplerError(why)
    return table


def steps_left_out(num_steps: int, strength: float) -> int:
    """How many steps are skipped when development starts from a picture with `strength`, 0 to 1, as in diffusers."""
    return num_steps - min(int(num_steps * strength), num_steps)


def guided_steps(num_steps: int, start: float, end: float) -> range:
    """The steps, from 0, that have guidance if it is limited to the shares from `start` to `end` of all steps.

    They are counted as the guiders of diffusers do (`BaseGuidance`, `start` and `stop`).
    """
    return range(int(start * num_steps), int(end * num_steps))


def controlled_steps(num_steps: int, start: float, end: float) -> range:
    """The steps, from 0, in which a control network acts from the share `start` of all steps to the share `end`.

    They are counted as diffusers' ControlNet pipelines do (`control_guidance_start` and `control_guidance_end`).
    """
    steps = [i for i in range(num_steps) if not (i / num_steps < start or (i + 1) / num_steps > end)]
    return range(steps[0], steps[-1] + 1) if steps else range(0)


def refusal(spec: SamplerSpec, schedule: NoiseSchedule, prediction_type: str, num_steps: int) -> str | None:
    """Why a combination is not offered; None: it is."""
    try:
        compile_table(spec, schedule, prediction_type, num_steps)
    except UnsupportedSamplerError as error:
        return str(error)
    return None


@functools.cache
def supported_cells(max_steps: int = 50) -> Mapping[Cell, str | None]:
    """The one table of what is offered, for Stable Diffusion's noise schedule and eta 0.

    Returns:
        For each cell None if 1 to `max_steps` steps are offered; otherwise from which number of steps it is refused
        and why.
    """
    choices = itertools.product(SAMPLERS, PREDICTION_TYPES, SPACINGS, SIGMA_SCHEDULES, (False, True))
    return MappingProxyType({cell: _first_refusal(cell, max_steps) for cell in itertools.starmap(Cell, choices)})


def _frozen(values: Doubles) -> Floats:
    floats = values.astype(np.float32)
    floats.flags.writeable = False
    return floats


def _first_refusal(cell: Cell, max_steps: int) -> str | None:
    spec = SamplerSpec(cell.sampler, cell.spacing, cell.sigma_schedule)
    schedule = NoiseSchedule(rescale_zero_terminal_snr=cell.zero_terminal_snr)
    for num_steps in range(1, max_steps + 1):
        why = refusal(spec, schedule, cell.prediction_type, num_steps)
        if why is not None:
            return why if num_steps == 1 else f"from {num_steps} steps on: {why}"
    return None


def _refused_by_value(
    table: SamplerTable, spec: SamplerSpec, schedule: NoiseSchedule, prediction_type: str, num_steps: int
) -> str | None:
    what = f"{spec.name} with {spec.spacing} spacing and {prediction_type}"
    if table.num_steps != num_steps:
        return f"{what} gives {table.num_steps} steps instead of {num_steps}"
    if num_steps > 1 and table.timesteps[0] == table.timesteps[1]:
        return f"the first two of {num_steps} steps fall on one timestep"
    if table.timesteps[0] >= schedule.num_train_timesteps and prediction_type != "flow":
        return f"the first of {num_steps} steps is timestep {table.timesteps[0]:g}, past the last one of training"
    finite = np.isfinite(table.coefficients)
    if finite.all():
        return None
    step = int(np.argmin(finite.all(axis=1)))
    return f"{what} has no finite step {step + 1} of {num_steps}: a signal of zero cannot be divided by"
