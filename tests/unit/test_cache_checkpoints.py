"""Checkpoints: which are kept, and that they are read back bit for bit."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safelight_server.cache.checkpoints import CheckpointError, CheckpointPolicy, Checkpoints, dump, num_bytes, parse
from safelight_server.engine.latents import Snapshot
from safelight_server.storage.purge import EntryOwner, PurgeScope, purge

from tests.unit.test_cache_tiers import KEYRING, Bench

SHAPE = (4, 2, 2)
OWNER = EntryOwner("acme/", KEYRING.tag("revision", "icons/1"), KEYRING.tag("generation", "generations/1"))


def snapshot(step: int) -> Snapshot:
    random = np.random.default_rng(step)
    x, denoised = random.standard_normal((2, *SHAPE), dtype=np.float32)
    return Snapshot(step, x, denoised)


def made(policy: CheckpointPolicy | None = None) -> tuple[Bench, Checkpoints]:
    bench = Bench()
    return bench, Checkpoints(bench.tiers, KEYRING, policy or CheckpointPolicy())


async def run(checkpoints: Checkpoints, num_steps: int, up_to: int | None = None) -> None:
    for step in range(1, (up_to or num_steps) + 1):
        if checkpoints.policy.is_due(step, num_steps) and checkpoints.holds:
            assert checkpoints.hold("acme", "e", snapshot(step), OWNER)
        elif checkpoints.policy.is_due(step, num_steps):
            assert await checkpoints.keep("acme", "e", snapshot(step), num_steps)


@given(st.integers(0, 2**32 - 1), hnp.array_shapes(min_dims=3, max_dims=3, max_side=8), st.data())
def test_bit_for_bit(step: int, shape: tuple[int, ...], data: st.DataObject) -> None:
    array = hnp.arrays(np.float32, shape, elements=st.floats(width=32))
    before = Snapshot(step, data.draw(array), data.draw(array))
    after = parse(dump(before))
    assert after.step == step
    assert after.x.tobytes() == before.x.tobytes()
    assert after.denoised.tobytes() == before.denoised.tobytes()
    assert after.x.shape == before.x.shape and after.x.flags.writeable


@given(st.binary(max_size=200))
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        parse(data)
    with pytest.raises(CheckpointError):
        parse(dump(snapshot(1)) + data[:1] + b"x")
    with pytest.raises(CheckpointError):
        parse(dump(snapshot(1))[: len(data)])


async def test_what_is_left_of_an_execution_is_counted_whoever_made_it() -> None:
    bench, checkpoints = made()
    await run(checkpoints, 20, up_to=7)
    other = Checkpoints(bench.tiers, KEYRING, CheckpointPolicy())  # the replica that took it over
    for step in range(8, 21):
        if other.policy.is_due(step, 20):
            await other.keep("acme", "e", snapshot(step), 20)
    await other.ended("acme", "e", 20, OWNER)
    left = [await other.at_or_before("acme", "e", step) for step in await other.steps("acme", "e")]
    assert sum(len(dump(each)) for each in left if each is not None) == other.policy.left_bytes(20, SHAPE)
    assert CheckpointPolicy(max_bytes=100).left_bytes(20, SHAPE) == 0, "what is too large is not kept"
    assert CheckpointPolicy().left_bytes(1, SHAPE) == 0, "there is no step between"


@given(st.integers(1, 60), st.integers(1, 10), st.data())
def test_while_it_runs_a_crash_costs_few_steps(num_steps: int, every: int, data: st.DataObject) -> None:
    policy = CheckpointPolicy(every_n_steps=every)
    kept: set[int] = set()
    reached = data.draw(st.integers(0, num_steps))
    for step in range(1, reached + 1):
        if policy.is_due(step, num_steps):
            kept.add(step)
            kept -= policy.useless(kept, num_steps, ended=False)
    assert reached - max(kept, default=0) <= every
    assert len(kept) <= len(policy.fractions) + 1
    assert policy.anchors(num_steps) & set(range(reached + 1)) <= kept
    assert kept - policy.useless(kept, num_steps, ended=True) == policy.anchors(num_steps) & kept


async def test_the_newest_and_the_one_at_or_before() -> None:
    _, checkpoints = made()
    await run(checkpoints, 20, up_to=16)
    assert await checkpoints.steps("acme", "e") == [2, 4, 6, 8, 10, 15]
    newest = await checkpoints.newest("acme", "e")
    assert newest is not None and newest.step == 15
    assert newest.x.tobytes() == snapshot(15).x.tobytes()
    for step, expected in ((1, None), (2, 2), (7, 6), (14, 10), (99, 15)):
        found = await checkpoints.at_or_before("acme", "e", step)
        assert (found.step if found else None) == expected


async def test_what_has_ended_keeps_only_where_others_may_start() -> None:
    bench, checkpoints = made()
    await run(checkpoints, 20)
    await checkpoints.ended("acme", "e", 20, OWNER)
    assert await checkpoints.steps("acme", "e") == [2, 4, 6, 8, 10]
    await bench.tiers.flush()
    assert len(bench.disk.values) == 6


async def test_another_replica_goes_on_from_the_newest() -> None:
    bench, checkpoints = made()
    for step in (5, 10):
        assert await checkpoints.keep("acme", "e", snapshot(step), 20, replicate=True)
    other = Bench()
    other.objects.values = bench.objects.values
    newest = await Checkpoints(other.tiers, KEYRING, CheckpointPolicy()).newest("acme", "e")
    assert newest is not None and newest.step == 10


async def test_one_who_looked_before_still_finds_the_newest() -> None:
    bench, checkpoints = made()
    other = Bench()
    other.objects.values = bench.objects.values
    follower = Checkpoints(other.tiers, KEYRING, CheckpointPolicy())
    for step in (5, 15):
        assert await checkpoints.keep("acme", "e", snapshot(step), 20, replicate=True)
        newest = await follower.newest("acme", "e")
        assert newest is not None and newest.step == step


async def test_one_that_is_not_replicated_costs_no_older_one() -> None:
    bench, checkpoints = made()
    assert await checkpoints.keep("acme", "e", snapshot(5), 20, replicate=True)
    bench.objects.fault = "unavailable"
    assert not await checkpoints.keep("acme", "e", snapshot(15), 20, replicate=True)
    bench.objects.fault = ""
    assert await checkpoints.steps("acme", "e") == [5, 15]


async def test_one_that_is_lost_is_passed_over() -> None:
    bench, checkpoints = made()
    await run(checkpoints, 20, up_to=15)
    await bench.tiers.delete(checkpoints._key("acme", "e", 15))
    newest = await checkpoints.newest("acme", "e")
    assert newest is not None and newest.step == 10


async def test_of_another_tenant_or_execution_there_is_none() -> None:
    _, checkpoints = made()
    await run(checkpoints, 20)
    assert await checkpoints.newest("initech", "e") is None
    assert await checkpoints.newest("acme", "f") is None


async def test_a_poisoned_or_huge_latent_is_not_kept() -> None:
    _, checkpoints = made(CheckpointPolicy(max_bytes=100))
    assert not await checkpoints.keep("acme", "e", snapshot(5), 20)
    _, checkpoints = made()
    poisoned = snapshot(5)
    poisoned.denoised[0, 0, 0] = np.nan
    assert not await checkpoints.keep("acme", "e", poisoned, 20)
    assert await checkpoints.newest("acme", "e") is None


async def test_deleting() -> None:
    bench, checkpoints = made()
    await run(checkpoints, 20)
    assert await checkpoints.delete("acme", "e")
    await bench.tiers.flush()
    assert not bench.disk.values
    assert await checkpoints.newest("acme", "e") is None


async def test_where_nobody_could_go_on_only_starts_are_kept_and_listed_at_the_end() -> None:
    bench, checkpoints = made(CheckpointPolicy(every_n_steps=0))
    await run(checkpoints, 20, up_to=16)
    assert await checkpoints.steps("acme", "e") == [2, 4, 6, 8, 10], "also of one that was cancelled there"
    found = await checkpoints.at_or_before("acme", "e", 7)
    assert found is not None and found.step == 6
    await bench.tiers.flush()
    assert not bench.disk.values and not await checkpoints.gone("acme", "e")
    await checkpoints.ended("acme", "e", 20, OWNER)
    assert not checkpoints._held and not checkpoints._held_bytes
    fresh = Checkpoints(bench.tiers, KEYRING, CheckpointPolicy())
    assert await fresh.steps("acme", "e") == [2, 4, 6, 8, 10]
    written = await fresh.at_or_before("acme", "e", 7)
    assert written is not None and written.x.tobytes() == found.x.tobytes()


async def test_what_is_held_is_bounded_and_the_oldest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safelight_server.cache.checkpoints.HELD_BYTES", 3 * num_bytes(SHAPE))
    _, checkpoints = made(CheckpointPolicy(every_n_steps=0))
    for execution, step in (("e", 2), ("f", 2), ("f", 4), ("e", 2)):
        checkpoints.hold("acme", execution, snapshot(step), OWNER)
    assert await checkpoints.steps("acme", "e") == [2]
    checkpoints.hold("acme", "g", snapshot(2), OWNER)
    assert [await checkpoints.steps("acme", name) for name in "efg"] == [[], [2, 4], [2]]
    assert checkpoints._held_bytes == 3 * num_bytes(SHAPE)


async def test_what_is_held_goes_when_its_time_is_up() -> None:
    _, checkpoints = made(CheckpointPolicy(every_n_steps=0, ttl_s=0.0))
    assert checkpoints.hold("acme", "e", snapshot(2), OWNER)
    assert await checkpoints.at_or_before("acme", "e", 20) is None
    assert await checkpoints.steps("acme", "e") == [] and not checkpoints._held_bytes


async def test_a_poisoned_or_huge_latent_is_not_held() -> None:
    _, checkpoints = made(CheckpointPolicy(every_n_steps=0, max_bytes=100))
    assert not checkpoints.hold("acme", "e", snapshot(5), OWNER)
    _, checkpoints = made(CheckpointPolicy(every_n_steps=0))
    poisoned = snapshot(5)
    poisoned.denoised[0, 0, 0] = np.nan
    assert not checkpoints.hold("acme", "e", poisoned, OWNER)
    assert not checkpoints._held


@pytest.mark.parametrize("every", [0, 1], ids=["held", "listed"])
async def test_a_purge_of_the_tenant_forgets_what_is_known_in_this_process(every: int) -> None:
    bench, checkpoints = made(CheckpointPolicy(every_n_steps=every, fractions=(0.1, 0.2)))
    await run(checkpoints, 20, up_to=4)
    await checkpoints.forget(PurgeScope("other/"))
    assert await checkpoints.steps("acme", "e") == [2, 4]
    scope = PurgeScope(f"{KEYRING.tenant('acme')}/")
    await purge(bench.tiers, scope)
    await checkpoints.forget(scope)
    assert await checkpoints.steps("acme", "e") == []


@pytest.mark.parametrize("kind", ["revision", "generation"])
async def test_what_is_held_is_purged_by_its_owner(kind: str) -> None:
    _, checkpoints = made(CheckpointPolicy(every_n_steps=0))
    await run(checkpoints, 20, up_to=5)
    await checkpoints.forget(PurgeScope(**{kind: KEYRING.tag(kind, "another")}))
    assert await checkpoints.steps("acme", "e") == [2, 4]
    await checkpoints.forget(PurgeScope(**{kind: getattr(OWNER, kind)}))
    assert await checkpoints.steps("acme", "e") == []
    assert await checkpoints.delete("acme", "e")
