"""Fairness: slots change between steps, so nobody waits for long requests, and classes get time by their weight."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st
from safelight_server.scheduler import (
    WEIGHTS,
    Batch,
    Event,
    Kind,
    Limits,
    OutputDecoded,
    Priority,
    ScheduledOutput,
    Scheduler,
    StepCompleted,
)
from safelight_server.scheduler.slots import TURN_STEPS, entitlements

PREVIEW = "preview"
FOREVER = 100_000


class Curve:
    """A denoiser call takes `base` + `row` for each row; other calls take a tenth of that."""

    def __init__(self, base: float = 20.0, row: float = 1.0) -> None:
        self.base, self.row = base, row

    def seconds(self, kind: Kind, key: str, rows: int) -> float:
        return (self.base + self.row * rows) * (1.0 if kind is Kind.DENOISE else 0.1)


class World:
    """A scheduler and its instances on a virtual clock."""

    def __init__(self, curve: Curve, *, running=64, instances=1, rows=64, parked=256) -> None:
        self.curve, self.now = curve, 0.0
        self.scheduler = Scheduler(Limits(running, lambda kind, key: rows, instances, max_parked=parked), curve)
        self.free = set(range(instances))
        self.flying: list[tuple[float, Batch]] = []
        self.ids, self.turns = itertools.count(), itertools.count()
        self.steps: Counter[int] = Counter()
        self.longest_s = 0.0
        self.spent_s: Counter[str] = Counter()

    def add(self, priority: Priority, caller: str, num: int = 1, steps: int = FOREVER, key: str = "") -> list[int]:
        keys = {Kind.ENCODE: f"e{key}", Kind.DENOISE: f"u{key}", Kind.DECODE: f"d{key}"}
        ids = list(itertools.islice(self.ids, num))
        for output_id in ids:
            prompts = (f"{caller}{key}", f"{key}negative")
            self.scheduler.add(ScheduledOutput(output_id, caller, priority, steps, 2, keys, prompts), self.now)
        return ids

    def turn(self) -> list[Event]:
        """Gives work to the free instances and lets the next batch end."""
        for batch in self.scheduler.schedule(self.now, sorted(self.free)):
            seconds = self.curve.seconds(batch.kind, batch.key, len(batch.rows))
            self.longest_s = max(self.longest_s, seconds)
            self.spent_s[batch.key] += seconds
            self.flying.append((self.now + seconds, batch))
            self.free.remove(batch.instance)
        if next(self.turns) % 16 == 0:
            self.scheduler.check_invariants()
        self.flying.sort(key=lambda at: (at[0], at[1].batch_id))
        self.now, batch = self.flying.pop(0)
        self.free.add(batch.instance)
        events = self.scheduler.complete(batch.batch_id)
        if batch.kind is Kind.PREVIEW:
            events.extend(OutputDecoded(-row.output_id - 1) for row in batch.rows)
        for event in events:
            if isinstance(event, StepCompleted):
                self.steps[event.output_id] += 1
        return events

    def until(self, met: Callable[[list[Event]], bool], max_turns: int = 20_000) -> None:
        for _ in range(max_turns):
            if met(self.turn()):
                return
        raise AssertionError("it has not happened")

    def first_preview_s(self, priority: Priority, caller: str, key: str = "") -> float:
        """Adds an output and has its first step decoded; the seconds until then. Ends the output."""
        began, [output_id] = self.now, self.add(priority, caller, key=key)

        def met(events: list[Event]) -> bool:
            if any(isinstance(event, StepCompleted) and event.output_id == output_id for event in events):
                self.scheduler.want_preview(output_id, PREVIEW)
            return OutputDecoded(-output_id - 1) in events

        self.until(met)
        self.scheduler.cancel(output_id)
        return self.now - began


@settings(max_examples=50, deadline=None)
@given(
    classes=st.sampled_from([[Priority.BATCH], [Priority.STANDARD], [Priority.STANDARD, Priority.BATCH]]),
    num=st.integers(1, 80),
    instances=st.integers(1, 3),
    running=st.integers(3, 64),
    rows=st.sampled_from([2, 8, 64]),
    base=st.floats(0, 50),
    row=st.floats(0.1, 5),
    warm=st.integers(0, 25),
)
def test_an_interactive_first_preview_takes_twice_its_time_alone_plus_one_call(
    classes, num, instances, running, rows, base, row, warm
):
    """The time alone is that on one idle instance; on several, the two rows of a step could run in parallel."""
    curve = Curve(base, row)
    alone_s = World(curve, running=running, rows=rows).first_preview_s(Priority.INTERACTIVE, "us")
    world = World(curve, instances=instances, running=running, rows=rows)
    for priority in classes:
        world.add(priority, "them", num)
    for _ in range(warm):
        world.turn()
    beside_s = world.first_preview_s(Priority.INTERACTIVE, "us")
    assert beside_s <= 2 * alone_s + world.longest_s + 1e-6


@settings(max_examples=25, deadline=None)
@given(hogs=st.integers(1, 12), slots=st.integers(2, 12), callers=st.integers(1, 16), instances=st.integers(1, 3))
def test_a_caller_gets_a_slot_after_one_step_or_when_turns_are_over(hogs, slots, callers, instances):
    """Within one class, outputs of others make a bounded number of steps meanwhile, however long they are."""
    world = World(Curve(), running=slots, instances=instances, parked=1000)
    for number in range(callers):
        world.add(Priority.STANDARD, f"hog{number}", hogs)
    for _ in range(30):
        world.turn()
    before = Counter(world.steps)
    [mine] = world.add(Priority.STANDARD, "us")
    world.until(lambda events: any(isinstance(e, StepCompleted) and e.output_id == mine for e in events))
    most = max((world.steps - before).values())
    turns = 0 if callers < slots else math.ceil((callers + 1) / slots)
    assert most <= 3 + turns * (TURN_STEPS + 3)


def test_one_batch_request_does_not_keep_an_interactive_one_waiting():
    world = World(Curve())
    hogs = world.add(Priority.BATCH, "them", 64)
    world.until(lambda events: world.steps[hogs[-1]] == 3)
    [mine] = world.add(Priority.INTERACTIVE, "us", steps=4)
    world.until(lambda events: OutputDecoded(mine) in events)
    assert max(world.steps[hog] for hog in hogs) <= 3 + 4 + 2
    assert world.scheduler.num_parked == 1
    world.until(lambda events: not world.scheduler.num_parked)  # whose slot was taken has it back


def test_what_is_parked_goes_on_from_its_step():
    world = World(Curve(), running=3)
    first = world.add(Priority.BATCH, "them", 3, steps=10)
    world.until(lambda events: world.steps[first[0]] == 4)
    world.add(Priority.INTERACTIVE, "us", 3, steps=5)
    seen: list[StepCompleted] = []
    ended: set[int] = set()

    def met(events: list[Event]) -> bool:
        seen.extend(event for event in events if isinstance(event, StepCompleted))
        ended.update(event.output_id for event in events if isinstance(event, OutputDecoded))
        return len(ended) == 6

    world.until(met)
    for output_id in first:
        assert [event.step for event in seen if event.output_id == output_id] == list(range(5, 11))


@settings(max_examples=25, deadline=None)
@given(elders=st.integers(1, 40), running=st.integers(3, 16), newcomers=st.integers(1, 3), lower=st.integers(0, 20))
def test_an_interactive_output_makes_its_first_step_at_once_beside_older_ones_of_its_caller(
    elders, running, newcomers, lower
):
    world = World(Curve(), running=running)
    old = world.add(Priority.INTERACTIVE, "us", elders)
    world.add(Priority.BATCH, "them", lower)
    world.until(lambda events: min(world.steps[output_id] for output_id in old) >= 1, max_turns=2000)
    before = Counter(world.steps)
    new = world.add(Priority.INTERACTIVE, "us", newcomers)
    world.until(lambda events: all(world.steps[output_id] for output_id in new), max_turns=200)
    assert max((world.steps - before)[output_id] for output_id in old) <= 3


def test_older_outputs_of_an_interactive_caller_end_in_the_order_in_which_they_came():
    world = World(Curve(), running=2)
    ended: list[int] = []

    def note(events: list[Event]) -> bool:
        ended.extend(event.output_id for event in events if isinstance(event, OutputDecoded))
        return len(ended) == 6

    came: list[int] = []
    for _ in range(6):
        came += world.add(Priority.INTERACTIVE, "us", steps=9)
        world.until(lambda events: note(events) or bool(world.steps[came[-1]]))
    world.until(note)
    assert ended == came


def test_first_steps_take_no_slot_of_another_caller_and_none_in_the_other_classes():
    world = World(Curve(), running=4)
    theirs = world.add(Priority.INTERACTIVE, "them", 2)
    world.add(Priority.INTERACTIVE, "us", 2)
    world.until(lambda events: min(world.steps[output_id] for output_id in theirs) >= 2)
    for _ in range(5):
        [mine] = world.add(Priority.INTERACTIVE, "us")
        before = Counter(world.steps)
        world.until(lambda events, mine=mine: bool(world.steps[mine]))
        assert all(world.steps[output_id] > before[output_id] for output_id in theirs)
    world = World(Curve(), running=2)
    world.add(Priority.STANDARD, "us", 4)
    for _ in range(20):
        world.turn()
    assert not world.scheduler.num_parked


@settings(max_examples=8, deadline=None)
@given(instances=st.integers(1, 2), running=st.integers(13, 32), base=st.floats(0, 50), row=st.floats(0.1, 5))
def test_classes_that_always_have_work_make_steps_by_their_weight_at_least(instances, running, base, row):
    """With different keys, so that no rows of other classes share the batches."""
    world = World(Curve(base, row), running=running, instances=instances)
    ids = {priority: world.add(priority, priority.name, 32, key=priority.name) for priority in Priority}
    for _ in range(300):
        world.turn()
    assert all(world.steps[ids[priority][0]] for priority in Priority)
    total, all_s = sum(WEIGHTS.values()), sum(world.spent_s.values())
    if instances == 1:
        for priority in Priority:
            share = world.spent_s[f"u{priority.name}"] / all_s
            assert abs(share - WEIGHTS[priority] / total) < 0.06


@given(
    wanted=st.fixed_dictionaries({priority: st.integers(0, 300) for priority in Priority}), slots=st.integers(1, 300)
)
def test_entitlements_are_max_min_fair(wanted, slots):
    shares = entitlements(wanted, slots)
    assert sum(shares.values()) <= slots
    total = sum(WEIGHTS[priority] for priority in Priority if wanted[priority])
    for priority in Priority:
        assert shares[priority] <= wanted[priority]
        if wanted[priority] and slots >= len(Priority):
            assert shares[priority] >= min(wanted[priority], max(1, slots * WEIGHTS[priority] // total) - 2)
    if sum(wanted.values()) <= slots:
        assert shares == wanted


def test_no_more_are_parked_than_may_be():
    world = World(Curve(), running=4, parked=2)
    world.add(Priority.BATCH, "them", 4)
    for _ in range(5):
        world.turn()
    world.add(Priority.INTERACTIVE, "us", 4)
    for _ in range(20):
        world.turn()
        assert world.scheduler.num_parked <= 2
    assert world.scheduler.num_running == 4


def test_a_running_output_can_change_its_class():
    world = World(Curve())
    ids = world.add(Priority.BATCH, "them", 4)
    for _ in range(3):
        world.turn()
    world.scheduler.set_priority(ids[0], Priority.INTERACTIVE)
    world.scheduler.check_invariants()
    for _ in range(8):
        world.turn()
    assert world.steps[ids[0]] > world.steps[ids[1]] or world.steps[ids[0]] >= 5


def test_full_batches_wait_for_a_higher_class():
    """Work that is dispatched before the last results are processed must not delay an interactive step."""
    for priority, goes_out in ((Priority.BATCH, True), (Priority.INTERACTIVE, False)):
        world = World(Curve(), rows=4)
        world.add(Priority.BATCH, "them", 12)
        [mine] = world.add(priority, "us")
        world.turn()
        world.turn()
        batches = world.scheduler.schedule(world.now, [0])
        while mine not in batches[0].members:
            world.scheduler.complete(batches[0].batch_id)
            batches = world.scheduler.schedule(world.now, [0])
        assert bool(world.scheduler.schedule(world.now, [0], full_only=True)) is goes_out
