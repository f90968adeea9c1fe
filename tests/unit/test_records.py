"""Records of generations read back as they were written."""

from __future__ import annotations

import json
import time
from dataclasses import fields, replace
from datetime import UTC, datetime

import pytest
from safelight_server.cluster.records import EventRecord, GenerationRecord, JournalEntry, dump, event_record, parse
from safelight_server.domain.caller import Caller
from safelight_server.domain.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    UnavailableError,
)
from safelight_server.domain.events import (
    Accepted,
    Disposition,
    Finished,
    FinishReason,
    GenerationState,
    Origin,
    OutputFinished,
    Timings,
    Usage,
)
from safelight_server.domain.request import (
    AdapterUse,
    Branch,
    CacheMode,
    CachePolicy,
    ControlUse,
    Degradation,
    DegradationKind,
    DisconnectPolicy,
    MediaType,
    Notice,
    PixelEncoding,
    PreviewMethod,
    PreviewPolicy,
    QualityFloor,
    Request,
    Spec,
)
from safelight_server.scheduler import Priority
from safelight_server.storage.keyring import Keyring
from safelight_server.storage.sealed import CorruptError, Sealer

from tests.support.streams import RAW, SPEC

NOW = datetime(2026, 11, 25, 3, 0, 0, 123456, tzinfo=UTC)
REQUEST = Request(
    replace(
        SPEC,
        seeds=(0, 2**64 - 1),
        guidance_scale=0.1,
        negative_token_ids=(1, 2),
        prompt="a \u2603 \U0001f9ea",
        guidance_rescale=0.7,
        guidance_interval=(0.1, 0.9),
        adapters=(AdapterUse("pixel", 0.8, "ab" * 32),),
        controls=(ControlUse("edges", "cd" * 32, 0.8, 0.1, 0.9),),
        image_prompt="cd" * 32,
        image_prompt_scale=0.5,
    ),
    PreviewPolicy(PixelEncoding(MediaType.JPEG, 3), PreviewMethod.LINEAR, 64, 3, 0.1, 1000),
    PixelEncoding(MediaType.RAW_RGBA8, 85, 256, True),
    Priority.BATCH,
    DisconnectPolicy(True, 3.3),
    CachePolicy(CacheMode.ALLOW_SIMILAR, 0.97),
    Branch("b", 1, 3),
    "6f1c0a52-9b3e-4d0f-8a55-2f0c7d1e9b64",
    bytes(range(256)),
    {"a": "b"},
    (Notice("PROMPT_TRUNCATED", "cut"),),
    QualityFloor(8, True, 0.9),
    (Degradation(DegradationKind.FEWER_STEPS, "50", "8"),),
)
RECORD = GenerationRecord(
    "0" * 32,
    Caller("ann", "studio"),
    REQUEST,
    NOW,
    1764.25,
    (Origin(), Origin(Disposition.LATENT, 0.91, "generations/x", 7)),
    (False, True),
    "numerics",
    "digest",
)
USAGE = Usage(0.1, 2, 3, 4, 5)
UNAVAILABLE = UnavailableError("later", reason="DRAINING", metadata={"k": "v"}, retry_after_s=1.5)


def through(written: JournalEntry) -> JournalEntry:
    sealer = Sealer(Keyring.random())
    return parse(sealer, "name", dump(sealer, "name", written))


def test_a_record_is_read_back_whole() -> None:
    assert through(RECORD) == RECORD
    assert through(replace(RECORD, deadline_at=None)) == replace(RECORD, deadline_at=None)


def test_a_record_of_an_older_server_says_no_kind() -> None:
    sealer = Sealer(Keyring.random())
    entry, _ = sealer.open("name", dump(sealer, "name", RECORD))
    facts = json.loads(entry.data)
    del facts["numerics_id"], facts["pipeline"]
    spec = facts["request"]["spec"]
    newer = ("guidance_rescale", "guidance_interval", "adapters", "controls", "image_prompt", "image_prompt_scale")
    for name in newer:
        del spec[name]
    older = sealer.seal("name", replace(entry, data=json.dumps(facts).encode()), time.time() + 60.0)
    defaults = {field.name: field.default for field in fields(Spec) if field.name in newer}
    plain = replace(REQUEST, spec=replace(REQUEST.spec, **defaults))
    assert parse(sealer, "name", older) == replace(RECORD, numerics_id="", pipeline="", request=plain)


@pytest.mark.parametrize(
    "event",
    [
        Accepted(SPEC, "numerics", RAW, 1.0),
        OutputFinished(2, FinishReason.COMPLETED, 20),
        Finished(None, USAGE, Timings()),
    ],
)
def test_events_keep_the_bytes_that_streams_get(event: Accepted | OutputFinished | Finished) -> None:
    found = through(event_record(event, 7, b"\x00bytes", GenerationState.SUCCEEDED, None, NOW))
    assert isinstance(found, EventRecord)
    assert (found.data, found.sequence) == (b"\x00bytes", 7)
    if isinstance(event, OutputFinished):
        assert (found.output_index, found.reason, found.step) == (2, FinishReason.COMPLETED, 20)
    if isinstance(event, Finished):
        assert (found.state, found.usage, found.finish_time) == (GenerationState.SUCCEEDED, USAGE, NOW)


def test_errors_come_back_as_they_were() -> None:
    finished = Finished(UNAVAILABLE, USAGE, Timings())
    found = through(event_record(finished, 3, b"", GenerationState.FAILED, UNAVAILABLE, NOW))
    assert isinstance(found, EventRecord)
    error = found.error
    assert isinstance(error, UnavailableError)
    assert (error.message, error.reason, error.metadata, error.retry_after_s) == ("later", "DRAINING", {"k": "v"}, 1.5)
    for known in (DeadlineExceededError, FailedPreconditionError):
        other = through(event_record(finished, 3, b"", GenerationState.FAILED, known("why"), NOW))
        assert isinstance(other, EventRecord) and isinstance(other.error, known)
    bug = through(event_record(finished, 3, b"", GenerationState.FAILED, InternalError(), NOW))
    assert isinstance(bug, EventRecord) and isinstance(bug.error, InternalError)


def test_a_record_counts_in_its_own_stream_only() -> None:
    sealer = Sealer(Keyring.random())
    with pytest.raises(CorruptError):
        parse(sealer, "other", dump(sealer, "name", RECORD))


def test_a_cost_is_kept_and_a_server_that_knows_none_can_read_what_has_none() -> None:
    sealer = Sealer(Keyring.random())

    def usage_facts(usage: Usage) -> dict[str, object]:
        finished = event_record(Finished(None, usage, Timings()), 1, b"", GenerationState.SUCCEEDED, None, NOW)
        data = dump(sealer, "name", finished)
        found = parse(sealer, "name", data)
        assert isinstance(found, EventRecord) and found.usage == usage
        facts: dict[str, object] = json.loads(sealer.open("name", data)[0].metadata["facts"])["usage"]
        return facts

    assert usage_facts(replace(USAGE, cost_nanos=7, currency="EUR"))["cost_nanos"] == 7
    assert usage_facts(replace(USAGE, num_rows_skipped=8))["num_rows_skipped"] == 8
    assert not {"cost_nanos", "currency", "num_rows_skipped"} & usage_facts(USAGE).keys()
