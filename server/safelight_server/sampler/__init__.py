"""Samplers: the numerics that turn a noise prediction into the next latent. Pure numpy.

`schedule.py` has the noise schedules and the timesteps of the steps,
`formulas.py` each sampler's formula, `cells.py` the combinations that are
offered, `table.py` compiles a sampler to a table of scalars, and `step.py`
applies a row of the table to a batch.
"""

from safelight_server.sampler.cells import SAMPLERS
from safelight_server.sampler.schedule import NoiseSchedule, SamplerSpec
from safelight_server.sampler.step import (
    INITIAL,
    POSTERIOR,
    STEP,
    advance,
    gaussian,
    guide,
    keep_outside,
    noised,
    rescale,
)
from safelight_server.sampler.table import (
    VERSION,
    Cell,
    SamplerTable,
    UnsupportedSamplerError,
    compile_table,
    controlled_steps,
    guided_steps,
    refusal,
    steps_left_out,
    supported_cells,
)

__all__ = [
    "INITIAL",
    "POSTERIOR",
    "SAMPLERS",
    "STEP",
    "VERSION",
    "Cell",
    "NoiseSchedule",
    "SamplerSpec",
    "SamplerTable",
    "UnsupportedSamplerError",
    "advance",
    "compile_table",
    "controlled_steps",
    "gaussian",
    "guide",
    "guided_steps",
    "keep_outside",
    "noised",
    "refusal",
    "rescale",
    "steps_left_out",
    "supported_cells",
]
