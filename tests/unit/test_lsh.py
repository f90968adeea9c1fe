"""The LSH index: matches have the requested cosine and scope; near vectors are found; memory is bounded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safelight_server.cache.approximate.lsh import MemoryBuckets, Shape, Signatures, SimilarIndex, matches

DIMENSION = 32
RNG = np.random.default_rng(5)


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def near(vector: np.ndarray, cosine: float, rng: np.random.Generator = RNG) -> np.ndarray:
    other = rng.standard_normal(vector.shape)
    other = unit(other - (other @ vector) * vector)
    return unit(cosine * vector + np.sqrt(1 - cosine**2) * other)


def index(store: MemoryBuckets | None = None, seed: int = 1, shape: Shape = Shape()) -> SimilarIndex:
    return SimilarIndex(Signatures(DIMENSION, seed, shape), MemoryBuckets(10_000) if store is None else store)


async def filled(count: int, **options: object) -> tuple[SimilarIndex, np.ndarray]:
    vectors = unit(RNG.standard_normal((count, DIMENSION)))
    made = index(**options)
    for number, vector in enumerate(vectors):
        await made.add("scope", str(number), vector)
    return made, vectors


def test_planes_are_a_function_of_the_seed():
    vector = unit(RNG.standard_normal(DIMENSION))
    first, again, other = (Signatures(DIMENSION, seed) for seed in (1, 1, 2))
    assert first.buckets("s", vector) == again.buckets("s", vector)
    assert not set(first.buckets("s", vector)) & set(other.buckets("s", vector))


def test_buckets_are_strings_of_their_scope_one_a_table():
    signatures, vector = Signatures(DIMENSION, 1, Shape(5, 12, 3)), unit(RNG.standard_normal(DIMENSION))
    buckets, probes = signatures.buckets("scope", vector), signatures.probes("scope", vector)
    assert len(set(buckets)) == 5
    assert len(set(probes)) == 5 * (1 + 3)
    assert probes[:5] == buckets
    assert all(probe.startswith("scope:") for probe in probes)
    assert not set(probes) & set(signatures.probes("other", vector))


def test_probes_cross_the_nearest_planes_first():
    signatures = Signatures(DIMENSION, 1, Shape(1, 16, 4))
    vector = unit(RNG.standard_normal(DIMENSION))
    margins = np.abs(signatures._planes @ vector)
    own, *others = (int(name.rsplit(":", 1)[1], 16) for name in signatures.probes("s", vector))
    crossed = [sum(margins[bit] ** 2 for bit in range(16) if (own ^ code) >> bit & 1) for code in others]
    assert crossed == sorted(crossed)
    pairs = [a**2 + b**2 for i, a in enumerate(margins) for b in margins[:i]]
    assert crossed == pytest.approx(sorted([*(margins**2), *pairs])[:4])


async def test_near_vectors_are_found_and_far_ones_are_not():
    made, vectors = await filled(500)
    found = 0
    for number, vector in enumerate(vectors[:200]):
        matches = await made.search("scope", near(vector, 0.96), 0.95)
        found += bool(matches) and matches[0].item == str(number)
    assert found >= 195


@given(seed=st.integers(0, 2**32), cosine=st.floats(0.3, 0.999), min_cosine=st.floats(0.3, 0.999))
@settings(max_examples=50, deadline=None)
async def test_nothing_below_the_cosine_asked_for_is_returned_whatever_the_buckets_say(seed, cosine, min_cosine):
    rng = np.random.default_rng(seed)
    vector = unit(rng.standard_normal(DIMENSION))
    made = index(shape=Shape(num_tables=16, num_bits=1, num_probes=1))
    await made.add("scope", "it", near(vector, cosine, rng))
    found = await made.search("scope", vector, min_cosine)
    stored = near(vector, cosine, np.random.default_rng(seed))
    assert [match.item for match in found] in ([], ["it"])
    for match in found:
        assert match.cosine >= min_cosine
        assert match.cosine == pytest.approx(cosine, abs=2e-3)
    if cosine > min_cosine + 2e-3:
        assert found, stored


async def test_scopes_never_meet():
    made, vectors = await filled(50)
    assert (await made.search("scope", vectors[0], 0.9))[0].item == "0"
    assert await made.search("other", vectors[0], 0.9) == []


async def test_planes_of_another_tenant_find_nothing_in_the_same_store():
    store = MemoryBuckets(100)
    vector = unit(RNG.standard_normal(DIMENSION))
    await index(store, seed=1).add("of one", "it", vector)
    assert await index(store, seed=1).search("of one", vector, 0.9)
    assert await index(store, seed=2).search("of other", vector, 0.9) == []


async def test_what_is_removed_or_replaced_is_found_no_more():
    made, vectors = await filled(20)
    await made.remove("3")
    assert await made.search("scope", vectors[3], 0.9) == []
    await made.add("scope", "4", vectors[3])
    assert [match.item for match in await made.search("scope", vectors[3], 0.9)] == ["4"]
    assert await made.search("scope", vectors[4], 0.9) == []
    await made.remove("unknown")


async def test_the_nearest_come_first_and_no_more_than_asked_for():
    vector = unit(RNG.standard_normal(DIMENSION))
    made = index()
    for number, cosine in enumerate((0.96, 0.99, 0.97, 0.98)):
        await made.add("scope", str(number), near(vector, cosine))
    found = await made.search("scope", vector, 0.9, limit=3)
    assert [match.item for match in found] == ["1", "3", "2"]


async def test_items_are_bounded_and_buckets_left_empty_are_gone():
    store = MemoryBuckets(100)
    made, vectors = await filled(300, store=store)
    assert len(store) == 100
    assert len(store._rows_by_dimension[DIMENSION].vectors) <= 2 * 100, "rows that are free are used again"
    assert await made.search("scope", vectors[0], 0.9) == []
    assert await made.search("scope", vectors[299], 0.9)
    for number in range(300):
        await made.remove(str(number))
    assert (len(store), len(store._buckets)) == (0, 0)


async def test_what_is_added_again_stays_longer():
    store = MemoryBuckets(100)
    made, vectors = await filled(100, store=store)
    await made.add("scope", "0", vectors[0])
    await made.add("scope", "new", -vectors[1])
    assert await made.search("scope", vectors[0], 0.9)
    assert await made.search("scope", vectors[1], 0.9) == []


async def test_a_full_bucket_drops_its_oldest_member():
    store = MemoryBuckets(1000, max_members=5)
    made, vector = index(store), unit(RNG.standard_normal(DIMENSION))
    for number in range(20):
        await made.add("scope", str(number), vector)
    assert all(len(members) <= 5 for members in store._buckets.values())
    found = await made.search("scope", vector, 0.9, limit=20)
    assert {match.item for match in found} == {"15", "16", "17", "18", "19"}


async def test_candidates_are_bounded():
    store = MemoryBuckets(1000)
    made = SimilarIndex(Signatures(DIMENSION, 1), store, max_candidates=3)
    vector = unit(RNG.standard_normal(DIMENSION))
    for number in range(10):
        await made.add("scope", str(number), vector)
    assert len(await made.search("scope", vector, 0.9, limit=100)) == 3


@given(
    steps=st.lists(st.tuples(st.integers(0, 5), st.sets(st.integers(0, 3)), st.sampled_from([4, 8])), max_size=40),
    limit=st.integers(1, 6),
)
@settings(deadline=None)
async def test_the_store_in_memory_does_what_sets_would_do(steps, limit):
    """Adds an item to buckets, replacing its old entries; without buckets removes it. Two dimensions; rows are reused."""
    store, model = MemoryBuckets(4), {}
    for number, (item, buckets, dimension) in enumerate(steps):
        model.pop(f"{item}", None)
        if not buckets:
            await store.remove(f"{item}")
            continue
        if len(model) == 4:
            del model[next(iter(model))]
        names, vector = [f"{dimension} {bucket}" for bucket in sorted(buckets)], np.full(dimension, number, np.float16)
        model[f"{item}"] = (set(names), vector)
        await store.add(f"{item}", names, vector)
    assert len(store) == len(model)
    for dimension in (4, 8):
        wanted = [f"{dimension} {bucket}" for bucket in range(4)]
        expected = {item: vector for item, (buckets, vector) in model.items() if buckets & set(wanted)}
        items, vectors = await store.find(wanted, limit, dimension)
        assert len(items) == len(set(items)) == len(vectors) == min(limit, len(expected))
        assert all((vector == expected[item]).all() for item, vector in zip(items, vectors, strict=True))
        first = [item for item in expected if wanted[0] in model[item][0]]
        assert set(items[: len(first)]) <= set(first), "of the first buckets first"


def test_identical_vectors_are_at_most_at_cosine_one():
    vector = unit(RNG.standard_normal(DIMENSION))
    (match,) = matches(["it"], vector.astype(np.float16)[None], vector, 0.99, 1)
    assert 0.999 < match.cosine <= 1.0
