"""Whatever arrives, is cancelled, fails or expires in whatever order, the scheduler keeps its invariants."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safelight_server.scheduler import Batch, Failed, Kind, Limits, Output, Priority, Scheduler, Stepped

MAX_ROWS = 6


class Curve:
    """A call costs 20 + 1 a row."""

    def seconds(self, kind: Kind, key: str, rows: int) -> float:
        return 20.0 + rows


class Machine(RuleBasedStateMachine):
    """Drives a scheduler and keeps its own books of what may run."""

    @initialize(instances=st.integers(1, 4), running=st.integers(1, 6))
    def start(self, instances: int, running: int) -> None:
        self.scheduler = Scheduler(Limits(running, lambda kind, key: MAX_ROWS, instances), Curve())
        self.instances = instances
        self.now = 0.0
        self.next_id = 0
        self.alive: dict[int, Output] = {}
        self.steps: dict[int, int] = {}
        self.flying: dict[int, Batch] = {}
        self.ended: set[int] = set()

    @rule(
        caller=st.sampled_from("abc"),
        priority=st.sampled_from(list(Priority)),
        steps=st.integers(1, 4),
        rows=st.integers(1, 2),
        key=st.sampled_from("xy"),
        prompt=st.sampled_from("pqr"),
        wait=st.one_of(st.none(), st.floats(0, 60)),
        done=st.integers(0, 3),
    )
    def add(self, caller, priority, steps, rows, key, prompt, wait, done) -> None:
        output = Output(
            self.next_id,
            caller,
            priority,
            steps,
            rows,
            {Kind.ENCODE: "e" + key, Kind.DENOISE: "u" + key, Kind.DECODE: "d" + key},
            tuple(f"{key}{prompt}{part}" for part in range(rows)),
            None if wait is None else self.now + wait,
            min(done, steps - 1),
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
        self.scheduler.set_priority(data.draw(st.sampled_from(sorted(self.alive))), priority)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def preview(self, data) -> None:
        self.scheduler.want_preview(data.draw(st.sampled_from(sorted(self.alive))), "p")

    @rule(full_only=st.booleans())
    def schedule(self, full_only) -> None:
        busy = {batch.instance for batch in self.flying.values()}
        free = [instance for instance in range(self.instances) if instance not in busy]
        batches = self.scheduler.schedule(self.now, free, full_only=full_only)
        assert len({batch.instance for batch in batches}) == len(batches)
        for batch in batches:
            assert batch.instance in free
            assert 0 < len(batch.rows) <= MAX_ROWS
            for row in batch.rows:
                if batch.kind is not Kind.ENCODE:
                    assert row.output_id in self.alive, "an output that has ended runs again"
                if batch.kind is Kind.DENOISE:
                    assert row.step == self.steps[row.output_id], "a step is run twice or skipped"
                    assert self.alive[row.output_id].keys[Kind.DENOISE] == batch.key
            self.flying[batch.batch_id] = batch

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def complete(self, data) -> None:
        self.back(data.draw(st.sampled_from(sorted(self.flying))))

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), retryable=st.booleans())
    def fail(self, data, retryable) -> None:
        batch_id = data.draw(st.sampled_from(sorted(self.flying)))
        del self.flying[batch_id]
        for event in self.scheduler.fail(batch_id, retryable):
            if isinstance(event, Failed):
                assert not retryable
                self.end(event.output_id)

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
            if isinstance(event, Stepped):
                self.steps[event.output_id] += 1
                assert event.step == self.steps[event.output_id]
            elif hasattr(event, "output_id"):
                assert self.steps[event.output_id] == self.alive[event.output_id].num_steps
                self.end(event.output_id)
        assert batch_id not in self.flying, batch

    def end(self, output_id: int, cancel: bool = False) -> None:
        if cancel:
            self.scheduler.cancel(output_id)
        self.ended.add(output_id)
        del self.alive[output_id]

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_invariants()

    def teardown(self) -> None:
        """When nothing more arrives, everything ends."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(2000):
            if not self.alive:
                break
            self.schedule(False)
            assert self.flying, "nothing runs, but outputs are left"
            self.back(min(self.flying))
        assert not self.alive


TestScheduler = Machine.TestCase
TestScheduler.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
