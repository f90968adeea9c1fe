"""The scheduler's operations: outputs come in, batches go out. Pure: ids and numbers, no asyncio, clock or tensors.

An output waits until it is granted one of `max_running` slots (`waiting.py`).
Then its prompts are encoded, its steps are made and it is decoded (`output_table.py`).
Ready rows are queued (`ready.py`), and `batch_builder.py` forms a batch of them for
each free instance. Between two steps another output may get the slot (`slots.py`);
then the output waits again.

Bounds:
- Wait for a slot: the output at position `m` of its class (weight w) starts at
  the latest with grant number m + sum over the other classes (weight v) of
  (floor(m * v / w) + 1), if no output arrives meanwhile; `waiting.py` has the
  bound with arrivals. `schedule` grants every free slot, so each output that
  ends lets the next one start. `slots.py` has the bound in steps, which holds
  however long the others' requests are.
- Wait for a batch, within a class: when a member (an output or a prompt) enters
  a ready queue, its first row is in a batch after at most as many batches of its
  class, of all keys, as there were rows in the queues of the class at that time.
  Each batch that fails meanwhile adds its rows, and previews take their share of
  instance time. So no key waits for work that came later.
- Wait for a batch, between classes: while a class has rows ready, another one
  (weight v) gets at most v / w of the instance time that this one (weight w)
  gets, plus one call of each; INTERACTIVE may be four of the longest calls ahead.
- Duration of a call: the rows of lower classes in it at most double it.
- Batch size: at most `max_rows` rows. After a failure each member runs in
  batches of at most half of the failed batch's members, until it succeeds.

Invariants (`invariants.py`): no row is in two batches; no output runs two steps
at once; an output that has ended is in no queue and no later batch; batches and
running outputs are bounded.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Mapping, Sequence

from safelight_server.scheduler import invariants
from safelight_server.scheduler.batch_builder import BatchBuilder
from safelight_server.scheduler.deadlines import Deadlines
from safelight_server.scheduler.estimates import Estimates
from safelight_server.scheduler.output_table import OutputTable
from safelight_server.scheduler.ready import Queue, ReadyQueues
from safelight_server.scheduler.slots import Slots
from safelight_server.scheduler.types import (
    Batch,
    CostModel,
    Event,
    Kind,
    Limits,
    Member,
    OutputDecoded,
    OutputExpired,
    Priority,
    ScheduledOutput,
)
from safelight_server.scheduler.waiting import WaitingQueue


class Scheduler:
    """Forms batches of rows for instances. `now` is in seconds, always of the same monotonic clock."""

    def __init__(self, limits: Limits, cost: CostModel) -> None:
        self._limits = limits
        self._waiting = WaitingQueue()
        self._ready = ReadyQueues()
        self._deadlines = Deadlines()
        self._table = OutputTable(self._waiting, self._ready, self._deadlines)
        self._slots = Slots(limits, self._waiting, self._table)
        self._batch_builder = BatchBuilder(limits, cost, self._table, self._ready, self._waiting)
        self._estimates = Estimates(limits, cost, self._table)
        self._in_flight: dict[int, Batch] = {}
        self._batch_ids = itertools.count()

    # --- input ---

    def add(self, output: ScheduledOutput, now: float) -> None:
        """Adds an output, which then waits for a slot.

        Raises:
            ValueError: the output's id is in use, or `first_step` is more than `num_steps`.
        """
        if output.output_id in self._table.of:
            raise ValueError(f"output id {output.output_id} is in use")
        if not 0 <= output.first_step <= output.num_steps:
            raise ValueError(f"output {output.output_id}: first_step must be from 0 to {output.num_steps}")
        self._table.add(output)

    def cancel(self, output_id: int) -> list[Event]:
        """Ends an output at once. Its rows in flight are ignored when they come back. Unknown ids are ignored."""
        return self._table.end(output_id) if output_id in self._table.of else []

    def expire(self, now: float) -> list[Event]:
        """Ends the outputs whose deadline has passed."""
        ids = self._deadlines.passed(now)
        return [event for output_id in ids for event in (*self._table.end(output_id), OutputExpired(output_id))]

    def set_priority(self, output_id: int, priority: Priority) -> None:
        """Moves an output to another priority class. Unknown ids are ignored."""
        if output_id in self._table.of:
            self._table.set_priority(output_id, priority)

    def set_deadline(self, output_id: int, deadline: float | None) -> None:
        """Changes an output's deadline and, if it waits, its position in its caller's order. Ignores unknown ids."""
        if output_id in self._table.of:
            self._deadlines.set(output_id, deadline)
        if output_id in self._waiting:
            self._waiting.set_deadline(output_id, deadline)

    def set_instances(self, num_instances: int) -> None:
        """Sets how many instances are live.

        With none, nothing starts and nothing is scheduled; outputs stay until they expire. The caller ends a batch in
        flight on an instance that is gone with `fail`, like any other.
        """
        self._batch_builder.num_instances = num_instances

    def want_preview(self, output_id: int, key: str) -> None:
        """Queues one preview row of an output, of this server or another; no second one while the first is queued."""
        self._table.want_preview(output_id, key)

    def drop_previews(self, output_id: int) -> None:
        """Removes the queued previews of another server's output. For an output of this server, its end does so."""
        self._table.drop_previews(output_id)

    def want_embedding(self, conditioning_id: str, key: str) -> list[Event]:
        """Has a prompt encoded for its embedding alone: one `EmbeddingReady` answers all callers that wait for it."""
        return self._table.ask(conditioning_id, key)

    # --- batches ---

    def schedule(self, now: float, free: Sequence[int], *, full_only: bool = False) -> list[Batch]:
        """Gives slots to waiting outputs and forms batches for the free instances, at most one each.

        Args:
            free: numbers of the idle instances, in the order in which they get work.
            full_only: form batches only of steps, and only where waiting would not make them larger.
        """
        if not self.num_instances:
            return []
        self._slots.grant()
        batches: list[Batch] = []
        for num_taken, instance in enumerate(free):
            formed = self._batch_builder.next(len(free) - num_taken, full_only)
            if formed is None:
                break
            queue, rows = formed
            batch = Batch(next(self._batch_ids), queue.kind, queue.key, instance, rows)
            self._in_flight[batch.batch_id] = batch
            if batch.kind is Kind.ENCODE:
                self._table.encoding(batch)
            batches.append(batch)
        return batches

    def complete(self, batch_id: int) -> list[Event]:
        """Records that a batch succeeded. Returns the events that follow from it."""
        batch = self._in_flight.pop(batch_id)
        events: list[Event] = []
        for row in batch.rows:
            if batch.kind is Kind.ENCODE:
                events += self._table.encoded(row.conditioning_id, batch_id)
            elif row.output_id not in self._table.of:
                continue
            elif batch.kind is Kind.DENOISE:
                events += self._table.stepped(row.output_id, row.part)
            elif batch.kind is Kind.DECODE:
                events += [*self._table.end(row.output_id), OutputDecoded(row.output_id)]
        return events

    def fail(self, batch_id: int, given_up: Container[Member] = (), *, suspect: bool = True) -> list[Event]:
        """Records that a batch failed. Its members go back to the heads of their queues, in two halves for each queue.

        Previews are dropped, not tried again. A batch that is no longer in flight is ignored.

        Args:
            given_up: members that are not tried again: the output ends, or every output that waits for the prompt.
            suspect: whether a member may have caused the failure; if not, the members are not split.
        """
        batch = self._in_flight.pop(batch_id, None)
        if batch is None or batch.kind is Kind.PREVIEW:
            return []
        events: list[Event] = []
        for member in batch.members:
            if member in given_up:
                events += self._table.give_up(member, batch_id)
        again: dict[Queue, list[Member]] = {}
        for member in batch.members:
            if (queue := self._table.take_back(member, batch)) is not None:
                again.setdefault(queue, []).append(member)
        for queue, members in again.items():
            self._ready.push_first(queue, members, apart=suspect)
        return events

    # --- queries ---

    @property
    def num_instances(self) -> int:
        """Instances that are live."""
        return self._batch_builder.num_instances

    @property
    def num_running(self) -> int:
        """Outputs that have a slot."""
        return self._table.num_running()

    @property
    def num_parked(self) -> int:
        """Outputs that wait in the middle of their steps, because others took their slots."""
        return self._table.num_parked

    @property
    def num_outputs(self) -> int:
        """Outputs that have not ended."""
        return len(self._table.of)

    def num_outputs_of(self, priority: Priority) -> int:
        """Outputs of a class that have not ended."""
        return self._waiting.count(priority) + self._table.num_running(priority)

    def num_ended_of(self, priority: Priority) -> int:
        """Outputs of a class that have ended, however they did, since the server started."""
        return self._table.num_ended[priority]

    @property
    def num_free(self) -> int:
        """Slots that are neither taken nor about to be taken by a waiting output."""
        return max(0, self._limits.max_running - self.num_outputs)

    def num_waiting(self, priority: Priority | None = None) -> int:
        """Outputs that wait for a slot, of one priority class or of all."""
        return len(self._waiting) if priority is None else self._waiting.count(priority)

    def num_waiting_of(self, caller: str, priority: Priority | None = None) -> int:
        """Outputs of a caller that wait for a slot, in one priority class or in all."""
        return self._waiting.count_caller(caller, priority)

    def num_waiting_of_tenant(self, tenant: str, priority: Priority) -> int:
        """Outputs of a tenant that wait for a slot in a priority class."""
        return self._waiting.count_tenant(tenant, priority)

    def num_callers_waiting(self, priority: Priority, tenant: str | None = None) -> int:
        """Callers, of a tenant or of all, with outputs that wait for a slot in a priority class."""
        return self._waiting.num_callers(priority, tenant)

    def waiting_order(self, priority: Priority) -> list[int]:
        """The outputs of a class in the order in which they will start."""
        return self._waiting.order(priority)

    def next_deadline(self) -> float | None:
        """The earliest deadline, at which `expire` is to be called; None if no output has one."""
        return self._deadlines.next()

    def backlog_s(self) -> float:
        """Seconds that the live instances need for the steps left of all outputs; see `NO_INSTANCE_S` for none live."""
        return self._estimates.backlog_s(self.num_instances)

    def estimate_s(self, output: ScheduledOutput, num_outputs: int = 1) -> float:
        """Seconds until `num_outputs` outputs like this one, if added now, would be finished under the present load.

        `NO_INSTANCE_S` while no instance is live.
        """
        return self._estimates.estimate_s(output, num_outputs, self.num_instances)

    def compute_s(self, output: ScheduledOutput) -> float:
        """Seconds of one instance that an output takes in full batches, whether it was added or not."""
        return self._estimates.compute_s(output, output.first_step)

    def left_by_class_s(self) -> Mapping[Priority, float]:
        """Seconds of one instance, in full batches, that are left to do for the outputs of each class."""
        return self._estimates.left_by_class_s()

    def due_s(self, before: float) -> float:
        """Seconds of one instance, in full batches, for outputs whose deadline comes before `before`."""
        return self._estimates.left_due_s(self._deadlines.passed(before))

    def check_invariants(self) -> None:
        """Checks every invariant of `invariants.py`; for tests.

        Raises:
            InvariantError: the scheduler contradicts itself.
        """
        invariants.check(self._limits, self._waiting, self._table, self._ready, self._in_flight.values())
