"""State machine of an output: waiting, encoding its prompts, denoising, decoding, ended (`types.TRANSITIONS`).

Holds the outputs that have not ended and the prompts that they need, and adds
to the ready queues the rows that each state makes ready.

Invariants:
- A running output has rows that are ready or in flight, or waits for prompts
  that are.
- A prompt that many outputs need is encoded once, and released when nobody
  needs it any more.
- An output that has ended is in no queue.

Previews can also be queued for outputs of another server, which have no `Life`
here.
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
        step: number of steps made.
        unencoded: number of its prompts that are not encoded yet, while it is ENCODING.
        todo: parts (`Row.part`) of the current step that are in no batch yet; [0] for a decoding.
        in_flight: parts of the current step that are in a batch.
    """

    output: ScheduledOutput
    state: OutputState = OutputState.WAITING
    step: int = 0
    unencoded: int = 0
    todo: list[int] = field(default_factory=list)
    in_flight: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Prompt:
    """The state of one prompt embedding, by conditioning id.

    Attributes:
        key: the ENCODE key that it can share a batch under.
        wanted_by: ids of the outputs that need it.
        asked: whether a caller of `Lives.ask` waits for it.
        encoded: whether the embedding has been computed.
        batch_id: the batch in flight that encodes it.
    """

    key: str
    wanted_by: set[int] = field(default_factory=set)
    asked: bool = False
    encoded: bool = False
    batch_id: int | None = None


@dataclass(slots=True)
class Denoising:
    """How many outputs are DENOISING under one key, and how many rows one step of all of them has."""

    num_outputs: int = 0
    num_rows: int = 0


class Lives:
    """The outputs that have not ended, by id.

    Attributes:
        of: state by output id.
        previews: keys of the queued previews by output id; no set is empty.
        prompts: the prompts that somebody needs, by conditioning id.
        num_running: outputs that have started and not ended.
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
        """Counts the outputs that are DENOISING under a key, whether their rows are queued or in flight."""
        return self._denoising.get(key) or Denoising()

    def add(self, output: ScheduledOutput) -> None:
        """Adds a new output to the waiting queue and notes which prompts it needs."""
        self.of[output.output_id] = Life(output, step=output.first_step)
        self._waiting.push(output)
        self._deadlines.set(output.output_id, output.deadline)
        for conditioning_id in output.conditioning:
            prompt = self.prompts.setdefault(conditioning_id, Prompt(output.keys[Kind.ENCODE]))
            prompt.wanted_by.add(output.output_id)

    def start(self, output_id: int) -> None:
        """Starts an output that has got a slot: queues its missing prompts, its first step or its decoding."""
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
        """Queues one preview row of an output under `key`; does nothing if one is queued already."""
        self.previews.setdefault(output_id, set()).add(key)
        self._ready.push((Kind.PREVIEW, key), output_id)

    def preview_taken(self, output_id: int, key: str) -> None:
        """Forgets a queued preview whose row has been taken into a batch."""
        keys = self.previews[output_id]
        keys.remove(key)
        if not keys:
            del self.previews[output_id]

    def drop_previews(self, output_id: int) -> None:
        """Removes all queued previews of an output. Previews that are in a batch already still run."""
        for key in self.previews.pop(output_id, ()):
            self._ready.discard((Kind.PREVIEW, key), output_id)

    def ask(self, conditioning_id: str, key: str) -> list[Event]:
        """Has a prompt encoded for its embedding alone.

        Returns:
            `EmbeddingReady` if it is encoded already; else nothing, and `encoded` or `give_up` returns the event later.
        """
        prompt = self.prompts.setdefault(conditioning_id, Prompt(key))
        if prompt.encoded:
            return [EmbeddingReady(conditioning_id)]
        prompt.asked = True
        if prompt.batch_id is None:
            self._ready.push((Kind.ENCODE, key), conditioning_id)
        return []

    def encoded(self, conditioning_id: str, batch_id: int) -> list[Event]:
        """Records that a batch has encoded a prompt; outputs that lacked only this prompt become ready to step."""
        prompt = self.prompts.get(conditioning_id)
        if prompt is None or prompt.batch_id != batch_id:
            return []  # released, or being encoded anew in another batch
        prompt.encoded, prompt.batch_id = True, None
        for life in self._encoding(prompt):
            life.unencoded -= 1
            if not life.unencoded:
                self._ready_to_step(life)
        return self._answer(conditioning_id, failed=False)

    def stepped(self, output_id: int, part: int) -> list[Event]:
        """Records that a row of a step came back; after the last row, queues the next step or the decoding."""
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
        """Notes which batch encodes its prompts."""
        for row in batch.rows:
            self.prompts[row.conditioning_id].batch_id = batch.batch_id

    def take_back(self, member: Member, batch: Batch) -> bool:
        """Undoes what a failed batch took of a member. False if nobody needs the member any more."""
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
        """Ends an output without a picture; for a prompt, every started output that waits for its embedding."""
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
        """Ends an output: removes it from every queue and releases the prompts that only it needed."""
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
        self._ready.discard((Kind.ENCODE, prompt.key), conditioning_id)
        return [EmbeddingReleased(conditioning_id)]
