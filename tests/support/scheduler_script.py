"""Runs the scheduler's golden scripts: blocks of commands, a line `----`, and the output that they must give.

A command is a word, ids and options (`add 1..3 steps=2 rows=2 guided=0..1`). The output names rows as output/step, with `c` or
`u` for the conditional and the unconditional row of a guided step. The scheduler's invariants are checked after every
command.
"""

from __future__ import annotations

from collections.abc import Iterator

from safelight_server.scheduler import (
    Batch,
    EmbeddingReleased,
    Event,
    Kind,
    Limits,
    OutputDecoded,
    OutputExpired,
    OutputFailed,
    Priority,
    ScheduledOutput,
    Scheduler,
    StepCompleted,
)

SEPARATOR = "----"


def rewritten(script: str) -> str:
    """The script with its outputs replaced by those that its commands give now."""
    player = Player()
    blocks = []
    for block in script.strip().split("\n\n"):
        commands = block.split(f"\n{SEPARATOR}", 1)[0].splitlines()
        spoken = [line for line in commands if not line.startswith("#")]
        trace = [line for command in spoken for line in player.play(command)]
        blocks.append("\n".join([*commands, *([SEPARATOR, *trace] if spoken else [])]))
    return "\n\n".join(blocks) + "\n"


class Player:
    """Runs commands on one scheduler with a clock of its own. Method `_word` runs command `word`."""

    def __init__(self) -> None:
        self._now = 0.0
        self._base, self._row = 20.0, 1.0
        self._flying: dict[int, Batch] = {}
        self._back: set[int] = set()
        self._guided: set[int] = set()
        self._scheduler: Scheduler

    def seconds(self, kind: Kind, key: str, rows: int) -> float:
        """Milliseconds that a call takes; calls other than denoiser steps take a tenth."""
        return (self._base + self._row * rows) * (1.0 if kind is Kind.DENOISE else 0.1)

    def play(self, command: str) -> list[str]:
        """Runs a command and checks the invariants; returns the lines of its output."""
        word, *rest = command.split()
        options = dict(part.split("=") for part in rest if "=" in part)
        ids = [part for part in rest if "=" not in part]
        trace = list(getattr(self, f"_{word}")(ids, options))
        self._scheduler.check_invariants()
        return trace

    def _limits(self, ids: list[str], options: dict[str, str]) -> Iterator[str]:
        self._base, self._row = float(options.get("base", 20)), float(options.get("row", 1))
        rows, share = int(options.get("rows", 64)), float(options.get("previews", 0.1))
        limits = Limits(
            int(options.get("running", 64)), lambda kind, key: rows, int(options.get("instances", 1)), share
        )
        self._scheduler = Scheduler(limits, self)
        self._instances = limits.num_instances
        self._flying, self._back, self._guided = {}, set(), set()
        yield from ()

    def _add(self, ids: list[str], options: dict[str, str]) -> Iterator[str]:
        key, rows = options.get("key", ""), int(options.get("rows", 1))
        prompts = (options.get("prompt", "prompt"), "negative")
        for output_id in spread(ids):
            output = ScheduledOutput(
                output_id,
                options.get("caller", "someone"),
                Priority[options.get("class", "standard").upper()],
                int(options.get("steps", 2)),
                rows,
                {Kind.ENCODE: f"text{key}", Kind.DENOISE: f"denoiser{key}", Kind.DECODE: f"decoder{key}"},
                tuple(f"{prompt}{key}" for prompt in prompts[:rows]),
                float(options["deadline"]) if "deadline" in options else None,
                int(options.get("first_step", 0)),
                guided_steps=guided(options["guided"]) if "guided" in options else None,
            )
            if rows == 2:
                self._guided.add(output_id)
            self._scheduler.add(output, self._now)
        yield from ()

    def _schedule(self, ids: list[str], options: dict[str, str]) -> Iterator[str]:
        busy = {batch.instance for batch in self._flying.values() if batch.batch_id not in self._back}
        free = [instance for instance in range(self._instances) if instance not in busy]
        batches = self._scheduler.schedule(self._now, free, full_only="full_only" in ids)
        for batch in batches:
            self._flying[batch.batch_id] = batch
            yield f"batch {batch.batch_id} on instance {batch.instance}: {batch.kind.value} {batch.key}: {self._rows(batch)}"
        if not batches:
            yield "nothing"

    def _complete(self, ids: list[str], options: dict[str, str]) -> Iterator[str]:
        for batch_id in sorted(self._flying) if ids == ["all"] else spread(ids):
            del self._flying[batch_id]
            yield from written(self._scheduler.complete(batch_id))

    def _returned(self, ids: list[str], options: dict[str, str]) -> Iterator[str]:
        """Frees the instances of these batches; the scheduler does not have their results yet."""
        self._back.update(spread(ids))
        yield from ()

    def _fail(self, ids: list[str], options: dict[str, str]) -> Iterator[str]:
        given_up = [int(name) if name.isdigit() else name for name in options.get("given_up", "").split(",")]
        del self._flying[int(ids[0])]
        yield from written(self._scheduler.fail(int(ids[0]), given_up))

    def _now_is(self, ids: list[str], options: dict[str, str]) -> Iterator[str]:
        self._now = float(ids[0])
        yield from written(self._scheduler.expire(self._now))

    def _cancel(self, ids: list[str], options: dict[str, str]) -> Iterator[str]:
        for output_id in spread(ids):
            yield from written(self._scheduler.cancel(output_id))

    def _set(self, ids: list[str], options: dict[str, str]) -> Iterator[str]:
        for output_id in spread(ids):
            if "class" in options:
                self._scheduler.set_priority(output_id, Priority[options["class"].upper()])
            if "deadline" in options:
                deadline = None if options["deadline"] == "none" else float(options["deadline"])
                self._scheduler.set_deadline(output_id, deadline)
        yield from ()

    def _preview(self, ids: list[str], options: dict[str, str]) -> Iterator[str]:
        for output_id in spread(ids):
            self._scheduler.want_preview(output_id, options.get("key", "previews"))
        yield from ()

    def _instances_are(self, ids: list[str], options: dict[str, str]) -> Iterator[str]:
        self._instances = int(ids[0])
        self._scheduler.set_instances(self._instances)
        yield from ()

    def _turns(self, ids: list[str], options: dict[str, str]) -> Iterator[str]:
        """Repeats: ask for a preview of an output (`preview=ID`), schedule, complete all batches."""
        for _ in range(int(ids[0])):
            if "preview" in options:
                self._scheduler.want_preview(int(options["preview"]), "previews")
            yield from self._schedule([], {})
            list(self._complete(["all"], {}))

    def _develop(self, ids: list[str], options: dict[str, str]) -> Iterator[str]:
        """Runs until a number of further outputs is decoded; yields their order."""
        decoded: list[str] = []
        while len(decoded) < int(ids[0]):
            list(self._schedule([], {}))
            for batch in [self._flying.pop(batch_id) for batch_id in sorted(self._flying)]:
                events = self._scheduler.complete(batch.batch_id)
                decoded += [str(event.output_id) for event in events if isinstance(event, OutputDecoded)]
        yield f"decoded {' '.join(decoded)}"

    def _show(self, ids: list[str], options: dict[str, str]) -> Iterator[str]:
        s = self._scheduler
        yield f"{s.num_running} running, {s.num_waiting()} waiting, {s.num_free} slots free"
        for priority in Priority:
            if order := s.waiting_order(priority):
                yield f"{priority.name.lower()}: {' '.join(map(str, order))}"

    def _rows(self, batch: Batch) -> str:
        if batch.kind is Kind.ENCODE:
            return " ".join(row.conditioning_id for row in batch.rows)
        if batch.kind is not Kind.DENOISE:
            return " ".join(str(row.output_id) for row in batch.rows)
        parts = [("cu"[row.part] if row.output_id in self._guided else "") for row in batch.rows]
        return " ".join(f"{row.output_id}/{row.step}{part}" for row, part in zip(batch.rows, parts, strict=True))


def guided(text: str) -> range:
    """The steps with guidance, from 0: `2..5` is 2 to 5, `none` is none."""
    first, _, last = text.partition("..")
    return range(0) if text == "none" else range(int(first), int(last or first) + 1)


def spread(ids: list[str]) -> list[int]:
    """Expands ids and ranges: `1 3..5` is 1, 3, 4, 5."""
    ends = [part.split("..") for part in ids]
    return [number for at in ends for number in range(int(at[0]), int(at[-1]) + 1)]


def written(events: list[Event]) -> Iterator[str]:
    """Describes the scheduler's events, one line each."""
    for event in events:
        match event:
            case StepCompleted(output_id, step, last):
                yield f"output {output_id} has made {step} steps{', the last' if last else ''}"
            case OutputDecoded(output_id):
                yield f"output {output_id} is decoded"
            case OutputFailed(output_id):
                yield f"output {output_id} has failed"
            case OutputExpired(output_id):
                yield f"output {output_id} has expired"
            case EmbeddingReleased(conditioning_id):
                yield f"embedding of {conditioning_id} is released"
