"""Samplers: the numerics that turn a noise prediction into the next latent. Pure numpy.

`schedule.py` places the steps, `formulas.py` has each sampler's columns,
`cells.py` what can be combined, `table.py` compiles a sampler to scalars,
`step.py` applies them to a batch.
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
