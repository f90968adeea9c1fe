"""Invariants of the scheduler's state, which hold after every operation; only tests run these checks."""

from __future__ import annotations

from collections.abc import Iterable

from safelight_server.scheduler.output_table import OutputTable
from safelight_server.scheduler.ready import Queue, ReadyQueues
from safelight_server.scheduler.types import Batch, InvariantError, Kind, Limits, OutputState, Priority
from safelight_server.scheduler.waiting import WaitingQueue


def check(
    limits: Limits, waiting: WaitingQueue, table: OutputTable, ready: ReadyQueues, in_flight: Iterable[Batch]
) -> None:
    """Checks every invariant of the scheduler.

    Raises:
        InvariantError: the scheduler contradicts itself.
    """
    batches = list(in_flight)
    _check_batches(limits, table, batches)
    _check_queues(table, ready)
    _check_outputs(limits, waiting, table, ready, batches)


def _check_batches(limits: Limits, table: OutputTable, batches: list[Batch]) -> None:
    seen: set[tuple[Kind, int | str, int]] = set()
    for batch in batches:
        _require(0 < len(batch.rows) <= limits.max_rows(batch.kind, batch.key), "batch size")
        for row in batch.rows:
            place: tuple[Kind, int | str, int] = (batch.kind, row.output_id, row.part)
            if batch.kind is Kind.PREVIEW or (batch.kind is not Kind.ENCODE and row.output_id not in table.of):
                continue
            if batch.kind is Kind.ENCODE:
                prompt = table.prompts.get(row.conditioning_id)
                if prompt is None or prompt.batch_id != batch.batch_id:
                    continue
                place = (batch.kind, row.conditioning_id, 0)
            else:
                entry = table.of[row.output_id]
                _require(row.step == entry.step, f"output {row.output_id} runs two steps at once")
                _require(row.part in entry.in_flight and row.part not in entry.todo, "row neither queued nor in flight")
            _require(place not in seen, f"row {place} is in two batches")
            seen.add(place)


def _check_queues(table: OutputTable, ready: ReadyQueues) -> None:
    for queue in ready:
        kind, key, priority = queue
        _require(ready.count(queue) > 0, "an empty queue is kept")
        for member in ready.members(queue):
            if isinstance(member, str):
                _require(member in table.prompts, "a prompt that nobody needs is queued")
                continue
            if kind is Kind.PREVIEW:
                _require(table.previews.get(member, {}).get(key) is priority, "a preview that nobody needs is queued")
                continue
            _require(member in table.of, f"output {member} has ended, but is queued")
            _require(table.of[member].priority is priority, f"output {member} is in the queue of another class")
            _require(bool(table.of[member].todo), f"output {member} is queued with nothing to do")


def _check_outputs(
    limits: Limits, waiting: WaitingQueue, table: OutputTable, ready: ReadyQueues, batches: list[Batch]
) -> None:
    running = [entry for entry in table.of.values() if entry.state is not OutputState.WAITING]
    _require(len(running) == table.num_running() <= limits.max_running, "running outputs")
    _require(len(waiting) + table.num_running() == len(table.of), "outputs")
    for priority in Priority:
        of_class = {entry.output.output_id for entry in running if entry.priority is priority}
        listed = {output_id for of_caller in table.running[priority].values() for output_id in of_caller}
        _require(of_class == listed and len(listed) == table.num_running(priority), "slots of a class")
    parked = [entry for entry in table.of.values() if entry.parked]
    _require(all(entry.state is OutputState.WAITING and not entry.todo for entry in parked), "a parked output runs")
    _require(len(parked) == table.num_parked <= limits.max_parked, "parked outputs")
    encoding = {(batch.batch_id, row.conditioning_id) for batch in batches for row in batch.rows}
    for entry in running:
        output = entry.output
        if entry.state is OutputState.ENCODING:
            lacks = [table.prompts[i] for i in set(output.conditioning) if not table.prompts[i].encoded]
            _require(len(lacks) == entry.unencoded > 0, f"output {output.output_id} waits for nothing")
        else:
            kind = Kind.DENOISE if entry.state is OutputState.DENOISING else Kind.DECODE
            _require(bool(entry.todo or entry.in_flight), f"output {output.output_id} is forgotten")
            queued = ready.contains(Queue(kind, output.keys[kind], entry.priority), output.output_id)
            _require(queued == bool(entry.todo), f"output {output.output_id} is not queued")
            num_rows = entry.num_rows if entry.state is OutputState.DENOISING else 1
            _require(
                {*entry.todo, *entry.in_flight} <= set(range(num_rows)), f"output {output.output_id} has rows too many"
            )
    for conditioning_id, prompt in table.prompts.items():
        _require(bool(prompt.wanted_by) or prompt.asked, f"prompt {conditioning_id} is kept for nobody")
        wanted = prompt.asked or any(
            table.of[output_id].state is OutputState.ENCODING for output_id in prompt.wanted_by
        )
        in_flight_now = (prompt.batch_id, conditioning_id) in encoding
        if wanted and not prompt.encoded:
            queued = ready.contains(Queue(Kind.ENCODE, prompt.key, prompt.priority), conditioning_id)
            _require(queued != in_flight_now, f"prompt {conditioning_id} is forgotten, or encoded twice")
    for key in {output.keys[Kind.DENOISE] for output in (entry.output for entry in running)}:
        members = [entry.output for entry in running if entry.output.keys[Kind.DENOISE] == key]
        members = [output for output in members if table.of[output.output_id].state is OutputState.DENOISING]
        tally = table.denoising(key)
        rows = sum(output.num_rows(table.of[output.output_id].step) for output in members)
        _require((tally.num_outputs, tally.num_rows) == (len(members), rows), "rows that take steps")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise InvariantError(what)
