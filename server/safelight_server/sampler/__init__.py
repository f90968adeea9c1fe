"""Samplers: the numerics that turn a noise prediction into the next latent. Pure numpy.

`schedule.py` places the steps, `table.py` compiles a sampler to scalars,
`step.py` applies them to a batch.
"""

from safelight_server.sampler.schedule import NoiseSchedule
from safelight_server.sampler.step import advance, gaussian, guide
from safelight_server.sampler.table import (
    SAMPLERS,
    VERSION,
    SamplerSpec,
    SamplerTable,
    UnsupportedSamplerError,
    compile_table,
    refusal,
)

__all__ = [
    "SAMPLERS",
    "VERSION",
    "NoiseSchedule",
    "SamplerSpec",
    "SamplerTable",
    "UnsupportedSamplerError",
    "advance",
    "compile_table",
    "gaussian",
    "guide",
    "refusal",
]
