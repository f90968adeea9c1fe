"""Shared memory regions and their pool, with a fake registrar that records calls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safelight_server.domain.component import Component
from safelight_server.runtime.base import StableRows
from safelight_server.runtime.triton.client import CallFailed, Trouble
from safelight_server.runtime.triton.models import ServedModel, Tensor, most_rows, weight_bytes
from safelight_server.runtime.triton.shared_memory import RegionPool, layout, place
from safelight_server.runtime.verification import InputSpec

KEY = (("m", Component.DENOISER), ())
ROWS = 4
TENSORS = [
    Tensor("sample", (2, 2), (2, 2), "FP32", np.float32),
    Tensor("timestep", (1,), (), "FP32", np.float32),
    Tensor("context", (3,), (3,), "FP32", np.float32),
    Tensor("prediction", (2, 2), (2, 2), "FP32", np.float32),
]


class Registrar:
    """Records calls; refuses them when the test says so."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[str, int]] = {}
        self.refuses = False

    async def register(self, name: str, key: str, num_bytes: int, timeout_s: float) -> None:
        if self.refuses:
            raise CallFailed(Trouble.DEAD, "gone")
        self.known[name] = (key, num_bytes)

    async def unregister(self, name: str, timeout_s: float) -> None:
        del self.known[name]


@pytest.fixture
async def pool():
    made = RegionPool(Registrar(), max_quarantined=2, timeout_s=1.0)
    yield made
    await made.close()


def files(pool: RegionPool) -> set[str]:
    return {file.name for file in Path("/dev/shm").glob(f"{pool._prefix}-*")}


def inputs(versions, fill=1.0):
    rows = len(versions)
    context = np.array(versions, np.float32)[:, None] * np.ones((1, 3), np.float32)
    return {
        "sample": np.full((rows, 2, 2), fill, np.float32),
        "timestep": np.arange(rows, dtype=np.float32),
        "context": StableRows((3,), np.array(versions), lambda at: context[at]),
    }


async def test_a_region_is_made_and_registered_once(pool):
    first = await pool.take(KEY, TENSORS, ROWS)
    pool.give_back(first)
    assert await pool.take(KEY, TENSORS, ROWS) is first
    second = await pool.take(KEY, TENSORS, ROWS)
    assert second is not first
    assert set(pool._registrar.known) == files(pool) == {first.name, second.name}
    assert pool._registrar.known[first.name] == (f"/{first.name}", first.num_bytes)


async def test_a_region_in_quarantine_is_not_used_until_its_call_is_answered(pool):
    region = await pool.take(KEY, TENSORS, ROWS)
    pool.quarantine(region)
    other = await pool.take(KEY, TENSORS, ROWS)
    assert other is not region
    pool.give_back(region)
    assert await pool.take(KEY, TENSORS, ROWS) is region


async def test_with_too_many_in_quarantine_no_more_memory_is_given(pool):
    for _ in range(2):
        pool.quarantine(await pool.take(KEY, TENSORS, ROWS))
    assert await pool.take(KEY, TENSORS, ROWS) is None


async def test_what_a_restarted_server_has_forgotten_goes_for_good(pool):
    idle, busy, lost = [await pool.take(KEY, TENSORS, ROWS) for _ in range(3)]
    pool.give_back(idle)
    pool.quarantine(lost)
    pool.known(set())
    assert files(pool) == {busy.name}
    pool.give_back(busy)
    assert not files(pool)
    assert (await pool.take(KEY, TENSORS, ROWS)).name not in {idle.name, busy.name, lost.name}


async def test_what_the_same_server_still_knows_stays_in_quarantine(pool):
    lost = await pool.take(KEY, TENSORS, ROWS)
    pool.quarantine(lost)
    pool.known({lost.name})
    assert pool.num_quarantined == 1
    assert await pool.take(KEY, TENSORS, ROWS) is not lost


async def test_nothing_is_left_of_a_region_that_could_not_be_registered(pool):
    pool._registrar.refuses = True
    with pytest.raises(CallFailed):
        await pool.take(KEY, TENSORS, ROWS)
    assert not files(pool)
    assert pool.num_regions == 0


async def test_close_unlinks_all_and_unregisters_only_what_no_call_can_write():
    pool = RegionPool(Registrar(), max_quarantined=2, timeout_s=1.0)
    idle, lost = [await pool.take(KEY, TENSORS, ROWS) for _ in range(2)]
    pool.give_back(idle)
    pool.quarantine(lost)
    await pool.close()
    assert not files(pool)
    assert set(pool._registrar.known) == {lost.name}


async def test_rows_keep_their_places_and_only_new_context_is_copied(pool):
    region = await pool.take(KEY, TENSORS, ROWS)
    assert region.write(inputs([11, 12, 13])).tolist() == [0, 1, 2]
    region._views["context"][:] += 0.5  # marks the present data: a new copy would remove the mark
    places = region.write(inputs([13, 21, 11], fill=2.0))
    assert places.tolist() == [2, 1, 0]
    assert region._views["context"][:3, 0].tolist() == [11.5, 21.0, 13.5]
    assert region._views["timestep"][places, 0].tolist() == [0.0, 1.0, 2.0]
    region._views["prediction"][:3] = region._views["context"][:3, :1, None]
    assert region.read("prediction", places)[:, 0, 0].tolist() == [13.5, 21.0, 11.5]


async def test_rows_of_zeros_are_written_only_where_something_else_was(pool):
    region, taken = await pool.take(KEY, TENSORS, ROWS), []

    def take(at):
        taken.extend(at.tolist())
        return np.zeros((len(at), 3), np.float32)

    def plain(*versions):
        return inputs(versions) | {"context": StableRows((3,), np.array(versions), take)}

    region.write(plain(0, 0))
    assert not taken
    region.write(inputs([7, 8, 9]))
    region.write(plain(0, 8, 0))
    assert taken == [0, 2]
    assert region._views["context"][:3, 0].tolist() == [0, 8, 0]


async def test_zeros_are_written_where_rows_without_a_version_were(pool):
    """Such rows are those that a model is tried with at the start."""
    region = await pool.take(KEY, TENSORS, ROWS)
    region.write(inputs([1, 2]) | {"context": np.full((2, 3), 7.0, np.float32)})
    region.write(inputs([0, 0]))
    assert not region._views["context"][:2].any()


async def test_results_are_copies(pool):
    region = await pool.take(KEY, TENSORS, ROWS)
    places = region.write(inputs([1]))
    results = region.read("prediction", places)
    region._views["prediction"][:] = 7.0
    assert not results.any()


@given(st.lists(st.integers(0, 9), min_size=8, max_size=8), st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_places_are_distinct_and_kept_wherever_that_is_possible(held, wanted):
    places = place(np.array(held), np.array(wanted))
    assert sorted(places.tolist()) == list(range(len(wanted)))
    kept = sum(held[at] == version for at, version in zip(places.tolist(), wanted, strict=True))
    assert kept >= len(set(held[: len(wanted)]) & set(wanted))


def test_a_size_that_is_not_known_beforehand_has_no_layout_before_a_call_at_it():
    free = Tensor("x", (2, -1), (2, -1), "FP32", np.float32)
    result = replace(free, name="y")
    model = ServedModel(4, {"x": free, "context": TENSORS[2]}, {"y": result})
    assert layout(model) is None
    context = StableRows((3,), np.array([1]), lambda at: np.ones((len(at), 3), np.float32))
    given = {"context": context, "x": np.zeros((1, 2, 5), np.float32)}
    assert model.shapes(given) == ((2, 5),)
    sized = model.sized(given, {"y": np.zeros((1, 2, 7), np.float32)})
    assert [tensor.dims for tensor in layout(sized)] == [(2, 5), (3,), (2, 7)]
    stable = StableRows((2, 6), np.array([1]), lambda at: np.ones((len(at), 2, 6), np.float32))
    assert model.shapes({"x": stable, "context": context}) == ((2, 6),)
    closed = ServedModel(4, {"a": TENSORS[0]}, {"b": TENSORS[1]})
    assert layout(closed) == TENSORS[:2]
    assert closed.shapes({"a": np.zeros((1, 2, 2), np.float32)}) == ()


def test_no_batch_is_larger_than_a_message_of_grpc():
    def sizes(*edges):
        return [[InputSpec("images", (2, 3, edge, edge)), InputSpec("ids", (77,), True)] for edge in edges]

    assert most_rows(sizes(64, 128), 64) == 64
    assert most_rows(sizes(512, 2048), 64) == (2 << 30) // (4 * 2 * 3 * 2048**2 + 8 * 77)
    assert most_rows(sizes(16384), 64) == 1, "the server tells what is wrong with it"


def test_weights_beside_the_network_count_for_its_size(tmp_path):
    """Else gigabytes of them would be loaded into the gateway, to compare bits."""
    for name, num_bytes in (("a/model.onnx", 3), ("b/model.onnx", 5), ("b/model.onnx.data", 100)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(num_bytes))
    assert weight_bytes([tmp_path / "a" / "model.onnx", tmp_path / "b" / "model.onnx"]) == 108


async def test_a_region_that_is_in_use_for_a_moment_is_unregistered_after_it(monkeypatch):
    """As Triton answers for a moment after the answer of a call; the other regions go at once."""
    registrar = Registrar()
    pool = RegionPool(registrar, max_quarantined=2, timeout_s=1.0)
    first, second = [await pool.take(KEY, TENSORS, ROWS) for _ in range(2)]
    for region in (first, second):
        pool.give_back(region)
    unregister, refusals = registrar.unregister, [first.name, first.name]

    async def in_use(name: str, timeout_s: float) -> None:
        if name in refusals:
            refusals.remove(name)
            raise CallFailed(Trouble.FAILED, "it is currently in use")
        await unregister(name, timeout_s)

    monkeypatch.setattr(registrar, "unregister", in_use)
    await pool.close()
    assert not registrar.known
    assert not refusals


async def test_a_server_that_has_gone_is_not_asked_again(monkeypatch):
    registrar, asked = Registrar(), []
    pool = RegionPool(registrar, max_quarantined=2, timeout_s=1.0)
    regions = [await pool.take(KEY, TENSORS, ROWS) for _ in range(2)]
    for region in regions:
        pool.give_back(region)

    async def gone(name: str, timeout_s: float) -> None:
        asked.append(name)
        raise CallFailed(Trouble.DEAD, "gone")

    monkeypatch.setattr(registrar, "unregister", gone)
    await pool.close()
    assert len(asked) == 1
