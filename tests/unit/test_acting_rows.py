"""The rows of a call that bring adapters, which alone are given to torch."""

from __future__ import annotations

import numpy as np
from safelight_server.runtime.acting_rows import ADAPTER_ROWS, of_acting_rows
from safelight_server.runtime.base import StableRows

SAMPLE = np.arange(4, dtype=np.float32)
WEIGHTS = np.arange(4 * 2 * 3, dtype=np.float32).reshape(4, 2, 3)
SCALES = np.array([[0, 0], [0.8, 0], [0, 0], [-1, 2]], np.float32)
READ: list[list[int]] = []


def read(at: np.ndarray) -> np.ndarray:
    READ.append(at.tolist())
    return WEIGHTS[at]


STABLE = StableRows(WEIGHTS.shape[1:], np.array([0, 7, 0, 9]), read)


def test_only_the_adapters_of_rows_that_bring_one_are_given_with_their_places():
    found = of_acting_rows({"sample": SAMPLE, "adapter_weights": WEIGHTS, "adapter_scales": SCALES})
    assert found["sample"] is SAMPLE
    assert found[ADAPTER_ROWS].tolist() == [1, 3]
    assert np.array_equal(found["adapter_weights"], WEIGHTS[[1, 3]])
    assert np.array_equal(found["adapter_scales"], SCALES[[1, 3]])


def test_weights_of_other_rows_are_not_read():
    READ.clear()
    found = of_acting_rows({"adapter_weights": STABLE, "adapter_scales": SCALES})["adapter_weights"]
    assert found.versions.tolist() == [7, 9]
    assert np.array_equal(found.array(), WEIGHTS[[1, 3]])
    assert np.array_equal(found.take(np.array([1])), WEIGHTS[[3]])
    assert READ == [[1, 3], [3]]


def test_a_call_without_adapters_is_given_nothing_of_them():
    READ.clear()
    given = {"sample": SAMPLE, "adapter_weights": STABLE, "adapter_scales": np.zeros_like(SCALES)}
    assert of_acting_rows(given) == {"sample": SAMPLE}
    assert not READ
    plain = {"sample": SAMPLE}
    assert of_acting_rows(plain) is plain
