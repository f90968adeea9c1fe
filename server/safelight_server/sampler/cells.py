"""Which combinations of sampler, prediction type, spacing and sigma schedule are offered, and why others are not."""

from __future__ import annotations

from dataclasses import dataclass

from safelight_server.sampler import formulas
from safelight_server.sampler.schedule import NoiseSchedule, SamplerSpec

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")
SPACINGS = ("leading", "trailing", "linspace")
SIGMA_SCHEDULES = ("default", "karras")


@dataclass(frozen=True, slots=True)
class Cells:
    """What a sampler can be combined with.

    Attributes:
        zero_terminal_snr: whether its noise schedule can be rescaled to zero terminal SNR.
        max_steps: most steps; None: only the training timesteps bound them.
    """

    compile: formulas.Compiler
    prediction_types: tuple[str, ...]
    spacings: tuple[str, ...] = SPACINGS
    sigma_schedules: tuple[str, ...] = ("default",)
    zero_terminal_snr: bool = True
    max_steps: int | None = None


_NOISE = ("epsilon", "v_prediction", "sample")

SAMPLERS: dict[str, Cells] = {
    "euler": Cells(formulas.euler, _NOISE, sigma_schedules=SIGMA_SCHEDULES),
    "euler_ancestral": Cells(formulas.euler_ancestral, ("epsilon", "v_prediction")),
    "ddim": Cells(formulas.ddim, _NOISE),
    "dpmpp_2m": Cells(formulas.dpmpp_2m, _NOISE, sigma_schedules=SIGMA_SCHEDULES),
    "lcm": Cells(formulas.lcm, _NOISE, spacings=("trailing",), max_steps=formulas.LCM_ORIGINAL_STEPS),
    "flow_match_euler": Cells(
        formulas.flow_match_euler, ("flow",), spacings=("trailing", "linspace"), zero_terminal_snr=False
    ),
}
"""The samplers by name. `table.py` also refuses combinations with values that are not finite."""


def refused_by_name(spec: SamplerSpec, schedule: NoiseSchedule, prediction_type: str, num_steps: int) -> str | None:
    """Why a combination is not among the cells; None: it is."""
    cells = SAMPLERS.get(spec.name)
    if cells is None:
        return f"unknown sampler {spec.name!r}"
    for what, value, offered in (
        ("prediction type", prediction_type, cells.prediction_types),
        ("spacing", spec.spacing, cells.spacings),
        ("sigma schedule", spec.sigma_schedule, cells.sigma_schedules),
    ):
        if value not in offered:
            return f"{spec.name} has no {what} {value!r}, only {', '.join(offered)}"
    if schedule.rescale_zero_terminal_snr and not cells.zero_terminal_snr:
        return f"{spec.name} has no betas to rescale to zero terminal SNR"
    if not 0 <= spec.eta <= 1:
        return f"eta {spec.eta} is not from 0 to 1"
    if num_steps < 1:
        return "at least one step is needed"
    if cells.max_steps is not None and num_steps > cells.max_steps:
        return f"{spec.name} was distilled for at most {cells.max_steps} steps"
    if num_steps > schedule.num_train_timesteps:
        return f"the model was trained on {schedule.num_train_timesteps} timesteps, fewer than {num_steps}"
    return None
