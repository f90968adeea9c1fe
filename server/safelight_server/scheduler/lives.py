"""The life of an output: waiting, its prompts encoded, its steps, decoded, ended; `TRANSITIONS` is the table.

Owns the outputs that have not ended and the prompts that they need, and puts
into the ready queues what each state makes ready. Invariants: a running output
has rows ready or in flight, or prompts that are; a prompt wanted by many is
encoded once; one that nobody wants is released; an output that has ended is in
no queue. Previews may also be wanted of outputs that have no life here: those of
another server.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from safelight_server.scheduler.deadlines import Deadlines
from safelight_server.scheduler.ready import ReadyQueues
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
    ScheduledOutput,
    StepCompleted,
)
from safelight_server.scheduler.waiting import WaitingQueue


@dataclass(slots=True)
class Life:
    """The state of one output.

    Attributes:
        step: steps made.
        unencoded: of its prompts, while it is ENCODING.
        todo: parts of the present step (or 0, the decoding) that are in no batch yet.
        in_flight: parts that are in a batch.
    """

    output: ScheduledOutput
    state: OutputState = OutputState.WAITING
    step: int = 0
    unencoded: int = 0
    todo: list[int] = field(default_factory=list)
    in_flight: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Prompt:
    """A conditioning id: who wants it, and the batch that encodes it. `asked`: someone wants the embedding itself."""

    key: str
    wanted_by: set[int] = field(default_factory=set)
    asked: bool = False
    encoded: bool = False
    batch_id: int | None = None


@dataclass(slots=True)
class Denoising:
    """What takes steps under one key."""

    num_outputs: int = 0
    num_rows: int = 0


class Lives:
    """The outputs that have not ended, by id.

    Attributes:
        previews: keys of the previews that an output stands in line for; none that is empty.
    """

    def __init__(self, waiting: WaitingQueue, ready: ReadyQueues, deadlines: Deadlines) -> None:
        self._waiting = waiting
        self._ready = ready
        self._deadlines = deadlines
        self.of: dict[int, Life] = {}
        self.previews: dict[int, set[str]] = {}
        self.prompts: dict[str, Prompt] = {}
        self.num_running = 0
        self._denoising: dict[str, Denoising] = {}

    def denoising(self, key: str) -> Denoising:
        """The outputs that take steps under a key, in a batch or not."""
        return self._denoising.get(key) or Denoising()

    def add(self, output: ScheduledOutput) -> None:
        """A new output waits."""
        self.of[output.output_id] = Life(output, step=output.first_step)
        self._waiting.push(output)
        self._deadlines.set(output.output_id, output.deadline)
        for conditioning_id in output.conditioning:
            prompt = self.prompts.setdefault(conditioning_id, Prompt(output.keys[Kind.ENCODE]))
            prompt.wanted_by.add(output.output_id)

    def start(self, output_id: int) -> None:
        """It leaves the waiting queue: its prompts are encoded, or it takes its first step, or is decoded."""
        life = self.of[output_id]
        if life.step == life.output.num_steps:
            self._ready_to_decode(life)
            return
        for conditioning_id in dict.fromkeys(life.output.conditioning):
            prompt = self.prompts[conditioning_id]
            if not prompt.encoded:
                life.unencoded += 1
                if prompt.batch_id is None:
                    self._ready.push((Kind.ENCODE, prompt.key), conditioning_id)
        if life.unencoded:
            self._move(life, OutputState.ENCODING)
        else:
            self._ready_to_step(life)

    def want_preview(self, output_id: int, key: str) -> None:
        """It stands in line for one row; once."""
        self.previews.setdefault(output_id, set()).add(key)
        self._ready.push((Kind.PREVIEW, key), output_id)

    def preview_taken(self, output_id: int, key: str) -> None:
        """It is in a batch."""
        keys = self.previews[output_id]
        keys.remove(key)
        if not keys:
            del self.previews[output_id]

    def drop_previews(self, output_id: int) -> None:
        """Nobody wants any that is not in a batch."""
        for key in self.previews.pop(output_id, ()):
            self._ready.discard((Kind.PREVIEW, key), output_id)

    def ask(self, conditioning_id: str, key: str) -> list[Event]:
        """Someone wants a prompt's embedding itself: `EmbeddingReady` follows, at once where it is there."""
        prompt = self.prompts.setdefault(conditioning_id, Prompt(key))
        if prompt.encoded:
            return [EmbeddingReady(conditioning_id)]
        prompt.asked = True
        if prompt.batch_id is None:
            self._ready.push((Kind.ENCODE, key), conditioning_id)
        return []

    def encoded(self, conditioning_id: str, batch_id: int) -> list[Event]:
        """A prompt's embedding is there; outputs that lacked only this one take their first step."""
        prompt = self.prompts.get(conditioning_id)
        if prompt is None or prompt.batch_id != batch_id:
            return []  # nobody wants it any more
        prompt.encoded, prompt.batch_id = True, None
        for life in self._encoding(prompt):
            life.unencoded -= 1
            if not life.unencoded:
                self._ready_to_step(life)
        return self._answer(conditioning_id, failed=False)

    def stepped(self, output_id: int, part: int) -> list[Event]:
        """A row is back; with the last row of a step the next one is ready, or the decoding."""
        life = self.of[output_id]
        life.in_flight.discard(part)
        if life.todo or life.in_flight:
            return []
        life.step += 1
        last = life.step == life.output.num_steps
        if last:
            self._ready_to_decode(life)
        else:
            self._ready_to_step(life)
        return [StepCompleted(output_id, life.step, last)]

    def encoding(self, batch: Batch) -> None:
        """Its prompts are in a batch."""
        for row in batch.rows:
            self.prompts[row.conditioning_id].batch_id = batch.batch_id

    def take_back(self, member: Member, batch: Batch) -> bool:
        """A batch failed: makes what it took of a member undone again. False where nobody wants that any more."""
        if isinstance(member, str):
            prompt = self.prompts.get(member)
            if prompt is None or prompt.batch_id != batch.batch_id:
                return False
            prompt.batch_id = None
            return prompt.asked or bool(self._encoding(prompt))
        if (life := self.of.get(member)) is None:
            return False
        parts = {row.part for row in batch.rows if row.output_id == member}
        life.in_flight -= parts
        life.todo = sorted({*life.todo, *parts})
        return True

    def give_up(self, member: Member, batch_id: int) -> list[Event]:
        """Ends an output without a picture; for a prompt, those that have started and need it."""
        if isinstance(member, str):
            prompt = self.prompts.get(member)
            if prompt is None or prompt.batch_id != batch_id:
                return []
            ids = [life.output.output_id for life in self._encoding(prompt)]
            answer = self._answer(member, failed=True)
        else:
            ids, answer = [member] if member in self.of else [], []
        return answer + [event for output_id in ids for event in (*self.end(output_id), OutputFailed(output_id))]

    def end(self, output_id: int) -> list[Event]:
        """Ends an output: it leaves every queue, and prompts that only it wanted are released."""
        life = self.of.pop(output_id)
        if life.state is OutputState.WAITING:
            self._waiting.remove(output_id)
        self._move(life, OutputState.ENDED)
        self._deadlines.set(output_id, None)
        for kind in (Kind.DENOISE, Kind.DECODE):
            self._ready.discard((kind, life.output.keys[kind]), output_id)
        self.drop_previews(output_id)
        return self._release(life.output)

    def _encoding(self, prompt: Prompt) -> list[Life]:
        lives = (self.of[output_id] for output_id in sorted(prompt.wanted_by))
        return [life for life in lives if life.state is OutputState.ENCODING]

    def _ready_to_step(self, life: Life) -> None:
        if life.state is not OutputState.DENOISING:
            self._move(life, OutputState.DENOISING)
        life.todo = list(range(life.output.rows_per_step))
        self._ready.push((Kind.DENOISE, life.output.keys[Kind.DENOISE]), life.output.output_id)

    def _ready_to_decode(self, life: Life) -> None:
        self._move(life, OutputState.DECODING)
        life.todo = [0]
        self._ready.push((Kind.DECODE, life.output.keys[Kind.DECODE]), life.output.output_id)

    def _move(self, life: Life, state: OutputState) -> None:
        if state not in TRANSITIONS[life.state]:
            raise InvariantError(f"output {life.output.output_id}: {life.state} -> {state}")
        self.num_running += (life.state is OutputState.WAITING) - (state is OutputState.ENDED)
        key, rows = life.output.keys[Kind.DENOISE], life.output.rows_per_step
        for at, change in ((life.state, -1), (state, 1)):
            if at is OutputState.DENOISING:
                tally = self._denoising.setdefault(key, Denoising())
                tally.num_outputs += change
                tally.num_rows += change * rows
                if not tally.num_outputs:
                    del self._denoising[key]
        life.state = state

    def _release(self, output: ScheduledOutput) -> list[Event]:
        events: list[Event] = []
        for conditioning_id in dict.fromkeys(output.conditioning):
            prompt = self.prompts[conditioning_id]
            prompt.wanted_by.discard(output.output_id)
            events += self._release_prompt(conditioning_id)
        return events

    def _answer(self, conditioning_id: str, *, failed: bool) -> list[Event]:
        """Those who asked for the embedding itself."""
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
        self._ready.discard((Kind.ENCODE, prompt.key), conditioning_id)
        return [EmbeddingReleased(conditioning_id)]
