"""Neighbours at low cosine are found by short codes, ranked by the exact cosine, and removed when required."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safelight_server.cache.approximate.index import SketchIndex

from tests.unit.test_lsh import DIMENSION, RNG, near, unit


def index(max_items: int = 10_000, **options: int) -> SketchIndex:
    return SketchIndex(DIMENSION, 1, max_items=max_items, **options)


def filled(count: int, **options: int) -> tuple[SketchIndex, np.ndarray]:
    made, vectors = index(**options), unit(RNG.standard_normal((count, DIMENSION)))
    for number, vector in enumerate(vectors):
        made.add("scope", str(number), vector)
    return made, vectors


def test_one_thread_searches():
    assert faiss.omp_get_max_threads() == 1


def test_neighbours_at_low_cosine_are_found_among_many():
    made, vectors = filled(3000, num_ranked=64)
    found = [made.search("scope", near(vector, 0.8), 0.7) for vector in vectors[:100]]
    assert sum(bool(matches) and matches[0].item == str(number) for number, matches in enumerate(found)) >= 97


def test_cosines_are_exact_and_fall():
    made, vectors = filled(1000, num_ranked=128)
    query = near(vectors[7], 0.9)
    found = made.search("scope", query, 0.2, limit=10)
    cosines = [match.cosine for match in found]
    assert cosines == sorted(cosines, reverse=True)
    assert cosines[0] == pytest.approx(0.9, abs=1e-3)
    assert cosines == pytest.approx([float(vectors[int(match.item)] @ query) for match in found], abs=1e-3)
    assert min(cosines) >= 0.2


def test_scopes_never_meet_and_go_when_empty():
    made, vectors = filled(10)
    assert made.search("other", vectors[0], -1) == []
    made.add("other", "it", vectors[0])
    assert [match.item for match in made.search("other", vectors[0], -1)] == ["it"]
    made.remove("it")
    assert list(made._rows_by_scope) == ["scope"]


def test_the_oldest_goes_and_is_named_and_what_was_found_stays():
    made, vectors = filled(5, max_items=5)
    assert made.search("scope", vectors[0], 0.99)
    assert made.add("scope", "new", -vectors[0]) == ["1"]
    assert "0" in made and "1" not in made
    assert len(made) == 5


def test_a_row_that_is_used_again_has_the_code_of_its_new_item():
    made, vectors = filled(200, num_ranked=4)
    for number in range(100):
        made.remove(str(number))
        made.add("scope", f"new {number}", -vectors[number])
    for number in range(100):
        assert made.search("scope", -vectors[number], 0.99)[0].item == f"new {number}"


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_comes_and_goes_a_search_finds_what_is_there(data):
    """Compares with a dict; rows are reused, and their codes must be updated."""
    made = index(max_items=30, num_ranked=4)
    there: dict[str, np.ndarray] = {}
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    for _ in range(data.draw(st.integers(0, 60))):
        item = str(data.draw(st.integers(0, 40)))
        if data.draw(st.booleans()):
            vector = unit(rng.standard_normal(DIMENSION))
            there.pop(item, None)
            there[item] = vector
            for gone in made.add("scope", item, vector):
                del there[gone]
        else:
            made.remove(item)
            there.pop(item, None)
        assert len(made) == len(there) <= 30
    for item, vector in there.items():
        assert made.search("scope", vector, 0.99, limit=1)[0].item == item
