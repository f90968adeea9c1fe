"""The scheduler's rules, one by one: which output starts, which rows share a batch, which instance runs it."""

from __future__ import annotations

from collections import Counter

import pytest
from safelight_server.scheduler import Kind, Limits, OutputDecoded, Priority, ScheduledOutput, Scheduler, StepCompleted
from safelight_server.scheduler.ready import ReadyQueues


class Curve:
    """Calls take 20 + 1 a row, unless the test says otherwise."""

    def __init__(self, base: float = 20.0, row: float = 1.0) -> None:
        self.base, self.row = base, row

    def seconds(self, kind: Kind, key: str, rows: int) -> float:
        return self.base + self.row * rows


def scheduler(running=64, rows=64, instances=1, curve=None, share=0.1) -> Scheduler:
    return Scheduler(Limits(running, lambda kind, key: rows, instances, share), curve or Curve())


def output(identifier, caller="a", priority=Priority.STANDARD, steps=3, rows=1, key="", deadline=None, **extra):
    keys = {Kind.ENCODE: f"e{key}", Kind.DENOISE: f"u{key}", Kind.DECODE: f"d{key}"}
    return ScheduledOutput(identifier, caller, priority, steps, rows, keys, (f"{key}prompt",) * rows, deadline, **extra)


def run(s: Scheduler, batches):
    """Completes batches and returns the events."""
    events = [event for batch in batches for event in s.complete(batch.batch_id)]
    s.check_invariants()
    return events


def encode(s: Scheduler, instances=(0,)):
    """Completes the first encodings."""
    while (batches := s.schedule(0, list(instances))) and batches[0].kind is Kind.ENCODE:
        run(s, batches)
    return batches


def test_outputs_join_and_leave_at_every_step():
    s = scheduler()
    s.add(output(1, steps=2), 0)
    [first] = encode(s)
    assert [(row.output_id, row.step) for row in first.rows] == [(1, 0)]
    s.add(output(2, steps=2), 0)
    assert s.schedule(0, []) == []
    assert run(s, [first]) == [StepCompleted(1, 1, False)]
    [second] = s.schedule(0, [0])
    assert [(row.output_id, row.step) for row in second.rows] == [(2, 0), (1, 1)]


def test_a_prompt_shared_by_many_is_encoded_once():
    s = scheduler()
    for identifier in range(5):
        s.add(output(identifier), 0)
    [batch] = s.schedule(0, [0])
    assert batch.kind is Kind.ENCODE
    assert len(batch.rows) == 1
    run(s, [batch])
    [step] = s.schedule(0, [0])
    assert len(step.rows) == 5


def test_classes_start_eight_to_four_to_one():
    s = scheduler(running=1)
    identifier = 0
    for priority in Priority:
        for _ in range(40):
            s.add(output(identifier, priority=priority, steps=1), 0)
            identifier += 1
    started = Counter()
    for _ in range(26):
        while True:
            [batch] = s.schedule(0, [0])
            run(s, [batch])
            if batch.kind is Kind.DECODE:
                started[Priority(batch.rows[0].output_id // 40)] += 1
                break
    assert started == {Priority.INTERACTIVE: 16, Priority.STANDARD: 8, Priority.BATCH: 2}


def test_callers_take_turns_and_deadlines_go_first():
    s = scheduler(running=1)
    for identifier in range(6):
        s.add(output(identifier, caller="many"), 0)
    s.add(output(10, caller="few", deadline=900.0), 0)
    s.add(output(11, caller="few", deadline=500.0), 0)
    assert s.waiting_order(Priority.STANDARD)[:5] == [0, 11, 1, 10, 2]


def test_one_output_alone_runs_its_guidance_rows_side_by_side():
    s = scheduler(instances=2)
    s.add(output(1, rows=2), 0)
    left, right = encode(s, (0, 1))
    assert {(row.part, batch.instance) for batch in (left, right) for row in batch.rows} == {(0, 0), (1, 1)}
    assert run(s, [left]) == []
    assert run(s, [right]) == [StepCompleted(1, 1, False)]


def test_rows_stay_together_where_splitting_gains_nothing():
    s = scheduler(instances=2, curve=Curve(20, 0))
    s.add(output(1, rows=2), 0)
    [batch] = encode(s, (0, 1))
    assert len(batch.rows) == 2


def test_instances_stay_balanced():
    s = scheduler(instances=2)
    for identifier in range(8):
        s.add(output(identifier, rows=2, steps=10), 0)
    batches = encode(s, (0, 1))
    assert [len(batch.rows) for batch in batches] == [8, 8]
    assert not {row.output_id for row in batches[0].rows} & {row.output_id for row in batches[1].rows}
    for _ in range(6):
        run(s, batches[:1])
        [again] = s.schedule(0, [batches[0].instance])
        assert len(again.rows) == 8
        batches = [batches[1], again]


def test_a_cancelled_output_is_in_no_later_batch():
    s = scheduler()
    for identifier in (1, 2):
        s.add(output(identifier), 0)
    [batch] = encode(s)
    s.cancel(1)
    assert run(s, [batch]) == [StepCompleted(2, 1, False)]
    [again] = s.schedule(0, [0])
    assert {row.output_id for row in again.rows} == {2}


def test_what_expires_is_reported_and_runs_no_more():
    s = scheduler()
    s.add(output(1, deadline=5.0), 0)
    assert s.next_deadline() == 5.0
    assert not s.expire(4.9)
    assert [type(event).__name__ for event in s.expire(5.0)] == ["EmbeddingReleased", "OutputExpired"]
    assert not s.schedule(6.0, [0])


def test_a_failed_batch_runs_again_from_the_same_step_or_ends_its_outputs():
    s = scheduler()
    s.add(output(1), 0)
    [batch] = encode(s)
    assert s.fail(batch.batch_id) == []
    [again] = s.schedule(0, [0])
    assert [(row.output_id, row.step) for row in again.rows] == [(1, 0)]
    names = [type(event).__name__ for event in s.fail(again.batch_id, {1})]
    assert names == ["EmbeddingReleased", "OutputFailed"]
    assert s.num_outputs == 0


def test_members_that_nobody_suspects_stay_together():
    s = scheduler(running=4, rows=4)
    for identifier in range(4):
        s.add(output(identifier), 0)
    [batch] = encode(s)
    assert len(batch.members) == 4
    s.fail(batch.batch_id, suspect=False)
    [again] = s.schedule(0, [0])
    assert again.members == batch.members


def test_keys_take_turns():
    s = scheduler(running=100, rows=4)
    for identifier in range(40):
        s.add(output(identifier, key="x", steps=50), 0)
    s.add(output(99, key="y", steps=50), 0)
    served = Counter()
    for _ in range(60):
        [batch] = s.schedule(0, [0])
        served[batch.key] += 1
        run(s, [batch])
    assert served["uy"] >= 4


def test_previews_take_idle_time_or_a_bounded_share():
    s = scheduler(share=0.1)
    for identifier in range(4):
        s.add(output(identifier, steps=1000), 0)
    encode_batches = encode(s)
    run(s, encode_batches)
    served = Counter()
    for _ in range(200):
        s.want_preview(0, "p")
        [batch] = s.schedule(0, [0])
        served[batch.kind] += 1
        run(s, [batch])
    assert 10 <= served[Kind.PREVIEW] <= 25
    idle = scheduler()
    idle.add(output(1), 0)
    encode(idle)
    idle.want_preview(1, "p")
    [preview] = idle.schedule(0, [0])
    assert preview.kind is Kind.PREVIEW


def test_full_batches_only_leaves_stragglers_for_those_in_flight():
    s = scheduler()
    for identifier in range(5):
        s.add(output(identifier), 0)
    [batch] = encode(s)
    s.add(output(9), 0)
    assert s.schedule(0, [0], full_only=True) == []
    run(s, [batch])
    [everyone] = s.schedule(0, [0])
    assert len(everyone.rows) == 6


def test_running_outputs_are_bounded():
    s = scheduler(running=2)
    for identifier in range(5):
        s.add(output(identifier), 0)
    encode(s)
    assert (s.num_running, s.num_waiting()) == (2, 3)
    with pytest.raises(ValueError, match="in use"):
        s.add(output(0), 0)


def test_outputs_of_a_class_are_those_that_run_and_those_that_wait():
    s = scheduler(running=2)
    for identifier in range(5):
        s.add(output(identifier), 0)
    encode(s)
    s.set_priority(0, Priority.BATCH)  # it runs
    s.set_priority(4, Priority.BATCH)  # it waits
    assert [s.num_outputs_of(priority) for priority in Priority] == [0, 3, 2]
    s.cancel(0)
    assert [s.num_outputs_of(priority) for priority in Priority] == [0, 3, 1]


def test_a_resumed_output_goes_on_from_its_step():
    s = scheduler()
    s.add(output(1, steps=5, first_step=3), 0)
    [batch] = encode(s)
    assert batch.rows[0].step == 3
    assert run(s, [batch]) == [StepCompleted(1, 4, False)]


def test_a_cancelled_output_that_is_ready_runs_no_more():
    s = scheduler()
    for identifier in (1, 2):
        s.add(output(identifier), 0)
    [batch] = encode(s)
    run(s, [batch])
    s.cancel(1)
    s.check_invariants()
    [again] = s.schedule(0, [0])
    assert {row.output_id for row in again.rows} == {2}


def test_callers_take_turns_when_they_start():
    s = scheduler(running=1)
    for identifier in range(4):
        s.add(output(identifier, caller="many", steps=1), 0)
        s.add(output(10 + identifier, caller="few", steps=1), 0)
    ended = []
    while len(ended) < 8:
        [batch] = s.schedule(0, [0])
        run(s, [batch])
        ended += [row.output_id for row in batch.rows if batch.kind is Kind.DECODE]
    assert ended == [0, 10, 1, 11, 2, 12, 3, 13]


def test_what_failed_in_a_line_of_its_own_lets_all_go_first_that_were_ready_before():
    ready, other, own = ReadyQueues(), (Kind.DENOISE, "x"), (Kind.ENCODE, "y")
    ready.push(other, 1)
    ready.push(other, 2)
    ready.push_first(own, ["prompt"], apart=True)
    ready.push(other, 3)
    order = []
    while queues := list(ready):
        queue = min(reversed(queues), key=ready.turn)  # reversed, so that a tie would prefer the younger queue
        [*_, member] = ready.together(queue, 1)
        ready.discard(queue, member)
        order.append(member)
    assert order == [1, 2, "prompt", 3]


def test_what_has_made_all_its_steps_is_only_decoded():
    s = scheduler()
    s.add(output(1, steps=3, first_step=3), 0)
    [batch] = s.schedule(0, [0])
    assert (batch.kind, [row.output_id for row in batch.rows]) == (Kind.DECODE, [1])
    assert run(s, [batch])[-1] == OutputDecoded(1)
    with pytest.raises(ValueError, match="first_step"):
        s.add(output(2, steps=3, first_step=4), 0)


def test_steps_outside_of_the_guidance_interval_have_one_row():
    s = scheduler()
    s.add(output(1, rows=2, steps=5, guided_steps=range(1, 3)), 0)
    rows = []
    [batch] = encode(s)
    while batch.kind is Kind.DENOISE:
        rows.append([row.part for row in batch.rows])
        run(s, [batch])
        [batch] = s.schedule(0, [0])
    assert rows == [[0], [0, 1], [0, 1], [0], [0]]


def test_the_steps_left_are_told_by_their_rows():
    for guided in (None, range(0), range(1, 3), range(4), range(2, 9)):
        one = output(1, rows=2, steps=4, guided_steps=guided)
        for step in range(5):
            counted = Counter(one.num_rows(at) for at in range(step, 4))
            assert dict(one.steps_by_rows(step)) == counted, (guided, step)


def test_instances_share_the_rows_where_outputs_have_different_numbers_of_them():
    s = scheduler(instances=2)
    for identifier in range(16):
        s.add(output(identifier, rows=2, guided_steps=range(2) if identifier == 3 else range(0)), 0)
    batches = encode(s, (0, 1))
    assert sorted(len(batch.rows) for batch in batches) == [7, 10]
