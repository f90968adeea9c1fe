"""The scheduler: who is in the next batch. Pure: ids and numbers, no asyncio, clock, network or tensors.

An output waits until one of `max_running` slots is granted (`waiting.py`), has
its prompts encoded, makes its steps, is decoded. Rows that are ready stand in
one queue per (kind, key) in the order in which they became ready, so that the
output that was stepped longest ago goes first, and the queue whose head has
waited longest is served first: that orders encoding, steps and decoding and is
fair across keys. Previews run where nothing else is ready, or from a share of
instance time that other work earns for them.

Bound: an output that waits starts after at most (outputs ahead of it in
`waiting.py`'s order) endings of running ones; a running output's next row is
in one of the next ceil(ready rows ahead / rows a batch) batches of its queue,
and each queue is served at least once in (number of queues) batches.

Invariants (`check_invariants`): no row is in two batches; no output runs two
steps at once; an output that has ended is in no queue; batches and running
outputs are bounded.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from safelight_server.scheduler.types import (
    TRANSITIONS,
    Batch,
    CostModel,
    Decoded,
    Event,
    Expired,
    Failed,
    InvariantError,
    Kind,
    Limits,
    Output,
    Priority,
    Released,
    Row,
    State,
    Stepped,
)
from safelight_server.scheduler.waiting import WaitingQueue

Queue = tuple[Kind, str]


@dataclass(slots=True)
class _Output:
    output: Output
    priority: Priority
    state: State = State.WAITING
    step: int = 0
    unencoded: int = 0
    todo: list[int] = field(default_factory=list)
    in_flight: set[int] = field(default_factory=set)
    previews: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Conditioning:
    key: str
    wanted_by: set[int] = field(default_factory=set)
    encoded: bool = False
    batch_id: int | None = None


class Scheduler:
    """See the module. `now` is any clock that does not run backwards, the same throughout."""

    def __init__(self, limits: Limits, cost: CostModel) -> None:
        self._limits = limits
        self._cost = cost
        self._outputs: dict[int, _Output] = {}
        self._conditioning: dict[str, _Conditioning] = {}
        self._waiting = WaitingQueue()
        self._ready: dict[Queue, OrderedDict[int | str, int]] = {}
        self._in_flight: dict[int, Batch] = {}
        self._denoising: dict[str, list[int]] = {}  # key -> [outputs, rows] that take steps
        self._deadlines: list[tuple[float, int]] = []
        self._num_running = 0
        self._preview_credit_s = 0.0
        self._batch_ids = itertools.count()
        self._turns = itertools.count()

    # --- what comes in ---

    def add(self, output: Output, now: float) -> None:
        """Takes an output; `output_id` must be new, `first_step` less than `num_steps`."""
        if output.output_id in self._outputs:
            raise ValueError(f"output {output.output_id} is already there")
        self._outputs[output.output_id] = _Output(output, output.priority, step=output.first_step)
        self._waiting.push(output, output.priority)
        for conditioning_id in output.conditioning:
            wanted = self._conditioning.setdefault(conditioning_id, _Conditioning(output.keys[Kind.ENCODE]))
            wanted.wanted_by.add(output.output_id)
        if output.deadline is not None:
            heapq.heappush(self._deadlines, (output.deadline, output.output_id))

    def cancel(self, output_id: int) -> list[Event]:
        """Ends an output at once; rows of it in flight are ignored when they come back. Unknown ids are ignored."""
        if output_id not in self._outputs:
            return []
        return self._end(output_id)

    def expire(self, now: float) -> list[Event]:
        """Ends the outputs whose deadline has passed."""
        events: list[Event] = []
        while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][1] not in self._outputs):
            _, output_id = heapq.heappop(self._deadlines)
            if output_id in self._outputs:
                events += [*self._end(output_id), Expired(output_id)]
        return events

    def set_priority(self, output_id: int, priority: Priority) -> None:
        """Moves an output to another class; counts until it starts."""
        entry = self._outputs.get(output_id)
        if entry is None:
            return
        entry.priority = priority
        if entry.state is State.WAITING:
            self._waiting.push(self._waiting.remove(output_id), priority)

    def want_preview(self, output_id: int, key: str) -> None:
        """Asks for one preview row of an output; one that is waiting already counts."""
        entry = self._outputs.get(output_id)
        if entry is not None and key not in entry.previews:
            entry.previews.add(key)
            self._enqueue((Kind.PREVIEW, key), output_id)

    # --- what goes out ---

    def schedule(self, now: float, free: Sequence[int], *, full_only: bool = False) -> list[Batch]:
        """Batches for the free instances, at most one each.

        Args:
            full_only: only steps that fill a batch without waiting for others.
        """
        self._start()
        batches: list[Batch] = []
        instances = list(free)
        while instances:
            queue = self._next_queue(full_only)
            if queue is None:
                break
            batch_id = next(self._batch_ids)
            rows = self._take(queue, len(instances), batch_id)
            batch = Batch(batch_id, queue[0], queue[1], instances.pop(0), rows)
            self._in_flight[batch.batch_id] = batch
            self._charge(batch)
            batches.append(batch)
        return batches

    def complete(self, batch_id: int) -> list[Event]:
        """A batch came back: what became true."""
        batch = self._in_flight.pop(batch_id)
        events: list[Event] = []
        for row in batch.rows:
            if batch.kind is Kind.ENCODE:
                self._encoded(row.conditioning_id, batch_id)
            elif (entry := self._outputs.get(row.output_id)) is None:
                continue
            elif batch.kind is not Kind.PREVIEW:
                entry.in_flight.discard(row.part)
                if batch.kind is Kind.DECODE:
                    events += [*self._end(row.output_id), Decoded(row.output_id)]
                elif not entry.todo and not entry.in_flight:
                    events.append(self._stepped(entry))
        return events

    def fail(self, batch_id: int, retryable: bool) -> list[Event]:
        """A batch failed: its rows are ready again, first in line, or their outputs end. Previews are only lost."""
        batch = self._in_flight.pop(batch_id)
        events: list[Event] = []
        for row in reversed(batch.rows):
            if batch.kind is Kind.ENCODE:
                events += self._encoding_failed(row.conditioning_id, batch, retryable)
            elif (entry := self._outputs.get(row.output_id)) is None:
                continue
            elif batch.kind is not Kind.PREVIEW:
                entry.in_flight.discard(row.part)
                if not retryable:
                    events += [*self._end(row.output_id), Failed(row.output_id)]
                else:
                    entry.todo = sorted([*entry.todo, row.part])
                    self._enqueue((batch.kind, batch.key), row.output_id, first=True)
        return events

    # --- what can be asked ---

    @property
    def num_running(self) -> int:
        """Outputs that have started and not ended."""
        return self._num_running

    @property
    def num_outputs(self) -> int:
        """Outputs that have not ended."""
        return len(self._outputs)

    @property
    def num_free(self) -> int:
        """Slots that no output has and none waits for."""
        return max(0, self._limits.max_running - len(self._outputs))

    def num_waiting(self, priority: Priority | None = None) -> int:
        """Outputs that have not started, of a class or of all."""
        return len(self._waiting) if priority is None else self._waiting.count(priority)

    def num_waiting_of(self, caller: str) -> int:
        """Outputs of a caller that have not started."""
        return self._waiting.count_caller(caller)

    def waiting_order(self, priority: Priority) -> list[int]:
        """The outputs of a class in the order in which they will start."""
        return self._waiting.order(priority)

    def next_deadline(self) -> float | None:
        """When `expire` has something to do at the earliest."""
        while self._deadlines and self._deadlines[0][1] not in self._outputs:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def backlog_s(self) -> float:
        """Time that all instances need for the steps of all outputs, in batches as large as the slots make them."""
        together = min(self._limits.max_running, len(self._outputs))
        seconds = 0.0
        for entry in self._outputs.values():
            seconds += self._work_s(entry.output, entry.output.num_steps - entry.step, together)
        return seconds / self._limits.num_instances

    def estimate_s(self, output: Output, num_outputs: int = 1) -> float:
        """When `num_outputs` outputs like this one that came now would be finished, under the present load."""
        keys, instances = output.keys, self._limits.num_instances
        together = min(num_outputs, self._limits.max_running)
        outputs, rows = self._denoising.get(keys[Kind.DENOISE], [0, 0])
        spread = min(instances, outputs + together if outputs + together > 1 else output.rows_per_step)
        batch = max(1, math.ceil((rows + together * output.rows_per_step) / spread))
        turns = math.ceil(batch / self._limits.max_rows(Kind.DENOISE, keys[Kind.DENOISE]))
        step_s = turns * self._cost.seconds(Kind.DENOISE, keys[Kind.DENOISE], math.ceil(batch / turns))
        own = (output.num_steps - output.first_step) * step_s
        own += self._cost.seconds(Kind.DECODE, keys[Kind.DECODE], math.ceil(together / instances))
        own += self._cost.seconds(Kind.ENCODE, keys[Kind.ENCODE], len(output.conditioning))
        own *= math.ceil(num_outputs / self._limits.max_running)
        return own + (0.0 if together <= self.num_free else self.backlog_s())

    def check_invariants(self) -> None:
        """Raises InvariantError where the scheduler contradicts itself."""
        seen: set[tuple[Kind, int, str, int]] = set()
        for batch in self._in_flight.values():
            _require(0 < len(batch.rows) <= self._limits.max_rows(batch.kind, batch.key), "batch size")
            for row in batch.rows:
                if batch.kind is Kind.DENOISE and row.output_id in self._outputs:
                    entry = self._outputs[row.output_id]
                    place = (batch.kind, row.output_id, "", row.part)
                    _require(place not in seen, f"row {place} is in two batches")
                    _require(row.step == entry.step, f"output {row.output_id} runs two steps at once")
                    _require(row.part in entry.in_flight and row.part not in entry.todo, "row neither here nor there")
                    seen.add(place)
        running = [entry for entry in self._outputs.values() if entry.state is not State.WAITING]
        _require(len(running) == self._num_running <= self._limits.max_running, "running outputs")
        for (kind, key), queue in self._ready.items():
            for item in queue:
                _require(item in (self._conditioning if kind is Kind.ENCODE else self._outputs), "ended, but queued")
            if kind is Kind.DENOISE:
                members = [e.output for e in running if e.state is State.DENOISING and e.output.keys[kind] == key]
                rows = sum(output.rows_per_step for output in members)
                _require(self._denoising.get(key, [0, 0]) == [len(members), rows], "rows that take steps")
        for entry in running:
            if entry.state is State.DENOISING:
                _require(bool(entry.todo) or bool(entry.in_flight), f"output {entry.output.output_id} is forgotten")
        _require(len(self._waiting) + self._num_running == len(self._outputs), "outputs")

    # --- life of an output ---

    def _move(self, entry: _Output, state: State) -> None:
        if state not in TRANSITIONS[entry.state]:
            raise InvariantError(f"output {entry.output.output_id}: {entry.state} -> {state}")
        for at, change in ((entry.state, -1), (state, 1)):
            if at is State.DENOISING:
                tally = self._denoising.setdefault(entry.output.keys[Kind.DENOISE], [0, 0])
                tally[0] += change
                tally[1] += change * entry.output.rows_per_step
        entry.state = state

    def _start(self) -> None:
        while self._num_running < self._limits.max_running and (output := self._waiting.pop()) is not None:
            entry = self._outputs[output.output_id]
            self._num_running += 1
            for conditioning_id in dict.fromkeys(output.conditioning):
                wanted = self._conditioning[conditioning_id]
                entry.unencoded += not wanted.encoded
                queue = (Kind.ENCODE, wanted.key)
                if not wanted.encoded and wanted.batch_id is None and conditioning_id not in self._ready.get(queue, ()):
                    self._enqueue(queue, conditioning_id)
            if entry.unencoded:
                self._move(entry, State.ENCODING)
            else:
                self._ready_for_step(entry, State.DENOISING)

    def _ready_for_step(self, entry: _Output, state: State) -> None:
        if entry.state is not state:
            self._move(entry, state)
        kind = Kind.DENOISE if state is State.DENOISING else Kind.DECODE
        entry.todo = list(range(entry.output.rows_per_step if kind is Kind.DENOISE else 1))
        self._enqueue((kind, entry.output.keys[kind]), entry.output.output_id)

    def _stepped(self, entry: _Output) -> Event:
        entry.step += 1
        last = entry.step == entry.output.num_steps
        self._ready_for_step(entry, State.DECODING if last else State.DENOISING)
        return Stepped(entry.output.output_id, entry.step, last)

    def _encoded(self, conditioning_id: str, batch_id: int) -> None:
        wanted = self._conditioning.get(conditioning_id)
        if wanted is None or wanted.batch_id != batch_id:
            return
        wanted.encoded, wanted.batch_id = True, None
        for output_id in sorted(wanted.wanted_by):
            entry = self._outputs[output_id]
            if entry.state is State.ENCODING:
                entry.unencoded -= 1
                if not entry.unencoded:
                    self._ready_for_step(entry, State.DENOISING)

    def _encoding_failed(self, conditioning_id: str, batch: Batch, retryable: bool) -> list[Event]:
        wanted = self._conditioning.get(conditioning_id)
        if wanted is None or wanted.batch_id != batch.batch_id:
            return []
        wanted.batch_id = None
        if retryable:
            self._enqueue((batch.kind, batch.key), conditioning_id, first=True)
            return []
        started = [i for i in sorted(wanted.wanted_by) if self._outputs[i].state is State.ENCODING]
        return [event for i in started for event in (*self._end(i), Failed(i))]

    def _end(self, output_id: int) -> list[Event]:
        entry = self._outputs.pop(output_id)
        if entry.state is State.WAITING:
            if output_id in self._waiting:
                self._waiting.remove(output_id)
        else:
            self._num_running -= 1
        self._move(entry, State.ENDED)
        queues = [(kind, key) for kind, key in entry.output.keys.items() if kind is not Kind.ENCODE]
        for queue in queues + [(Kind.PREVIEW, key) for key in entry.previews]:
            if queue in self._ready:
                self._ready[queue].pop(output_id, None)
        return self._release(entry.output)

    def _release(self, output: Output) -> list[Event]:
        events: list[Event] = []
        for conditioning_id in dict.fromkeys(output.conditioning):
            wanted = self._conditioning[conditioning_id]
            wanted.wanted_by.discard(output.output_id)
            if not wanted.wanted_by:
                del self._conditioning[conditioning_id]
                self._ready.get((Kind.ENCODE, wanted.key), OrderedDict()).pop(conditioning_id, None)
                events.append(Released(conditioning_id))
        return events

    # --- queues and batches ---

    def _enqueue(self, queue: Queue, item: int | str, *, first: bool = False) -> None:
        ready = self._ready.setdefault(queue, OrderedDict())
        if first:
            turn = next(iter(ready.values()), next(self._turns)) - 1
            ready[item] = turn
            ready.move_to_end(item, last=False)
        elif item not in ready:
            ready[item] = next(self._turns)

    def _next_queue(self, full_only: bool) -> Queue | None:
        work = [
            (next(iter(ready.values())), queue)
            for queue, ready in self._ready.items()
            if ready and queue[0] is not Kind.PREVIEW
        ]
        if full_only:
            work = [(turn, queue) for turn, queue in work if self._fills_a_batch(queue)]
        oldest = min(work, key=lambda at: at[0], default=(0, None))[1]
        previews = [] if full_only else [q for q, ready in self._ready.items() if ready and q[0] is Kind.PREVIEW]
        if previews:
            preview = min(previews, key=lambda queue: next(iter(self._ready[queue].values())))
            if oldest is None or self._preview_credit_s >= self._preview_s(preview):
                return preview
        return oldest

    def _fills_a_batch(self, queue: Queue) -> bool:
        if queue[0] is not Kind.DENOISE:
            return False
        outputs, _ = self._denoising[queue[1]]
        share = math.ceil(outputs / self._limits.num_instances)
        return 2 * len(self._ready[queue]) > outputs and len(self._ready[queue]) >= share

    def _preview_s(self, queue: Queue) -> float:
        rows = min(len(self._ready[queue]), self._limits.max_rows(*queue))
        return self._cost.seconds(queue[0], queue[1], rows)

    def _charge(self, batch: Batch) -> None:
        """Other work earns instance time for previews; previews spend it, but never run up a debt."""
        seconds = self._cost.seconds(batch.kind, batch.key, len(batch.rows))
        if batch.kind is Kind.PREVIEW:
            self._preview_credit_s = max(0.0, self._preview_credit_s - seconds)
        else:
            share = self._limits.preview_share
            self._preview_credit_s = min(self._preview_credit_s + seconds * share / (1 - share), 10 * seconds)

    def _take(self, queue: Queue, num_free: int, batch_id: int) -> tuple[Row, ...]:
        kind, key = queue
        ready = self._ready[queue]
        limit = self._limits.max_rows(kind, key)
        if kind is Kind.DENOISE:
            return self._take_steps(queue, num_free, limit)
        items = list(itertools.islice(ready, limit))
        for item in items:
            del ready[item]
        if kind is Kind.ENCODE:
            for item in items:
                self._conditioning[str(item)].batch_id = batch_id
            return tuple(Row(-1, conditioning_id=str(item)) for item in items)
        rows = []
        for item in items:
            entry = self._outputs[int(item)]
            if kind is Kind.DECODE:
                entry.todo.clear()
                entry.in_flight.add(0)
            else:
                entry.previews.discard(key)
            rows.append(Row(int(item), entry.step))
        return tuple(rows)

    def _take_steps(self, queue: Queue, num_free: int, limit: int) -> tuple[Row, ...]:
        """The next steps of the outputs that were stepped longest ago, as much as one instance should take."""
        ready = self._ready[queue]
        share, whole = self._share(queue[1], num_free, limit)
        rows: list[Row] = []
        while ready:
            output_id = int(next(iter(ready)))
            entry = self._outputs[output_id]
            if rows and len(rows) + (len(entry.todo) if whole else 1) > share:
                break
            parts = entry.todo[: max(1, min(len(entry.todo), (limit if whole else share) - len(rows)))]
            entry.todo = entry.todo[len(parts) :]
            entry.in_flight.update(parts)
            rows += [Row(output_id, entry.step, part) for part in parts]
            if not entry.todo:
                del ready[output_id]
            if len(rows) >= share:
                break
        return tuple(rows)

    def _share(self, key: str, num_free: int, limit: int) -> tuple[int, bool]:
        """Rows for one instance, and whether outputs stay whole.

        A batch takes its instance's share of all rows that are stepping, not all that are ready: otherwise
        instances drift into one huge and one tiny batch.
        """
        outputs, rows = self._denoising[key]
        instances = self._limits.num_instances
        if outputs >= instances:
            per_output = math.ceil(rows / outputs)
            return max(per_output, min(limit, math.ceil(outputs / instances) * per_output)), limit >= per_output
        split = math.ceil(rows / instances)
        gains = self._cost.seconds(Kind.DENOISE, key, split) < self._cost.seconds(Kind.DENOISE, key, min(rows, limit))
        if num_free > 1 and gains:
            return min(limit, split), False
        return min(limit, rows), limit >= 2

    def _work_s(self, output: Output, steps: int, together: int) -> float:
        """One instance's time for the steps of an output that shares its calls with `together` such outputs in all."""
        key = output.keys[Kind.DENOISE]
        share = math.ceil(together * output.rows_per_step / self._limits.num_instances)
        rows = max(1, min(self._limits.max_rows(Kind.DENOISE, key), share))
        return steps * output.rows_per_step * self._cost.seconds(Kind.DENOISE, key, rows) / rows


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise InvariantError(what)
