"""A class is late when its queue takes longer than it may, and until the queue takes less than half of that."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from safelight_server.generations.pressure import BEGINS, ENDS, Pressure
from safelight_server.scheduler import Priority

INTERACTIVE, STANDARD, BATCH = Priority
WAIT_S = {INTERACTIVE: 5.0, STANDARD: 60.0, BATCH: 600.0}
WORK = st.fixed_dictionaries({priority: st.floats(0, 5000) for priority in Priority})


def left(interactive: float = 0.0, standard: float = 0.0, batch: float = 0.0) -> dict[Priority, float]:
    return {INTERACTIVE: interactive, STANDARD: standard, BATCH: batch}


def test_it_begins_beyond_what_is_done_in_the_time_and_ends_below_half_of_that() -> None:
    changes: list[tuple[Priority, bool, float]] = []
    pressure = Pressure({STANDARD: 60.0}, lambda *change: changes.append(change))
    seen = []
    for seconds in (120.0, 121.0, 119.0, 60.0, 59.0, 60.0, 120.0, 121.0):
        pressure.update(left(standard=seconds), num_instances=2)
        seen.append(pressure.on(STANDARD))
    assert seen == [False, True, True, True, False, False, False, True]
    assert [(priority, late) for priority, late, _ in changes] == [(STANDARD, late) for late in (True, False, True)]
    assert changes[0][2] == 121 / 120


def test_what_comes_later_makes_no_class_late_and_what_comes_first_does() -> None:
    pressure = Pressure(WAIT_S)
    pressure.update(left(batch=601.0), 1)
    assert [pressure.on(priority) for priority in Priority] == [False, False, True]
    pressure.update(left(standard=61.0), 1)
    assert [pressure.on(priority) for priority in Priority] == [False, True, True]
    pressure.update(left(interactive=6.0), 1)
    assert [pressure.on(priority) for priority in Priority] == [True, True, True]
    pressure.update(left(), 1)
    assert [pressure.on(priority) for priority in Priority] == [False, False, False]


def test_while_no_instance_is_live_it_stays_as_it_is() -> None:
    pressure = Pressure(WAIT_S)
    pressure.update(left(standard=1e6), 0)
    assert not pressure.on(STANDARD)
    pressure.update(left(standard=1e6), 1)
    pressure.update(left(), 0)
    assert pressure.on(STANDARD)


def test_without_times_nothing_is_late() -> None:
    pressure = Pressure({})
    pressure.update(left(1e9, 1e9, 1e9), 1)
    assert not any(pressure.on(priority) for priority in Priority)


@given(moments=st.lists(st.tuples(WORK, st.integers(0, 4)), max_size=20))
def test_it_follows_the_queue_and_a_later_class_is_never_better_off(
    moments: list[tuple[dict[Priority, float], int]],
) -> None:
    pressure = Pressure({STANDARD: 60.0})
    for left_s, num_instances in moments:
        before = pressure.on(STANDARD)
        pressure.update(left_s, num_instances)
        done_s = num_instances * 60.0
        if not num_instances:
            assert pressure.on(STANDARD) is before
        elif (work_s := left_s[INTERACTIVE] + left_s[STANDARD]) / done_s > BEGINS:
            assert pressure.on(STANDARD)
        elif work_s / done_s < ENDS:
            assert not pressure.on(STANDARD)
        else:
            assert pressure.on(STANDARD) is before, "between both it does not change"
        assert pressure.on(BATCH) is pressure.on(STANDARD)
        assert not pressure.on(INTERACTIVE)
