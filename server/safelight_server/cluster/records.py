"""The stored form of a generation, from which another replica can continue it: the record, then its events.

An entry is JSON, or the bytes that streams get, and is sealed. Invariant: `parse`
returns the value that `dump` was called with.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass as checked

from safelight_server.domain.caller import Caller
from safelight_server.domain.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    GenerationCancelledError,
    InternalError,
    NotFoundError,
    SafelightError,
    UnavailableError,
)
from safelight_server.domain.events import (
    Finished,
    FinishReason,
    GenerationState,
    Origin,
    OutputFinished,
    StateEvent,
    Usage,
)
from safelight_server.domain.request import Request
from safelight_server.storage.sealed import CorruptError, Entry, Sealer

_USAGE = frozenset(field.name for field in fields(Usage))
LATER = frozenset({"cost_nanos", "currency", "num_rows_skipped"})
"""Fields of `Usage` that the first versions did not have."""
KEPT_S = 7 * 86_400.0
"""How long a sealed event can be opened. Redis drops it much earlier."""
ERRORS: dict[str, type[SafelightError]] = {
    error.__name__: error
    for error in (
        DeadlineExceededError,
        FailedPreconditionError,
        GenerationCancelledError,
        NotFoundError,
        UnavailableError,
    )
}


@checked(frozen=True, config=ConfigDict(ser_json_bytes="base64", val_json_bytes="base64"))
class GenerationRecord:
    """A generation as it was accepted.

    Attributes:
        deadline_at: Unix seconds on the shared clock; None: it has no deadline.
        origins: where each output comes from, as known when it was accepted.
        starts: which outputs began from a latent that is kept under their name.
        numerics_id, pipeline: numerics id and pipeline digest that it was accepted with; empty if an older server wrote
            the record.
    """

    identifier: str
    caller: Caller
    request: Request
    create_time: datetime
    deadline_at: float | None
    origins: tuple[Origin, ...]
    starts: tuple[bool, ...]
    numerics_id: str = ""
    pipeline: str = ""


_RECORD = TypeAdapter(GenerationRecord)


@dataclass(frozen=True, slots=True)
class EventRecord:
    """A state event with what it changed. Of kind "state" it has no number and is the generation's new state.

    Attributes:
        sequence: number of the event.
        data: the bytes that streams get.
        output_index, reason, step: the values of OutputFinished.
        error: the error of the generation, so far.
        usage, finish_time: the values of Finished.
        state: the state of the generation.
    """

    kind: Literal["accepted", "output", "finished", "state"]
    data: bytes
    sequence: int = 0
    output_index: int = -1
    reason: FinishReason | None = None
    step: int = 0
    state: GenerationState | None = None
    error: SafelightError | None = None
    usage: Usage = field(default_factory=Usage)
    finish_time: datetime | None = None


JournalEntry = GenerationRecord | EventRecord


def event_record(
    event: StateEvent, sequence: int, data: bytes, state: GenerationState, error: SafelightError | None, now: datetime
) -> EventRecord:
    """Returns the stored form of an event."""
    match event:
        case OutputFinished():
            return EventRecord("output", data, sequence, event.output_index, event.reason, event.step, error=error)
        case Finished():
            usage = event.usage
            return EventRecord("finished", data, sequence, state=state, error=error, usage=usage, finish_time=now)
        case _:
            return EventRecord("accepted", data, sequence)


def dump(sealer: Sealer, name: str, written: JournalEntry) -> bytes:
    """Serializes and seals an entry for the stream `name`."""
    match written:
        case GenerationRecord():
            entry = Entry(_RECORD.dump_json(written), {"kind": "record"})
        case EventRecord():
            facts: dict[str, object] = {"sequence": written.sequence, "output": written.output_index}
            facts["step"] = written.step
            facts |= {"reason": written.reason and written.reason.value, "state": written.state and written.state.value}
            facts |= {"error": _error(written.error), "usage": _usage_facts(written.usage)}
            facts["finish_time"] = written.finish_time and written.finish_time.isoformat()
            entry = Entry(written.data, {"kind": written.kind, "facts": json.dumps(facts)})
    return sealer.seal(name, entry, sealer.now() + KEPT_S)


def parse(sealer: Sealer, name: str, data: bytes) -> JournalEntry:
    """Opens and parses an entry.

    Raises:
        CorruptError, UnreadableError: the entry cannot be read; a server of another version may have written it.
    """
    entry, _ = sealer.open(name, data)
    try:
        return _parsed(entry)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"not an entry of this version: {error}") from None


def _parsed(entry: Entry) -> JournalEntry:
    kind = entry.metadata["kind"]
    if kind == "record":
        return _RECORD.validate_json(entry.data)
    facts = json.loads(entry.metadata["facts"])
    return EventRecord(
        kind,  # type: ignore[arg-type]  # as `dump` wrote it
        entry.data,
        facts["sequence"],
        facts["output"],
        FinishReason(facts["reason"]) if facts["reason"] else None,
        facts["step"],
        GenerationState(facts["state"]) if facts["state"] else None,
        _parsed_error(facts["error"]),
        _usage(facts["usage"]),
        datetime.fromisoformat(facts["finish_time"]) if facts["finish_time"] else None,
    )


def _usage_facts(usage: Usage) -> dict[str, object]:
    """A usage as JSON. Newer fields that are 0 or empty are left out, so that servers of older versions can read it."""
    return {name: value for name, value in asdict(usage).items() if value or name not in LATER}


def _usage(facts: dict[str, Any]) -> Usage:
    return Usage(**{name: value for name, value in facts.items() if name in _USAGE})


def _error(error: SafelightError | None) -> dict[str, object] | None:
    if error is None:
        return None
    return {
        "type": type(error).__name__,
        "message": error.message,
        "reason": error.reason,
        "metadata": error.metadata,
        "retry_after_s": error.retry_after_s,
    }


def _parsed_error(facts: dict[str, object] | None) -> SafelightError | None:
    if facts is None:
        return None
    kind = ERRORS.get(str(facts.pop("type")))
    return InternalError() if kind is None else kind(**facts)  # type: ignore[arg-type]  # as `_error` wrote it
