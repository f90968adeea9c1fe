"""Invariants of the scheduler's state, which hold after every operation; only tests run these checks."""

from __future__ import annotations

from collections.abc import Iterable

from safelight_server.scheduler.lives import Lives
from safelight_server.scheduler.ready import Queue, ReadyQueues
from safelight_server.scheduler.types import Batch, InvariantError, Kind, Limits, OutputState, Priority
from safelight_server.scheduler.waiting import WaitingQueue


def check(limits: Limits, waiting: WaitingQueue, lives: Lives, ready: ReadyQueues, in_flight: Iterable[Batch]) -> None:
    """Checks every invariant of the scheduler.

    Raises:
        InvariantError: the scheduler contradicts itself.
    """
    batches = list(in_flight)
    _check_batches(limits, lives, batches)
    _check_queues(lives, ready)
    _check_outputs(limits, waiting, lives, ready, batches)


def _check_batches(limits: Limits, lives: Lives, batches: list[Batch]) -> None:
    seen: set[tuple[Kind, int | str, int]] = set()
    for batch in batches:
        _require(0 < len(batch.rows) <= limits.max_rows(batch.kind, batch.key), "batch size")
        for row in batch.rows:
            place: tuple[Kind, int | str, int] = (batch.kind, row.output_id, row.part)
            if batch.kind is Kind.PREVIEW or (batch.kind is not Kind.ENCODE and row.output_id not in lives.of):
                continue
            if batch.kind is Kind.ENCODE:
                prompt = lives.prompts.get(row.conditioning_id)
                if prompt is None or prompt.batch_id != batch.batch_id:
                    continue
                place = (batch.kind, row.conditioning_id, 0)
            else:
                life = lives.of[row.output_id]
                _require(row.step == life.step, f"output {row.output_id} runs two steps at once")
                _require(row.part in life.in_flight and row.part not in life.todo, "row neither here nor there")
            _require(place not in seen, f"row {place} is in two batches")
            seen.add(place)


def _check_queues(lives: Lives, ready: ReadyQueues) -> None:
    for queue in ready:
        kind, key, priority = queue
        _require(ready.count(queue) > 0, "an empty queue is kept")
        for member in ready.members(queue):
            if isinstance(member, str):
                _require(member in lives.prompts, "a prompt that nobody wants is in line")
                continue
            if kind is Kind.PREVIEW:
                _require(lives.previews.get(member, {}).get(key) is priority, "a preview that nobody wants is in line")
                continue
            _require(member in lives.of, f"output {member} has ended, but is in line")
            _require(lives.of[member].priority is priority, f"output {member} is in the line of another class")
            _require(bool(lives.of[member].todo), f"output {member} is in line with nothing to do")


def _check_outputs(
    limits: Limits, waiting: WaitingQueue, lives: Lives, ready: ReadyQueues, batches: list[Batch]
) -> None:
    running = [life for life in lives.of.values() if life.state is not OutputState.WAITING]
    _require(len(running) == lives.num_running() <= limits.max_running, "running outputs")
    _require(len(waiting) + lives.num_running() == len(lives.of), "outputs")
    for priority in Priority:
        of_class = {life.output.output_id for life in running if life.priority is priority}
        listed = {output_id for of_caller in lives.running[priority].values() for output_id in of_caller}
        _require(of_class == listed and len(listed) == lives.num_running(priority), "slots of a class")
    parked = [life for life in lives.of.values() if life.parked]
    _require(all(life.state is OutputState.WAITING and not life.todo for life in parked), "a parked output runs")
    _require(len(parked) == lives.num_parked <= limits.max_parked, "parked outputs")
    encoding = {(batch.batch_id, row.conditioning_id) for batch in batches for row in batch.rows}
    for life in running:
        output = life.output
        if life.state is OutputState.ENCODING:
            lacks = [lives.prompts[i] for i in set(output.conditioning) if not lives.prompts[i].encoded]
            _require(len(lacks) == life.unencoded > 0, f"output {output.output_id} waits for nothing")
        else:
            kind = Kind.DENOISE if life.state is OutputState.DENOISING else Kind.DECODE
            _require(bool(life.todo or life.in_flight), f"output {output.output_id} is forgotten")
            in_line = ready.contains(Queue(kind, output.keys[kind], life.priority), output.output_id)
            _require(in_line == bool(life.todo), f"output {output.output_id} is not in line")
            num_rows = life.num_rows if life.state is OutputState.DENOISING else 1
            _require(
                {*life.todo, *life.in_flight} <= set(range(num_rows)), f"output {output.output_id} has rows too many"
            )
    for conditioning_id, prompt in lives.prompts.items():
        _require(bool(prompt.wanted_by) or prompt.asked, f"prompt {conditioning_id} is kept for nobody")
        wanted = prompt.asked or any(
            lives.of[output_id].state is OutputState.ENCODING for output_id in prompt.wanted_by
        )
        flying = (prompt.batch_id, conditioning_id) in encoding
        if wanted and not prompt.encoded:
            in_line = ready.contains(Queue(Kind.ENCODE, prompt.key, prompt.priority), conditioning_id)
            _require(in_line != flying, f"prompt {conditioning_id} is forgotten, or encoded twice")
    for key in {output.keys[Kind.DENOISE] for output in (life.output for life in running)}:
        members = [life.output for life in running if life.output.keys[Kind.DENOISE] == key]
        members = [output for output in members if lives.of[output.output_id].state is OutputState.DENOISING]
        tally = lives.denoising(key)
        rows = sum(output.num_rows(lives.of[output.output_id].step) for output in members)
        _require((tally.num_outputs, tally.num_rows) == (len(members), rows), "rows that take steps")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise InvariantError(what)
