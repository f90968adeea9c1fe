"""Samplers without torch: golden trajectories of diffusers, noise vectors, and properties of any batch."""

from __future__ import annotations

import itertools
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
    guided_steps,
    refusal,
    rescale,
    supported_cells,
)

GOLDEN = Path(__file__).parent.parent / "golden"
with np.load(GOLDEN / "samplers.npz") as _arrays:
    GOLDENS = dict(_arrays)
SHAPE = (2, 3, 3)


def bits(array: np.ndarray) -> list[int]:
    """What distinguishes 0.0 from -0.0 as well."""
    return array.view(np.int32).tolist()


@pytest.mark.parametrize("case", sorted({name.rpartition("/")[0] for name in GOLDENS}))
def test_trajectories_are_those_of_diffusers(case):
    name, prediction, spacing, sigmas, zero_snr, steps, eta = case.split("/")
    schedule = NoiseSchedule(rescale_zero_terminal_snr=zero_snr == "True", steps_offset=1)
    table = compile_table(SamplerSpec(name, spacing, sigmas, float(eta)), schedule, prediction, int(steps))
    np.testing.assert_allclose(table.timesteps, GOLDENS[f"{case}/timesteps"], rtol=5e-5, atol=5e-5)
    start = np.float32(table.init_scale) * gaussian(5, 0, 0, SHAPE)[None]
    whole, their_previous = (start, np.zeros_like(start)), np.zeros_like(start)
    theirs = start
    for step, expected in enumerate(GOLDENS[f"{case}/latents"]):
        output, noise, row = gaussian(6, 1, step, SHAPE)[None], gaussian(5, 1, step, SHAPE)[None], [step]
        one, their_previous = advance(theirs, output, their_previous, noise, table.coefficients[row])
        high = table.in_scale[step] < 1e-3  # leaving a sigma above 1000
        assert np.abs(one[0] - expected).max() <= (1e-3 if high else 1e-5) * np.abs(expected).max()
        whole = advance(whole[0], output, whole[1], noise if table.uses_noise else None, table.coefficients[row])
        assert np.abs(whole[0][0] - expected).max() <= (1e-3 if high else 2e-4) * np.abs(expected).max()
        theirs = expected[None]


def test_the_table_of_cells_is_the_agreed_one():
    """`python -m training.golden_samplers` rewrites it: review the difference."""
    cells = supported_cells()
    lines = [f"{' '.join(map(str, cell)):62} {why or 'offered'}" for cell, why in cells.items()]
    agreed = (GOLDEN / "sampler_cells.txt").read_text().splitlines()
    assert lines == agreed


def test_noise_is_fixed_by_its_arguments():
    for vector in json.loads((GOLDEN / "noise.json").read_text()):
        noise = gaussian(vector["seed"], vector["stream"], vector["step"], (4,))
        assert noise.tolist() == vector["values"]
    longer = gaussian(7, 1, 3, (3, 5, 5))
    assert np.array_equal(longer, gaussian(7, 1, 3, (3, 5, 5)))
    assert not np.array_equal(longer, gaussian(7, 1, 4, (3, 5, 5)))


@given(rows=st.integers(1, 9), seed=st.integers(0, 2**32), place=st.integers(0, 8), order=st.randoms())
@settings(max_examples=80, deadline=None)
def test_a_row_has_the_same_bits_in_any_batch_at_any_place(rows, seed, place, order):
    rng = np.random.default_rng(seed)
    x, p, previous, noise = (rng.standard_normal((rows, *SHAPE), dtype=np.float32) for _ in range(4))
    coefficients = rng.standard_normal((rows, 6)).astype(np.float32)
    coefficients[rng.random((rows, 6)) < 0.3] = 0
    for array in (x, p, previous):
        array[rng.random(array.shape) < 0.2] = rng.choice(np.array([0.0, -0.0], np.float32))
    row = place % rows
    batch = advance(x, p, previous, noise, coefficients)
    one = slice(row, row + 1)
    own_noise = noise[one] if coefficients[row, 3] else None
    alone = advance(x[one], p[one], previous[one], own_noise, coefficients[one])
    for whole, single in zip(batch, alone, strict=True):
        assert whole.dtype == np.float32
        assert bits(whole[one]) == bits(single)
    places = order.sample(range(rows), rows)
    shuffled = advance(x[places], p[places], previous[places], noise[places], coefficients[places])
    for whole, other in zip(batch, shuffled, strict=True):
        assert bits(whole[places]) == bits(other)
    scale = rng.uniform(1, 9, rows).astype(np.float32)
    guided = guide(x, p, scale)
    assert bits(guided[one]) == bits(guide(x[one], p[one], scale[one]))
    assert bits(guided[places]) == bits(guide(x[places], p[places], scale[places]))
    share = (rng.random(rows) * (rng.random(rows) < 0.7)).astype(np.float32)
    rescaled = rescale(guided, x, share)
    assert bits(rescaled[one]) == bits(rescale(guided[one], x[one], share[one]))
    assert bits(rescaled[places]) == bits(rescale(guided[places], x[places], share[places]))


def test_rescale_gives_a_row_the_contrast_of_its_conditional_prediction():
    rng = np.random.default_rng(1)
    cond, uncond = rng.standard_normal((2, 3, *SHAPE), dtype=np.float32)
    guided = guide(cond, uncond, np.full(3, 7, np.float32))
    rescaled = rescale(guided, cond, np.array([0, 0.5, 1], np.float32))
    wanted, found = cond.std(axis=(1, 2, 3)), guided.std(axis=(1, 2, 3))
    assert bits(rescaled[0]) == bits(guided[0])
    assert rescaled[1].std() == pytest.approx((wanted[1] + found[1]) / 2, rel=1e-5)
    assert rescaled[2].std() == pytest.approx(wanted[2], rel=1e-5)


def test_a_prediction_without_contrast_is_left_as_it_is():
    flat = np.full((1, *SHAPE), 0.25, np.float32)
    assert bits(rescale(flat, np.zeros_like(flat), np.ones(1, np.float32))) == bits(flat)


@pytest.mark.parametrize(
    ("num_steps", "start", "end", "steps"),
    [(10, 0.2, 0.8, range(2, 8)), (10, 0.7, 1.0, range(7, 10)), (3, 0.34, 0.66, range(1, 1)), (1, 0.0, 1.0, range(1))],
)
def test_a_guidance_interval_is_counted_in_whole_steps(num_steps, start, end, steps):
    assert guided_steps(num_steps, start, end) == steps


def test_no_sign_of_zero_tells_of_other_rows():
    zero = np.full((1, *SHAPE), -0.0, np.float32)
    coefficients = np.array([[1, 1, 1, 0, 1, 1]], np.float32)
    alone, _ = advance(zero, zero, zero, None, coefficients)
    beside_noise, _ = advance(zero, zero, zero, -np.ones_like(zero), coefficients)
    assert bits(alone) == bits(beside_noise) == bits(np.zeros_like(zero))


@given(seed=st.integers(0, 2**32), factor=st.floats(-4, 4))
@settings(max_examples=60, deadline=None)
def test_a_step_is_linear_in_what_it_is_given(seed, factor):
    rng = np.random.default_rng(seed)
    first, second = (rng.standard_normal((4, 3, *SHAPE)).astype(np.float32) for _ in range(2))
    coefficients = rng.standard_normal((3, 6)).astype(np.float32)
    together = advance(*(first + np.float32(factor) * second), coefficients)
    for both, a, b in zip(together, advance(*first, coefficients), advance(*second, coefficients), strict=True):
        np.testing.assert_allclose(both, a + np.float32(factor) * b, atol=2e-4)
    for given_back, one in zip(first[:2], (0, 1), strict=True):  # each column multiplies what it is named for
        columns = np.zeros((3, 6), np.float32)
        columns[:, [one, 4 + one]] = 1
        assert np.array_equal(advance(*first, columns)[0], given_back)
        assert np.array_equal(advance(*first, columns)[1], given_back)


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
    assert "62 steps" in refusal(SamplerSpec("euler", "trailing"), zero, "epsilon", 61)
    assert "464 steps" in refusal(SamplerSpec("ddim", "trailing"), zero, "v_prediction", 463)
    late = NoiseSchedule(steps_offset=1)
    assert "past the last" in refusal(SamplerSpec("ddim", "leading"), late, "epsilon", 1000)
    assert "trained on 1000" in refusal(SamplerSpec("ddim", "leading"), late, "epsilon", 1001)
    for eta in (-0.1, 1.1, float("nan")):
        assert "eta" in refusal(SamplerSpec("ddim", "trailing", eta=eta), zero, "v_prediction", 20)
    assert "unknown sampler" in refusal(SamplerSpec("heun"), zero, "v_prediction", 20)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_every_eta_from_0_to_1_is_offered_where_eta_0_is(prediction, zero_snr):
    schedule = NoiseSchedule(rescale_zero_terminal_snr=zero_snr)
    for spacing, steps in itertools.product(["leading", "trailing", "linspace"], range(1, 51)):
        plain = refusal(SamplerSpec("ddim", spacing), schedule, prediction, steps)
        for eta in (1e-9, 0.5, 0.999999, 1.0):
            assert refusal(SamplerSpec("ddim", spacing, eta=eta), schedule, prediction, steps) == plain


def test_from_pure_noise_ddim_with_eta_1_draws_all_noise_afresh():
    zero = NoiseSchedule(rescale_zero_terminal_snr=True)
    table = compile_table(SamplerSpec("ddim", "trailing", eta=1.0), zero, "v_prediction", 20)
    a, b, _, d, e, f = table.coefficients[0]
    assert (e, f) == (0, -1)  # the signal is zero: denoised is -p alone
    assert a == 0
    assert np.isclose(b**2 + d**2, 1), "x_next = sqrt(bar) denoised + sqrt(1 - bar) noise"


def test_a_compiled_table_is_shared_and_cannot_be_written():
    table = compile_table(SamplerSpec("euler"), NoiseSchedule(), "epsilon", 4)
    assert table is compile_table(SamplerSpec("euler"), NoiseSchedule(), "epsilon", 4)
    for array in (table.timesteps, table.in_scale, table.coefficients):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


FLOW = json.loads((GOLDEN / "flow_timesteps.json").read_text())


@pytest.mark.parametrize("case", FLOW, ids=lambda case: f"{case['spacing']}-{case['size']}-{len(case['timesteps'])}")
def test_the_steps_of_flow_matching_are_where_diffusers_places_them(case):
    """`python -m training.golden_samplers` writes them."""
    schedule, timesteps = NoiseSchedule(**case["schedule"]), np.array(case["timesteps"])
    spec = SamplerSpec("flow_match_euler", case["spacing"])
    table = compile_table(spec, schedule.at(*case["size"]), "flow", len(timesteps))
    np.testing.assert_allclose(table.timesteps, timesteps, rtol=2e-6)
    sigmas = np.append(timesteps / 1000, 0)
    np.testing.assert_allclose(table.coefficients[:, 1], np.diff(sigmas), atol=2e-6)
    np.testing.assert_allclose(table.levels, np.stack([1 - sigmas, sigmas], axis=1), atol=2e-6)
    assert (table.init_scale, set(table.in_scale), set(table.coefficients[:, 0])) == (1, {1}, {1})


def test_larger_pictures_are_given_more_noise_where_the_shift_goes_by_their_size():
    schedule = NoiseSchedule(shift=3.0, use_dynamic_shifting=True)
    small, large = (
        compile_table(SamplerSpec("flow_match_euler"), schedule.at(*size), "flow", 4) for size in ((32, 32), (128, 128))
    )
    assert (large.timesteps[1:] > small.timesteps[1:] + 50).all()
    assert NoiseSchedule(shift=3.0).at(32, 32).shift == 3.0
