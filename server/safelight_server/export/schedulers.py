"""Judges the scheduler of a folder: the noise schedule of the training, and which sampler is the default. Pure.

The noise schedule must be kept exactly. The solver is a choice: where the server
lacks the folder's own one, the nearest takes its place, with a note.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from safelight_server.export.source import Config, Findings
from safelight_server.sampler import NoiseSchedule, SamplerSpec, refusal
from safelight_server.sampler.cells import SAMPLERS

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")
MAX_STEPS = 50
"""Most steps that a model offers, unless its default is more."""

_NOISE = frozenset(
    ["num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"]
)
_PLACED = frozenset(["timestep_spacing", "steps_offset"])
_ZERO_SNR = frozenset(["rescale_betas_zero_snr"])
_CLIP = frozenset(["clip_sample", "clip_sample_range"])
_THRESHOLD = frozenset(["thresholding", "dynamic_thresholding_ratio", "sample_max_value"])
_SIGMAS = frozenset(["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
_ENDS = frozenset(["sigma_min", "sigma_max", "final_sigmas_type"])
_FLOW = frozenset(["use_flow_sigmas", "flow_shift"])
_SHIFT = frozenset(["use_dynamic_shifting", "time_shift_type"])
_SOLVER = frozenset(["solver_order", "algorithm_type", "solver_type", "lower_order_final"])
_LAMBDA = frozenset(["lambda_min_clipped", "variance_type"])
_DISTILLED = frozenset(["original_inference_steps", "timestep_scaling", "set_alpha_to_one"])

_INFINITE = float("-inf")
_PLAIN_SIGMAS = {
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "final_sigmas_type": ("zero",),
}


@dataclass(frozen=True)
class SchedulerClass:
    """A scheduler class of diffusers.

    Attributes:
        sampler: the server's sampler that is its default; None where none may take its place unasked.
        same: whether that sampler computes the same.
        keys: its configuration keys, beside those of the noise schedule. Others in a file are ignored by diffusers.
        exactly: by key the values with which the sampler computes the same.
        betas: (schedule, start, end) where a file does not say.
        set_alpha_to_one: likewise.
        clips: whether it clips what it predicts, where a file does not say (clip_sample).
    """

    sampler: str | None
    same: bool
    keys: frozenset[str]
    exactly: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    betas: tuple[str, float, float] = ("linear", 0.0001, 0.02)
    set_alpha_to_one: bool = True
    spacing: str = "linspace"
    clips: bool = False


_DDIM = _PLACED | _ZERO_SNR | _CLIP | _THRESHOLD | {"set_alpha_to_one"}
_DDPM = _PLACED | _ZERO_SNR | _CLIP | _THRESHOLD | {"variance_type"}
_KDPM2 = _PLACED | _SIGMAS
_MULTISTEP = _THRESHOLD | _SOLVER | _SIGMAS | _FLOW | _SHIFT
_LATER = ("linear", 0.00085, 0.012)
_SCALED = ("scaled_linear", 0.00085, 0.012)

SCHEDULERS = {
    "DDIMScheduler": SchedulerClass("ddim", True, _DDIM, spacing="leading", clips=True),
    "DDIMParallelScheduler": SchedulerClass("ddim", True, _DDIM, spacing="leading", clips=True),
    "EulerDiscreteScheduler": SchedulerClass(
        "euler",
        True,
        _PLACED | _ZERO_SNR | _SIGMAS | _ENDS | {"interpolation_type", "timestep_type"},
        _PLAIN_SIGMAS | {"interpolation_type": ("linear",), "sigma_min": (None,), "sigma_max": (None,)},
    ),
    "EulerAncestralDiscreteScheduler": SchedulerClass("euler_ancestral", True, _PLACED | _ZERO_SNR),
    "DPMSolverMultistepScheduler": SchedulerClass(
        "dpmpp_2m",
        True,
        _MULTISTEP | _PLACED | _ZERO_SNR | _LAMBDA | {"euler_at_final", "use_lu_lambdas", "final_sigmas_type"},
        _PLAIN_SIGMAS
        | {
            "solver_order": (2,),
            "algorithm_type": ("dpmsolver++",),
            "solver_type": ("midpoint",),
            "euler_at_final": (False,),
            "use_lu_lambdas": (False,),
            "lambda_min_clipped": (_INFINITE, None),
        },
    ),
    "LCMScheduler": SchedulerClass(
        "lcm", True, _PLACED | _ZERO_SNR | _CLIP | _THRESHOLD | _DISTILLED, betas=_SCALED, spacing="leading"
    ),
    "TCDScheduler": SchedulerClass(
        None, False, _PLACED | _ZERO_SNR | _CLIP | _THRESHOLD | _DISTILLED, betas=_SCALED, spacing="leading"
    ),
    "PNDMScheduler": SchedulerClass(
        "euler", False, _PLACED | {"skip_prk_steps", "set_alpha_to_one"}, set_alpha_to_one=False, spacing="leading"
    ),
    "DDPMScheduler": SchedulerClass("euler_ancestral", False, _DDPM, spacing="leading"),
    "DDPMParallelScheduler": SchedulerClass("euler_ancestral", False, _DDPM, spacing="leading"),
    "HeunDiscreteScheduler": SchedulerClass("euler", False, _PLACED | _SIGMAS | _CLIP, betas=_LATER),
    "LMSDiscreteScheduler": SchedulerClass("euler", False, _PLACED | _SIGMAS),
    "KDPM2DiscreteScheduler": SchedulerClass("euler", False, _KDPM2, betas=_LATER),
    "KDPM2AncestralDiscreteScheduler": SchedulerClass("euler_ancestral", False, _KDPM2, betas=_LATER),
    "DPMSolverSDEScheduler": SchedulerClass(
        "euler_ancestral", False, _PLACED | _SIGMAS | {"noise_sampler_seed"}, betas=_LATER
    ),
    "DPMSolverSinglestepScheduler": SchedulerClass("dpmpp_2m", False, _MULTISTEP | _LAMBDA | {"final_sigmas_type"}),
    "DEISMultistepScheduler": SchedulerClass("dpmpp_2m", False, _MULTISTEP | _PLACED),
    "UniPCMultistepScheduler": SchedulerClass(
        "dpmpp_2m",
        False,
        (_MULTISTEP - {"algorithm_type"})
        | _PLACED
        | _ZERO_SNR
        | _ENDS
        | {"predict_x0", "disable_corrector", "solver_p", "shift_terminal"},
    ),
}
"""The scheduler classes of diffusers that a StableDiffusionPipeline can have."""

REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "trained_betas": ((None,), "the noise schedule is a list, where the server computes it from three numbers"),
    "thresholding": ((False, None), "no sampler of the server clips by percentile"),
    "use_flow_sigmas": ((False, None), "a model of flow matching is another family"),
    "use_dynamic_shifting": ((False, None), "a model of flow matching is another family"),
    "shift_terminal": ((None,), "a model of flow matching is another family"),
    "timestep_type": (("discrete",), "the denoiser would be given logarithms of sigma"),
    "variance_type": (
        (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
        "the denoiser would predict a variance too",
    ),
    "original_inference_steps": ((50,), "the server's lcm is that of 50 distilled steps"),
    "timestep_scaling": ((10.0,), "the server's lcm is that of a scaling of 10"),
    "beta_schedule": (BETA_SCHEDULES, f"the server has {', '.join(BETA_SCHEDULES)}"),
    "prediction_type": (PREDICTIONS, f"the server has {', '.join(PREDICTIONS)}"),
}
"""By key of a class the values that can be served, and why others cannot."""


@dataclass(frozen=True)
class SamplerOffer:
    """What a model offers: the noise schedule it was trained with, its samplers and its default.

    Attributes:
        cells: the samplers, as in the manifest.
        default: the default sampler, as in the manifest.
        max_steps: most steps with which every cell works.
    """

    schedule: NoiseSchedule
    prediction_type: str
    cells: list[dict[str, Any]]
    default: dict[str, Any]
    max_steps: int


def judge(
    class_name: str,
    config: Config,
    wanted: str,
    num_steps: int | None,
    mends: bool,
    mends_clip_sample: bool,
    findings: Findings,
) -> SamplerOffer | None:
    """What the folder's scheduler comes to; None where it cannot be served, which `findings` then say.

    Args:
        wanted: the user's choice of the default sampler; empty leaves it to the folder.
        num_steps: the default number of steps, if the user gave it.
        mends: as `Family.mends_scheduler`.
        mends_clip_sample: as `Source.mends_clip_sample`.
    """
    what, known = f"scheduler {class_name}", SCHEDULERS.get(class_name)
    if known is None:
        findings.faults.append(f"{what} cannot be served; what can: {', '.join(SCHEDULERS)}")
        return None
    faults = len(findings.faults)
    own = known.keys | _NOISE
    everywhere = frozenset().union(*(one.keys for one in SCHEDULERS.values()), _NOISE)
    for key, value in config.items():
        if key.startswith("_"):
            continue
        if key not in everywhere:
            findings.faults.append(f"{what}: {key} is not known to this exporter")
        elif key in own and value not in _servable(class_name, key, value):
            findings.faults.append(f"{what}: {key} {value!r} cannot be served: {REFUSED[key][1]}")
    if known.sampler is None and not wanted:
        findings.faults.append(f"{what} has no counterpart in the server: choose a default with --sampler")
    if len(findings.faults) > faults:
        return None
    schedule = _noise_schedule(known, config, mends)
    prediction = str(config.get("prediction_type", "epsilon"))
    most = min(max(MAX_STEPS, num_steps or 0), schedule.num_train_timesteps)
    if class_name == "LCMScheduler":
        most = min(most, SAMPLERS["lcm"].max_steps or most)
    cells = _cells(class_name, schedule, prediction, most)
    if not cells:
        findings.faults.append(f"{what}: no sampler of the server works with its noise schedule")
        return None
    names = [cell["name"] for cell in cells]
    if wanted and wanted not in names:
        findings.faults.append(f"--sampler {wanted}: not among those of this model: {', '.join(names)}")
        return None
    default = _default(what, known, config, cells, wanted, findings)
    if known.same and not mends_clip_sample and "clip_sample" in known.keys and config.get("clip_sample", known.clips):
        findings.notes.append(f"{what}: clip_sample is not served: no sampler clips what is predicted")
    return SamplerOffer(schedule, prediction, cells, default, most)


FLOW_RULES: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "invert_sigmas": ((False, None), "the server goes from noise to the picture"),
    "shift_terminal": ((None,), "the last step of the server ends at the picture"),
    "use_karras_sigmas": ((False, None), "sigmas of flow matching are shifted and nothing else"),
    "use_exponential_sigmas": ((False, None), "sigmas of flow matching are shifted and nothing else"),
    "use_beta_sigmas": ((False, None), "sigmas of flow matching are shifted and nothing else"),
    "time_shift_type": (("exponential",), "the shift is the exponential of what is linear in the tokens"),
    "stochastic_sampling": ((False, None), "no sampler of the server draws noise between the steps of flow matching"),
}
"""By key of FlowMatchEulerDiscreteScheduler the values that can be served, and why others cannot."""
FLOW_KEYS = frozenset(
    [
        "num_train_timesteps",
        "shift",
        "use_dynamic_shifting",
        "base_shift",
        "max_shift",
        "base_image_seq_len",
        "max_image_seq_len",
    ]
)
FLOW_MATCH_EULER = "FlowMatchEulerDiscreteScheduler"


def judge_flow(
    class_name: str,
    config: Config,
    spacing: str,
    patch_size: int,
    wanted: str,
    num_steps: int | None,
    findings: Findings,
) -> SamplerOffer | None:
    """Judges the scheduler of a model of flow matching, as `judge` does those of others.

    Args:
        spacing: where the pipeline's class places the steps.
        patch_size: pixels of a latent along an edge of a token, by whose number the shift may go.
    """
    what = f"scheduler {class_name}"
    if class_name != FLOW_MATCH_EULER:
        findings.faults.append(f"{what} cannot be served with flow matching; what can: {FLOW_MATCH_EULER}")
        return None
    faults = len(findings.faults)
    for key, value in config.items():
        if key in FLOW_RULES:
            values, why = FLOW_RULES[key]
            if value not in values:
                findings.faults.append(f"{what}: {key} {value!r} cannot be served: {why}")
        elif key not in FLOW_KEYS and not key.startswith("_"):
            findings.faults.append(f"{what}: {key} is not known to this exporter")
    name = "flow_match_euler"
    if wanted not in ("", name):
        findings.faults.append(f"--sampler {wanted}: not among those of this model: {name}")
    if len(findings.faults) > faults:
        return None
    numbers = {key: config[key] for key in FLOW_KEYS if config.get(key) is not None}
    schedule = NoiseSchedule(**numbers, patch_size=patch_size)
    cells = [{"name": name, "spacings": [spacing], "sigma_schedules": ["default"]}]
    default = {"name": name, "spacing": spacing, "sigma_schedule": "default", "eta": 0.0}
    most = min(max(MAX_STEPS, num_steps or 0), schedule.num_train_timesteps)
    return SamplerOffer(schedule, "flow", cells, default, most)


def _servable(class_name: str, key: str, value: Any) -> tuple[Any, ...]:
    """The values of a key that can be served; `value` itself where any can."""
    if key not in REFUSED or (key in _DISTILLED and class_name != "LCMScheduler"):
        return (value,)
    return REFUSED[key][0]


def _noise_schedule(known: SchedulerClass, config: Config, mends: bool) -> NoiseSchedule:
    kind, start, end = known.betas
    zero = "rescale_betas_zero_snr" in known.keys and bool(config.get("rescale_betas_zero_snr", False))
    # of another class too, as `from_config` keeps what a class does not know for the next one
    alpha = config.get("set_alpha_to_one", known.set_alpha_to_one)
    return NoiseSchedule(
        beta_schedule=str(config.get("beta_schedule", kind)),
        beta_start=float(config.get("beta_start", start)),
        beta_end=float(config.get("beta_end", end)),
        num_train_timesteps=int(config.get("num_train_timesteps", 1000)),
        rescale_zero_terminal_snr=zero,
        steps_offset=1 if mends else int(config.get("steps_offset", 0)),
        set_alpha_to_one=bool(alpha),
    )


def _cells(class_name: str, schedule: NoiseSchedule, prediction: str, most: int) -> list[dict[str, Any]]:
    """The samplers that work for 1 to `most` steps. Zero terminal SNR starts at the last timestep: trailing alone."""
    if class_name == "LCMScheduler":  # a distilled model draws with the sampler it was distilled for
        names: tuple[str, ...] = ("lcm",)
    elif schedule.rescale_zero_terminal_snr:
        names = ("ddim", "euler", "euler_ancestral", "dpmpp_2m")
    else:
        names = ("euler", "euler_ancestral", "ddim", "dpmpp_2m")
    found: list[dict[str, Any]] = []
    for name in names:
        offered = SAMPLERS[name]
        spacings = [one for one in SPACINGS if one in offered.spacings]
        sigmas = list(offered.sigma_schedules)
        if schedule.rescale_zero_terminal_snr:
            spacings, sigmas = [one for one in spacings if one == "trailing"], ["default"]
        spacings = [one for one in spacings if _works(SamplerSpec(name, one), schedule, prediction, most)]
        sigmas = [
            one
            for one in sigmas
            if all(_works(SamplerSpec(name, at, one), schedule, prediction, most) for at in spacings)
        ]
        if spacings and sigmas:
            found.append({"name": name, "spacings": spacings, "sigma_schedules": sigmas})
    return found


def _works(spec: SamplerSpec, schedule: NoiseSchedule, prediction: str, most: int) -> bool:
    return all(refusal(spec, schedule, prediction, steps) is None for steps in range(1, most + 1))


def _default(
    what: str, known: SchedulerClass, config: Config, cells: list[dict[str, Any]], wanted: str, findings: Findings
) -> dict[str, Any]:
    """The folder's own sampler where it is offered, else the nearest; every difference is a note."""
    names = [cell["name"] for cell in cells]
    target = wanted or known.sampler
    name = target if target in names else names[0]
    cell = cells[names.index(name)]
    if not known.same or name != known.sampler:
        findings.notes.append(f"{what} is not served: {name} is the default in its place")
    else:
        findings.notes += [
            f"{what}: {key} {config[key]!r} is not served: {name} has {values[0]!r}"
            for key, values in known.exactly.items()
            if key in config and config[key] not in values
        ]
    given = str(config.get("timestep_spacing", known.spacing)) if "timestep_spacing" in known.keys else known.spacing
    spacing = given if given in cell["spacings"] else cell["spacings"][0]
    if spacing != given and name != "lcm":  # LCM's timesteps are those of its distillation, whatever the spacing
        findings.notes.append(f"{what}: spacing {given} is not served: {name} starts with {spacing}")
    karras = "use_karras_sigmas" in known.keys and bool(config.get("use_karras_sigmas", False))
    if karras and "karras" not in cell["sigma_schedules"]:
        findings.notes.append(f"{what}: Karras sigmas are not served with {name}")
        karras = False
    return {"name": name, "spacing": spacing, "sigma_schedule": "karras" if karras else "default", "eta": 0.0}
