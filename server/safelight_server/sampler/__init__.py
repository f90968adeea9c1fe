"""Samplers: the numerics that turn a noise prediction into the next latent. Pure numpy.

`schedule.py` has the noise schedules and the timesteps of the steps,
`formulas.py` each sampler's formula, `cells.py` the combinations that are
offered, `table.py` compiles a sampler to a table of scalars, and `step.py`
applies a row of the table to a batch.
"""

from safelight_server.sampler.cells import SAMPLERS
from safelight_server.sampler.schedule import NoiseSchedule, SamplerSpec
from safelight_server.sampler.step import advance, gaussian, guide
from safelight_server.sampler.table import (
    VERSION,
    Cell,
    SamplerTable,
    UnsupportedSamplerError,
    compile_table,
    refusal,
    supported_cells,
)

__all__ = [
    "SAMPLERS",
    "VERSION",
    "Cell",
    "NoiseSchedule",
    "SamplerSpec",
    "SamplerTable",
    "UnsupportedSamplerError",
    "advance",
    "compile_table",
    "gaussian",
    "guide",
    "refusal",
    "supported_cells",
]
