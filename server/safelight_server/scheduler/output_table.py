"""State machine of an output: waiting, encoding its prompts, denoising, decoding, ended (`types.TRANSITIONS`).

The table has the outputs that have not ended and the prompts that they need. Each
change of state adds the rows that it makes ready to the ready queues.

Invariants:
- A running output has rows that are ready or in flight, or waits for prompts
  that are.
- A prompt that many outputs need is encoded once, and released when nobody
  needs it any more.
- An output that has ended is in no queue.

Previews can also be queued for outputs of another server, which have no `OutputEntry`
here.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from safelight_server.scheduler.deadlines import Deadlines
from safelight_server.scheduler.ready import Queue, ReadyQueues
from safelight_server.scheduler.types import (
    TRANSITIONS,
    Batch,
    EmbeddingReady,
    EmbeddingReleased,
    Event,
    InvariantError,
    Kind,
    Member,
    OutputFailed,
    OutputState,
    Priority,
    ScheduledOutput,
    StepCompleted,
)
from safelight_server.scheduler.waiting import WaitingQueue

RUNNING = frozenset({OutputState.ENCODING, OutputState.DENOISING, OutputState.DECODING})
"""The states in which an output has a slot."""


@dataclass(slots=True)
class OutputEntry:
    """The state of one output.

    Attributes:
        arrival: its number in the order of arrival.
        priority: its present class.
        step: number of steps made.
        turn_step: number of steps made when it got its slot.
        parked: whether it waits in the middle of its steps.
        unencoded: number of its prompts that are not encoded yet, while it is ENCODING.
        todo: parts (`Row.part`) of the current step that are in no batch yet; [0] for a decoding.
        in_flight: parts of the current step that are in a batch.
    """

    output: ScheduledOutput
    arrival: int
    priority: Priority
    state: OutputState = OutputState.WAITING
    step: int = 0
    turn_step: int = 0
    parked: bool = False
    unencoded: int = 0
    todo: list[int] = field(default_factory=list)
    in_flight: set[int] = field(default_factory=set)

    @property
    def num_rows(self) -> int:
        """Rows of the current step."""
        return self.output.num_rows(self.step)


@dataclass(slots=True)
class Prompt:
    """The state of one prompt embedding, by conditioning id.

    Attributes:
        key: the ENCODE key that it can share a batch under.
        priority: class of its queue: the highest class of the outputs and callers that have needed it so far.
        wanted_by: ids of the outputs that need it.
        asked: whether a caller of `OutputTable.ask` waits for it.
        encoded: whether the embedding has been computed.
        batch_id: the batch in flight that encodes it.
    """

    key: str
    priority: Priority
    wanted_by: set[int] = field(default_factory=set)
    asked: bool = False
    encoded: bool = False
    batch_id: int | None = None


@dataclass(slots=True)
class Denoising:
    """How many outputs are DENOISING under one key, and how many rows their current steps have together."""

    num_outputs: int = 0
    num_rows: int = 0


class OutputTable:
    """The outputs that have not ended, by id.

    Attributes:
        of: state by output id.
        previews: classes of the queued previews by key, by output id; none is empty.
        prompts: the prompts that somebody needs, by conditioning id.
        running: outputs that have a slot, by class and caller; no mapping of a caller is empty.
        num_parked: outputs that wait in the middle of their steps.
        num_ended: outputs of each class that have ended, since the start.
    """

    def __init__(self, waiting: WaitingQueue, ready: ReadyQueues, deadlines: Deadlines) -> None:
        self._waiting = waiting
        self._ready = ready
        self._deadlines = deadlines
        self.of: dict[int, OutputEntry] = {}
        self.previews: dict[int, dict[str, Priority]] = {}
        self.prompts: dict[str, Prompt] = {}
        self.running: dict[Priority, dict[str, dict[int, OutputEntry]]] = {priority: {} for priority in Priority}
        self.num_parked = 0
        self.num_ended = dict.fromkeys(Priority, 0)
        self._num_running = dict.fromkeys(Priority, 0)
        self._denoising: dict[tuple[str, Priority], Denoising] = {}
        self._arrivals = itertools.count()

    def num_running(self, priority: Priority | None = None) -> int:
        """Outputs that have a slot, of one class or of all."""
        return sum(self._num_running.values()) if priority is None else self._num_running[priority]

    def denoising(self, key: str, priority: Priority | None = None) -> Denoising:
        """Counts the outputs of a class, or of all, that are DENOISING under a key, queued or in flight."""
        classes = Priority if priority is None else (priority,)
        counts = [self._denoising[key, one] for one in classes if (key, one) in self._denoising]
        return Denoising(sum(count.num_outputs for count in counts), sum(count.num_rows for count in counts))

    def add(self, output: ScheduledOutput) -> None:
        """Adds a new output to the waiting queue and notes which prompts it needs."""
        entry = OutputEntry(output, next(self._arrivals), output.priority, step=output.first_step)
        self.of[output.output_id] = entry
        self._waiting.push(output, entry.priority, output.deadline, entry.arrival)
        self._deadlines.set(output.output_id, output.deadline)
        for conditioning_id in output.conditioning:
            prompt = self.prompts.setdefault(
                conditioning_id, Prompt(output.encoder_key(conditioning_id), entry.priority)
            )
            prompt.wanted_by.add(output.output_id)

    def start(self, output_id: int) -> None:
        """Starts an output that was granted a slot: queues its missing prompts, its first step or its decoding."""
        entry = self.of[output_id]
        entry.turn_step = entry.step
        if entry.parked:
            entry.parked = False
            self.num_parked -= 1
        if entry.step == entry.output.num_steps:
            self._ready_to_decode(entry)
            return
        for conditioning_id in dict.fromkeys(entry.output.conditioning):
            prompt = self.prompts[conditioning_id]
            if not prompt.encoded:
                entry.unencoded += 1
                self._want(conditioning_id, prompt, entry.priority)
        if entry.unencoded:
            self._move(entry, OutputState.ENCODING)
        else:
            self._ready_to_step(entry)

    def park(self, output_id: int) -> None:
        """Takes the slot of an output that is between two steps; it waits again, in the middle of its steps."""
        entry = self.of[output_id]
        self._ready.discard(self._queue(entry, Kind.DENOISE), output_id)
        entry.todo.clear()
        entry.parked = True
        self.num_parked += 1
        self._move(entry, OutputState.WAITING)
        begun = entry.step > entry.output.first_step
        self._waiting.push(entry.output, entry.priority, self._deadlines.get(output_id), entry.arrival, begun=begun)

    def set_priority(self, output_id: int, priority: Priority) -> None:
        """Moves an output to another class, with all that is queued of it."""
        entry = self.of[output_id]
        if entry.priority is priority:
            return
        if entry.state is OutputState.WAITING:
            self._waiting.set_priority(output_id, priority)
            entry.priority = priority
            return
        old = self._queue(entry, Kind.DENOISE), self._queue(entry, Kind.DECODE)
        self._count(entry, -1)
        entry.priority = priority
        self._count(entry, 1)
        for queue in old:
            if self._ready.contains(queue, output_id):
                self._ready.discard(queue, output_id)
                self._ready.push(queue._replace(priority=priority), output_id)
        if entry.state is OutputState.ENCODING:
            for conditioning_id in entry.output.conditioning:
                if not (prompt := self.prompts[conditioning_id]).encoded:
                    self._want(conditioning_id, prompt, priority)

    def want_preview(self, output_id: int, key: str) -> None:
        """Queues one preview row of an output under `key`; does nothing if one is queued already.

        Previews for outputs of another server are of class STANDARD.
        """
        keys = self.previews.setdefault(output_id, {})
        if key not in keys:
            entry = self.of.get(output_id)
            keys[key] = Priority.STANDARD if entry is None else entry.priority
            self._ready.push(Queue(Kind.PREVIEW, key, keys[key]), output_id)

    def preview_taken(self, output_id: int, key: str) -> None:
        """Removes a queued preview whose row is in a batch now."""
        keys = self.previews[output_id]
        del keys[key]
        if not keys:
            del self.previews[output_id]

    def drop_previews(self, output_id: int) -> None:
        """Removes all queued previews of an output. Previews that are in a batch already still run."""
        for key, priority in self.previews.pop(output_id, {}).items():
            self._ready.discard(Queue(Kind.PREVIEW, key, priority), output_id)

    def ask(self, conditioning_id: str, key: str) -> list[Event]:
        """Queues a prompt for its embedding alone, in class INTERACTIVE, since a lookup in the cache waits for it.

        Returns:
            `EmbeddingReady` if it is encoded already; otherwise `encoded` or `give_up` returns the event later.
        """
        prompt = self.prompts.setdefault(conditioning_id, Prompt(key, Priority.INTERACTIVE))
        if prompt.encoded:
            return [EmbeddingReady(conditioning_id)]
        prompt.asked = True
        self._want(conditioning_id, prompt, Priority.INTERACTIVE)
        return []

    def encoded(self, conditioning_id: str, batch_id: int) -> list[Event]:
        """Records that a batch has encoded a prompt; outputs that lacked only this prompt become ready to step."""
        prompt = self.prompts.get(conditioning_id)
        if prompt is None or prompt.batch_id != batch_id:
            return []  # released, or being encoded anew in another batch
        prompt.encoded, prompt.batch_id = True, None
        for entry in self._encoding(prompt):
            entry.unencoded -= 1
            if not entry.unencoded:
                self._ready_to_step(entry)
        return self._answer(conditioning_id, failed=False)

    def stepped(self, output_id: int, part: int) -> list[Event]:
        """Records that a row of a step came back; after the last row, queues the next step or the decoding."""
        entry = self.of[output_id]
        entry.in_flight.discard(part)
        if entry.todo or entry.in_flight:
            return []
        self._next_step(entry)
        last = entry.step == entry.output.num_steps
        if last:
            self._ready_to_decode(entry)
        else:
            self._ready_to_step(entry)
        return [StepCompleted(output_id, entry.step, last)]

    def encoding(self, batch: Batch) -> None:
        """Notes which batch encodes its prompts."""
        for row in batch.rows:
            self.prompts[row.conditioning_id].batch_id = batch.batch_id

    def take_back(self, member: Member, batch: Batch) -> Queue | None:
        """Puts the rows of a member in a failed batch back to be done.

        Returns:
            The queue that the member belongs in again; None if nobody needs it any more.
        """
        if isinstance(member, str):
            prompt = self.prompts.get(member)
            if prompt is None or prompt.batch_id != batch.batch_id:
                return None
            prompt.batch_id = None
            wanted = prompt.asked or bool(self._encoding(prompt))
            return Queue(Kind.ENCODE, prompt.key, prompt.priority) if wanted else None
        if (entry := self.of.get(member)) is None:
            return None
        parts = {row.part for row in batch.rows if row.output_id == member}
        entry.in_flight -= parts
        entry.todo = sorted({*entry.todo, *parts})
        return self._queue(entry, batch.kind)

    def give_up(self, member: Member, batch_id: int) -> list[Event]:
        """Ends an output without a picture; for a prompt, every started output that waits for its embedding."""
        if isinstance(member, str):
            prompt = self.prompts.get(member)
            if prompt is None or prompt.batch_id != batch_id:
                return []
            ids = [entry.output.output_id for entry in self._encoding(prompt)]
            answer = self._answer(member, failed=True)
        else:
            ids, answer = [member] if member in self.of else [], []
        return answer + [event for output_id in ids for event in (*self.end(output_id), OutputFailed(output_id))]

    def end(self, output_id: int) -> list[Event]:
        """Ends an output: removes it from every queue and releases the prompts that only it needed."""
        entry = self.of.pop(output_id)
        if entry.state is OutputState.WAITING:
            self._waiting.remove(output_id)
            self.num_parked -= entry.parked
        self._move(entry, OutputState.ENDED)
        self.num_ended[entry.priority] += 1
        self._deadlines.set(output_id, None)
        for kind in (Kind.DENOISE, Kind.DECODE):
            self._ready.discard(self._queue(entry, kind), output_id)
        self.drop_previews(output_id)
        return self._release(entry.output)

    def _encoding(self, prompt: Prompt) -> list[OutputEntry]:
        table = (self.of[output_id] for output_id in sorted(prompt.wanted_by))
        return [entry for entry in table if entry.state is OutputState.ENCODING]

    def _queue(self, entry: OutputEntry, kind: Kind) -> Queue:
        return Queue(kind, entry.output.keys[kind], entry.priority)

    def _want(self, conditioning_id: str, prompt: Prompt, priority: Priority) -> None:
        """Queues a prompt that is in no batch, or moves it up to a higher class."""
        if prompt.batch_id is not None:
            return
        queue = Queue(Kind.ENCODE, prompt.key, prompt.priority)
        if not self._ready.contains(queue, conditioning_id):
            prompt.priority = priority
        elif priority < prompt.priority:
            self._ready.discard(queue, conditioning_id)
            prompt.priority = priority
        self._ready.push(queue._replace(priority=prompt.priority), conditioning_id)

    def _next_step(self, entry: OutputEntry) -> None:
        """Advances an output by a step. The next step may have another number of rows."""
        before = entry.num_rows
        entry.step += 1
        self._denoising[entry.output.keys[Kind.DENOISE], entry.priority].num_rows += entry.num_rows - before

    def _ready_to_step(self, entry: OutputEntry) -> None:
        if entry.state is not OutputState.DENOISING:
            self._move(entry, OutputState.DENOISING)
        entry.todo = list(range(entry.num_rows))
        self._ready.push(self._queue(entry, Kind.DENOISE), entry.output.output_id)

    def _ready_to_decode(self, entry: OutputEntry) -> None:
        self._move(entry, OutputState.DECODING)
        entry.todo = [0]
        self._ready.push(self._queue(entry, Kind.DECODE), entry.output.output_id)

    def _move(self, entry: OutputEntry, state: OutputState) -> None:
        if state not in TRANSITIONS[entry.state]:
            raise InvariantError(f"output {entry.output.output_id}: {entry.state} -> {state}")
        self._count(entry, -1)
        entry.state = state
        self._count(entry, 1)

    def _count(self, entry: OutputEntry, change: int) -> None:
        """Adds an output to the counts of its class and state (`change` 1), or removes it from them (-1)."""
        output, priority = entry.output, entry.priority
        if entry.state in RUNNING:
            self._num_running[priority] += change
            callers = self.running[priority]
            if change > 0:
                callers.setdefault(output.caller, {})[output.output_id] = entry
            else:
                del callers[output.caller][output.output_id]
                if not callers[output.caller]:
                    del callers[output.caller]
        if entry.state is OutputState.DENOISING:
            at = (output.keys[Kind.DENOISE], priority)
            tally = self._denoising.setdefault(at, Denoising())
            tally.num_outputs += change
            tally.num_rows += change * entry.num_rows
            if not tally.num_outputs:
                del self._denoising[at]

    def _release(self, output: ScheduledOutput) -> list[Event]:
        events: list[Event] = []
        for conditioning_id in dict.fromkeys(output.conditioning):
            prompt = self.prompts[conditioning_id]
            prompt.wanted_by.discard(output.output_id)
            events += self._release_prompt(conditioning_id)
        return events

    def _answer(self, conditioning_id: str, *, failed: bool) -> list[Event]:
        """The event for the callers of `ask` that wait for this prompt, if there are any."""
        prompt = self.prompts[conditioning_id]
        if not prompt.asked:
            return []
        prompt.asked = False
        return [EmbeddingReady(conditioning_id, failed), *self._release_prompt(conditioning_id)]

    def _release_prompt(self, conditioning_id: str) -> list[Event]:
        prompt = self.prompts[conditioning_id]
        if prompt.wanted_by or prompt.asked:
            return []
        del self.prompts[conditioning_id]
        self._ready.discard(Queue(Kind.ENCODE, prompt.key, prompt.priority), conditioning_id)
        return [EmbeddingReleased(conditioning_id)]
