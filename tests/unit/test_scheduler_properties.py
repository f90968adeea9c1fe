"""The scheduler keeps its invariants and bounds in any order of arrivals, cancellations, failures and deadlines."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safelight_server.scheduler import (
    NO_INSTANCE_S,
    Batch,
    Kind,
    Limits,
    Member,
    OutputDecoded,
    OutputFailed,
    Priority,
    ScheduledOutput,
    Scheduler,
    StepCompleted,
)
from safelight_server.scheduler.ready import Queue, Turn

MAX_ROWS = 6


class Curve:
    """A call takes 20 + 1 a row."""

    def seconds(self, kind: Kind, key: str, rows: int) -> float:
        return 20.0 + rows


class Machine(RuleBasedStateMachine):
    """Drives a scheduler and keeps its own record of what may run."""

    @initialize(instances=st.integers(1, 4), running=st.integers(1, 6), parked=st.integers(0, 6))
    def start(self, instances: int, running: int, parked: int) -> None:
        limits = Limits(running, lambda kind, key: MAX_ROWS, instances, max_parked=parked)
        self.scheduler = Scheduler(limits, Curve())
        self.instances, self.max_running = instances, running
        self.now = 0.0
        self.next_id = 0
        self.alive: dict[int, ScheduledOutput] = {}
        self.elsewhere: set[int] = set()
        self.steps: dict[int, int] = {}
        self.flying: dict[int, Batch] = {}
        self.turns_left: dict[tuple[Queue, Member], int] = {}
        self.since: dict[tuple[Queue, Member], Turn] = {}

    @rule(
        caller=st.sampled_from("abc"),
        priority=st.sampled_from(list(Priority)),
        steps=st.integers(1, 4),
        rows=st.integers(1, 2),
        key=st.sampled_from("xy"),
        prompt=st.sampled_from("pqr"),
        wait=st.one_of(st.none(), st.floats(0, 60)),
        done=st.integers(0, 3),
        guided=st.one_of(st.none(), st.builds(range, st.integers(0, 4), st.integers(0, 4))),
    )
    def add(self, caller, priority, steps, rows, key, prompt, wait, done, guided) -> None:
        output = ScheduledOutput(
            self.next_id,
            caller,
            priority,
            steps,
            rows,
            {Kind.ENCODE: "e" + key, Kind.DENOISE: "u" + key, Kind.DECODE: "d" + key},
            tuple(f"{key}{prompt}{part}" for part in range(rows)),
            None if wait is None else self.now + wait,
            min(done, steps),
            guided_steps=guided,
        )
        self.scheduler.add(output, self.now)
        self.alive[output.output_id] = output
        self.steps[output.output_id] = output.first_step
        self.next_id += 1

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.alive))), cancel=True)

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), priority=st.sampled_from(list(Priority)))
    def set_priority(self, data, priority) -> None:
        output_id = data.draw(st.sampled_from(sorted(self.alive)))
        self.scheduler.set_priority(output_id, priority)
        self.alive[output_id] = replace(self.alive[output_id], priority=priority)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def preview(self, data) -> None:
        self.scheduler.want_preview(data.draw(st.sampled_from(sorted(self.alive))), "p")

    @rule(output_id=st.integers(-3, -1), wanted=st.booleans())
    def preview_of_another_server(self, output_id, wanted) -> None:
        if wanted:
            self.elsewhere.add(output_id)
            self.scheduler.want_preview(output_id, "p")
        else:
            self.elsewhere.discard(output_id)
            self.scheduler.drop_previews(output_id)

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), wait=st.one_of(st.none(), st.floats(0, 60)))
    def set_deadline(self, data, wait) -> None:
        output_id = data.draw(st.sampled_from(sorted(self.alive)))
        deadline = None if wait is None else self.now + wait
        self.scheduler.set_deadline(output_id, deadline)
        self.alive[output_id] = replace(self.alive[output_id], deadline=deadline)

    @rule(instances=st.integers(0, 4))
    def set_instances(self, instances) -> None:
        self.instances = instances
        self.scheduler.set_instances(instances)
        if not instances and self.alive:
            assert self.scheduler.backlog_s() == NO_INSTANCE_S
            assert self.scheduler.estimate_s(next(iter(self.alive.values()))) == NO_INSTANCE_S

    @rule(full_only=st.booleans())
    def schedule(self, full_only) -> None:
        busy = {batch.instance for batch in self.flying.values()}
        free = [instance for instance in range(self.instances) if instance not in busy]
        batches = self.scheduler.schedule(self.now, free, full_only=full_only)
        assert len({batch.instance for batch in batches}) == len(batches)
        if self.instances:
            assert self.scheduler.num_running == min(self.max_running, len(self.alive)), "a slot is free, but some wait"
        else:
            assert not batches
        for batch in batches:
            assert batch.instance in free
            assert 0 < len(batch.rows) <= MAX_ROWS
            for row in batch.rows:
                if batch.kind is Kind.PREVIEW and row.output_id < 0:
                    assert row.output_id in self.elsewhere, "nobody wants it any more"
                elif batch.kind is not Kind.ENCODE:
                    assert row.output_id in self.alive, "an output that has ended runs again"
                if batch.kind is Kind.DENOISE:
                    assert row.step == self.steps[row.output_id], "a step is run twice or skipped"
                    assert self.alive[row.output_id].keys[Kind.DENOISE] == batch.key
                    assert row.part < self.alive[row.output_id].num_rows(row.step), "a row that the step does not have"
            self.flying[batch.batch_id] = batch
            self.judge(batch)

    def judge(self, batch: Batch) -> None:
        """Counts one more batch of its class that went before each queued member."""
        if batch.kind is Kind.PREVIEW:
            return
        table, first = self.scheduler._table, batch.rows[0]
        owner = table.prompts[first.conditioning_id] if batch.kind is Kind.ENCODE else table.of[first.output_id]
        for queue, member in list(self.turns_left):
            if (queue.kind, queue.key) == (batch.kind, batch.key) and member in batch.members:
                del self.turns_left[queue, member]
            elif queue.priority is owner.priority and still_in(self.scheduler, queue, member, self.since):
                self.turns_left[queue, member] -= 1
                assert self.turns_left[queue, member] >= 0, f"{member} waits in {queue} for those that came after it"

    def in_line(self) -> list[tuple[Queue, Member, int]]:
        """Queued members that are ready for work other than previews, first to last over all queues, and their rows."""
        ready, table = self.scheduler._ready, self.scheduler._table
        lines = [
            (place.turn, number, queue, member)
            for queue in ready
            if queue[0] is not Kind.PREVIEW
            for number, (member, place) in enumerate(ready._lines[queue].items())
        ]
        return [
            (queue, member, len(table.of[member].todo) if isinstance(member, int) else 1)
            for _, _, queue, member in sorted(lines, key=lambda at: at[:2])
        ]

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def complete(self, data) -> None:
        self.back(data.draw(st.sampled_from(sorted(self.flying))))

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def fail(self, data) -> None:
        batch = self.flying.pop(data.draw(st.sampled_from(sorted(self.flying))))
        given_up = data.draw(st.sets(st.sampled_from(batch.members)))
        blamed = {i for i, output in self.alive.items() if given_up & {i, *output.conditioning}}
        for event in self.scheduler.fail(batch.batch_id, given_up):
            if isinstance(event, OutputFailed):
                assert event.output_id in blamed, "it had attempts left"
                self.end(event.output_id)
        if batch.kind in (Kind.DENOISE, Kind.DECODE):
            assert not given_up & set(self.alive), "it had no attempt left"
        again = sum(
            rows for queue, member, rows in self.in_line() if queue[0] is batch.kind and member in batch.members
        )
        for at in self.turns_left:
            self.turns_left[at] += again  # they are first in the queue again, with their parts that never left it

    @rule(seconds=st.floats(0, 30))
    def wait(self, seconds) -> None:
        self.now += seconds
        for event in self.scheduler.expire(self.now):
            if hasattr(event, "output_id"):
                assert self.alive[event.output_id].deadline <= self.now
                self.end(event.output_id)

    def back(self, batch_id: int) -> None:
        batch = self.flying.pop(batch_id)
        for event in self.scheduler.complete(batch_id):
            if isinstance(event, StepCompleted):
                self.steps[event.output_id] += 1
                assert event.step == self.steps[event.output_id]
            elif hasattr(event, "output_id"):
                assert self.steps[event.output_id] == self.alive[event.output_id].num_steps
                self.end(event.output_id)
        assert batch_id not in self.flying, batch

    def end(self, output_id: int, cancel: bool = False) -> None:
        if cancel:
            self.scheduler.cancel(output_id)
        del self.alive[output_id]

    @invariant()
    def consistent(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_invariants()
        for priority in Priority:
            of_class = [output for output in self.alive.values() if output.priority is priority]
            assert self.scheduler.num_outputs_of(priority) == len(of_class)
        before = dict.fromkeys(Priority, 0)
        line = self.in_line()
        for queue, member, num_rows in line:
            since = self.scheduler._ready._lines[queue][member].turn
            if self.since.get((queue, member), since) < since:  # it left the queue and came back
                self.turns_left.pop((queue, member), None)
            self.since[queue, member] = since
            self.turns_left.setdefault((queue, member), before[queue.priority])
            before[queue.priority] += num_rows
        self.turns_left = {(queue, member): self.turns_left[queue, member] for queue, member, _ in line}

    def teardown(self) -> None:
        """Without further arrivals, everything ends."""
        if not hasattr(self, "scheduler"):
            return
        self.set_instances(max(1, self.instances))
        for _ in range(2000):
            if not self.alive:
                break
            self.schedule(False)
            self.consistent()
            assert self.flying, "nothing runs, but outputs are left"
            self.back(min(self.flying))
            self.consistent()
        assert not self.alive


TestScheduler = Machine.TestCase
TestScheduler.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)


def still_in(scheduler: Scheduler, queue: Queue, member: Member, since: dict[tuple[Queue, Member], Turn]) -> bool:
    """Whether a member has stayed in a queue since it was seen there; if others took its slot, it starts again."""
    place = scheduler._ready._lines.get(queue, {}).get(member)
    return place is not None and place.turn <= since[queue, member]


@settings(max_examples=100, deadline=None)
@given(
    num_outputs=st.integers(1, 40),
    poison=st.sets(st.integers(0, 39), max_size=4),
    max_rows=st.integers(1, 16),
    kind=st.sampled_from([Kind.DENOISE, Kind.DECODE, Kind.ENCODE]),
)
def test_whoever_breaks_a_batch_goes_down_alone(num_outputs, poison, max_rows, kind):
    scheduler = Scheduler(Limits(64, lambda kind, key: max_rows, 1), Curve())
    keys = {Kind.ENCODE: "e", Kind.DENOISE: "u", Kind.DECODE: "d"}
    culprits: set[Member] = {f"p{i}" if kind is Kind.ENCODE else i for i in poison}
    for i in range(num_outputs):
        scheduler.add(ScheduledOutput(i, "me", Priority.STANDARD, 2, 1, keys, (f"p{i}",)), 0.0)
    decoded, failed = set(), set()
    sizes: dict[Member, int] = {}  # sizes of the last batch of each member, if that failed
    while scheduler.num_outputs:
        [batch] = scheduler.schedule(0.0, [0])
        broken = batch.kind is kind and culprits & set(batch.members)
        for member in batch.members:
            if member in sizes:
                assert len(batch.members) <= math.ceil(sizes[member] / 2), "not set apart"
            sizes[member] = len(batch.members)
            if not broken:
                del sizes[member]
        given_up = batch.members if len(batch.members) == 1 else ()
        events = scheduler.fail(batch.batch_id, given_up) if broken else scheduler.complete(batch.batch_id)
        decoded |= {event.output_id for event in events if isinstance(event, OutputDecoded)}
        failed |= {event.output_id for event in events if isinstance(event, OutputFailed)}
        scheduler.check_invariants()
    assert failed == {i for i in poison if i < num_outputs}
    assert decoded == set(range(num_outputs)) - failed
