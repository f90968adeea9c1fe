"""Samplers without torch: golden trajectories of diffusers, noise vectors, and what must hold for any batch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safelight_server.sampler import (
    SAMPLERS,
    NoiseSchedule,
    SamplerSpec,
    UnsupportedSamplerError,
    advance,
    compile_table,
    gaussian,
    guide,
    refusal,
)

GOLDEN = Path(__file__).parent.parent / "golden"
with np.load(GOLDEN / "samplers.npz") as _arrays:
    TRAJECTORIES = dict(_arrays)
SHAPE = (2, 3, 3)


@pytest.mark.parametrize("case", sorted(TRAJECTORIES))
def test_trajectories_are_those_of_diffusers(case):
    name, prediction, spacing, sigmas, zero_snr, steps = case.split("/")
    schedule = NoiseSchedule(rescale_zero_terminal_snr=zero_snr == "True", steps_offset=1)
    table = compile_table(SamplerSpec(name, spacing, sigmas), schedule, prediction, int(steps))
    x = np.float32(table.init_scale) * gaussian(5, 0, 0, SHAPE)[None]
    denoised = np.zeros_like(x)
    for step, expected in enumerate(TRAJECTORIES[case]):
        output = gaussian(6, 1, step, SHAPE)[None]
        x, denoised = advance(x, output, denoised, None, table.coefficients[step][None])
        assert np.abs(x[0] - expected).max() <= 2e-4 * np.abs(expected).max()


def test_noise_is_fixed_by_its_arguments():
    for vector in json.loads((GOLDEN / "noise.json").read_text()):
        noise = gaussian(vector["seed"], vector["stream"], vector["step"], (4,))
        assert noise.tolist() == vector["values"]
    longer = gaussian(7, 1, 3, (3, 5, 5))
    assert np.array_equal(longer, gaussian(7, 1, 3, (3, 5, 5)))
    assert not np.array_equal(longer, gaussian(7, 1, 4, (3, 5, 5)))


@given(rows=st.integers(1, 9), seed=st.integers(0, 2**32), place=st.integers(0, 8))
@settings(max_examples=60, deadline=None)
def test_a_row_has_the_same_bits_in_any_batch_at_any_place(rows, seed, place):
    rng = np.random.default_rng(seed)
    x, p, previous, noise = (rng.standard_normal((rows, *SHAPE), dtype=np.float32) for _ in range(4))
    coefficients = rng.standard_normal((rows, 6)).astype(np.float32)
    row = place % rows
    batch = advance(x, p, previous, noise, coefficients)
    one = slice(row, row + 1)
    alone = advance(x[one], p[one], previous[one], noise[one], coefficients[one])
    for whole, single in zip(batch, alone, strict=True):
        assert np.array_equal(whole[one], single)
    scale = rng.uniform(1, 9, rows).astype(np.float32)
    assert np.array_equal(guide(x, p, scale)[one], guide(x[one], p[one], scale[one]))


@given(
    name=st.sampled_from(sorted(SAMPLERS)),
    prediction=st.sampled_from(["epsilon", "v_prediction", "sample", "flow"]),
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    sigmas=st.sampled_from(["default", "karras"]),
    zero_snr=st.booleans(),
    steps=st.integers(1, 50),
    eta=st.floats(0, 1),
)
@settings(max_examples=300, deadline=None)
def test_what_is_not_refused_is_finite_and_ends_clean(name, prediction, spacing, sigmas, zero_snr, steps, eta):
    spec = SamplerSpec(name, spacing, sigmas, eta)
    schedule = NoiseSchedule(rescale_zero_terminal_snr=zero_snr, steps_offset=1)
    why = refusal(spec, schedule, prediction, steps)
    if why is not None:
        assert why
        with pytest.raises(UnsupportedSamplerError):
            compile_table(spec, schedule, prediction, steps)
        return
    table = compile_table(spec, schedule, prediction, steps)
    assert table.num_steps == steps
    assert np.isfinite(table.coefficients).all()
    assert np.isfinite(table.timesteps).all()
    assert (np.diff(table.timesteps) <= 0).all()
    if name != "ddim":
        a, b, c, d, e, f = table.coefficients[-1]
        assert np.allclose([a, b, c, d], [e, f, 0, 0], atol=1e-5), "the last step ends at the denoised estimate"


def test_refused_cells_say_why():
    zero = NoiseSchedule(rescale_zero_terminal_snr=True)
    assert "zero" in refusal(SamplerSpec("ddim", "trailing"), zero, "epsilon", 20)
    assert "zero" in refusal(SamplerSpec("lcm"), zero, "epsilon", 4)
    assert "fall on one timestep" in refusal(SamplerSpec("dpmpp_2m", "trailing", "karras"), zero, "v_prediction", 30)
    assert "no sigma schedule" in refusal(SamplerSpec("ddim", "trailing", "karras"), zero, "v_prediction", 20)
    assert "unknown sampler" in refusal(SamplerSpec("heun"), zero, "v_prediction", 20)
