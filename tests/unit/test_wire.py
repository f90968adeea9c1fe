"""Conversion to and from messages of the API loses nothing, and a status fits into a call's trailers."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from hypothesis import given
from hypothesis import strategies as st
from safelight.v1 import generation_pb2 as pb
from safelight_server import wire
from safelight_server.domain.errors import (
    AlreadyExistsError,
    FieldViolation,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    QueueFullError,
    SafelightError,
)
from safelight_server.domain.ktx2 import TextureFormat
from safelight_server.domain.request import MediaType, PixelEncoding, PreviewMethod
from safelight_server.runtime.base import CostCurve
from safelight_server.runtime.simulated import SimulatedRuntime
from safelight_server.scheduler import Priority
from safelight_server.validation import RequestLimits, body_digest, resolve_request
from safelight_server.wire import enums, statuses, times

from tests.support.pipelines import adapted_catalog, small_catalog, small_pipeline

LIMITS = RequestLimits(max_prompt_chars=100, max_request_rows=131_072, resume_grace_s=30.0, max_resume_grace_s=600.0)
M = TypeVar("M", bound=Message)
UUID = "6f1c0a52-9b3e-4d0f-8a55-2f0c7d1e9b64"


def details(error: SafelightError) -> dict[str, AnyMessage]:
    return {detail.type_url.rpartition(".")[2]: detail for detail in wire.status_of(error).details}


def unpacked(detail: AnyMessage, message: M) -> M:
    assert detail.Unpack(message)
    return message


def test_every_status_has_its_code_its_reason_and_the_domain() -> None:
    for kind in subclasses(SafelightError):
        error = kind() if kind is InternalError else kind([]) if kind is InvalidRequestError else kind("what")
        status = wire.status_of(error)
        assert status.code == kind.status.value[0]
        assert status.message == error.message
        info = unpacked(status.details[0], error_details_pb2.ErrorInfo())
        assert (info.domain, info.reason) == ("safelight", error.reason)


def subclasses(kind: type[SafelightError]) -> list[type[SafelightError]]:
    return [each for sub in kind.__subclasses__() for each in (sub, *subclasses(sub))]


def test_violations_become_a_bad_request() -> None:
    error = InvalidRequestError([FieldViolation("spec.prompt", "must not be blank"), FieldViolation("labels", "no")])
    bad = unpacked(details(error)["BadRequest"], error_details_pb2.BadRequest())
    assert [(v.field, v.description) for v in bad.field_violations] == [
        ("spec.prompt", "must not be blank"),
        ("labels", "no"),
    ]
    missing = NotFoundError("there is no model", violations=[FieldViolation("spec.model", "there is no model")])
    assert "BadRequest" in details(missing)
    assert "BadRequest" not in details(AlreadyExistsError("used"))


def test_a_full_queue_says_what_is_full_and_when_to_come_back() -> None:
    error = QueueFullError(
        "full", metadata={"bound": "class", "subject": "class BATCH", "limit": "7"}, retry_after_s=2.5
    )
    found = details(error)
    quota = unpacked(found["QuotaFailure"], error_details_pb2.QuotaFailure())
    assert [(v.subject, v.description) for v in quota.violations] == [("class BATCH", "full")]
    retry = unpacked(found["RetryInfo"], error_details_pb2.RetryInfo())
    assert retry.retry_delay.ToMilliseconds() == 2500
    info = unpacked(found["ErrorInfo"], error_details_pb2.ErrorInfo())
    assert info.metadata["limit"] == "7"


def test_no_retry_is_promised_where_none_makes_sense() -> None:
    assert "RetryInfo" not in details(QueueFullError("never", metadata={"subject": "class BATCH"}))


def test_a_status_travels_in_the_trailers() -> None:
    error = NotFoundError("gone")
    expected = wire.status_of(error).SerializeToString()
    assert wire.trailing_metadata(error) == (("grpc-status-details-bin", expected),)


def test_the_worst_status_fits_into_the_trailers(tmp_path: Path) -> None:
    """8 KiB is gRPC's default; the message is sent percent-encoded, the details as base64."""
    message = pb.GenerateRequest(request_id="\U0001f600" * 999, spec=pb.GenerationSpec(num_inference_steps=0))
    message.spec.sampler.name = "\U0001f600" * 999
    for index in range(16):
        message.labels["\U0001f600" * 64 + str(index)] = "v" * 256
    with pytest.raises(InvalidRequestError) as refused:
        resolve_request(message, small_catalog(tmp_path), LIMITS)
    status = wire.status_of(refused.value)
    percent_encoded = sum(1 if 0x20 <= byte < 0x7F else 3 for byte in status.message.encode())
    assert percent_encoded + len(status.SerializeToString()) * 4 / 3 < 7500


def test_a_spec_sent_again_is_the_same_spec(tmp_path: Path) -> None:
    catalog = adapted_catalog(tmp_path, "pixel", "glow")
    sent = pb.GenerateRequest(
        spec=pb.GenerationSpec(
            prompt="red potion",
            prompts=[pb.Prompt(role=pb.Prompt.ROLE_NEGATIVE, text="blue")],
            height_px=96,
            guidance_scale=2.5,
            guidance_rescale=0.7,
            guidance_interval=pb.GuidanceInterval(start=0.1, end=0.9),
            sampler=pb.SamplerSpec(eta=0.3, spacing=pb.TIMESTEP_SPACING_LEADING),
            outputs=[pb.OutputSpec(), pb.OutputSpec(seed=7)],
            init_image=f"images/{'ab' * 32}",
            strength=0.7,
            mask=f"images/{'cd' * 32}",
            adapters=[pb.Adapter(name="pixel", scale=0.8), pb.Adapter(name="glow")],
            controls=[
                pb.Control(name="edges", image=f"images/{'ef' * 32}", scale=0.7),
                pb.Control(name="depth", image=f"images/{'01' * 32}", start=0.1, end=0.6),
            ],
            image_prompt=pb.ImagePrompt(image=f"images/{'ef' * 32}", scale=0.6),
        )
    )
    first = resolve_request(sent, catalog, LIMITS).spec
    effective = pb.GenerateRequest(spec=wire.spec_message(first))
    assert resolve_request(effective, catalog, LIMITS).spec == first
    karras = pb.SamplerSpec(name="euler", sigma_schedule=pb.SIGMA_SCHEDULE_KARRAS)
    sent.spec.sampler.CopyFrom(karras)
    second = resolve_request(sent, catalog, LIMITS).spec
    effective = pb.GenerateRequest(spec=wire.spec_message(second))
    assert not effective.spec.sampler.HasField("eta")
    assert resolve_request(effective, catalog, LIMITS).spec == second


@given(
    st.builds(
        PixelEncoding,
        media_type=st.sampled_from(MediaType),
        quality=st.integers(1, 100),
        row_alignment_bytes=st.sampled_from([4, 64, 4096]),
        bottom_up=st.booleans(),
        texture_format=st.sampled_from(TextureFormat),
    )
)
def test_an_encoding_tells_what_counts_for_it(encoding: PixelEncoding) -> None:
    message = wire.encoding_message(encoding)
    assert message.media_type == encoding.media_type.value
    lossy, raw = encoding.media_type in (MediaType.JPEG, MediaType.WEBP), encoding.media_type is MediaType.RAW_RGBA8
    assert message.HasField("quality") == lossy
    texture = encoding.media_type is MediaType.KTX2
    assert message.HasField("row_alignment_bytes") == raw
    assert (message.texture_format != 0) == texture
    assert (message.row_order != 0) == (raw or texture)
    if raw or texture:
        assert (message.row_order == pb.PixelEncoding.ROW_ORDER_BOTTOM_UP) == encoding.bottom_up


def test_every_enum_of_the_contract_has_our_word() -> None:
    for ours, enum in (
        (enums.PRIORITIES, pb.Priority.DESCRIPTOR),
        (enums.PREVIEW_METHODS, pb.PreviewMethod.DESCRIPTOR),
        (enums.TEXTURE_FORMATS, pb.PixelEncoding.TextureFormat.DESCRIPTOR),
        (enums.SPACINGS, pb.TimestepSpacing.DESCRIPTOR),
        (enums.SIGMA_SCHEDULES, pb.SigmaSchedule.DESCRIPTOR),
        (enums.ROLES, pb.Prompt.Role.DESCRIPTOR),
        (enums.BOTTOM_UP, pb.PixelEncoding.RowOrder.DESCRIPTOR),
        (enums.DETACH, pb.DisconnectPolicy.Action.DESCRIPTOR),
        (enums.CACHE_MODES, pb.CachePolicy.Mode.DESCRIPTOR),
        (enums.DEGRADATIONS, pb.Degradation.Kind.DESCRIPTOR),
        (enums.STATES, pb.Generation.State.DESCRIPTOR),
        (enums.REASONS, pb.OutputFinished.FinishReason.DESCRIPTOR),
        (enums.DISPOSITIONS, pb.CacheResult.Disposition.DESCRIPTOR),
    ):
        assert sorted(ours.values()) == [value.number for value in enum.values if value.number]
    for priority in Priority:
        assert pb.Priority.Name(enums.PRIORITIES[priority]) == f"PRIORITY_{priority.name}"
    for method in PreviewMethod:
        assert pb.PreviewMethod.Name(enums.PREVIEW_METHODS[method]) == f"PREVIEW_METHOD_{method.name}"


def test_the_digest_covers_all_but_the_request_id() -> None:
    def digest(**changes: object) -> bytes:
        sent = {"request_id": UUID, "spec": pb.GenerationSpec(prompt="red"), **changes}
        return body_digest(pb.GenerateRequest(**sent))

    plain = digest()
    assert len(plain) == 32
    assert digest(request_id=UUID.replace("6", "7")) == plain
    assert digest(request_id="") == b""
    assert digest(labels={"a": "1", "b": "2"}) == digest(labels={"b": "2", "a": "1"})
    others = {
        digest(spec=pb.GenerationSpec(prompt="blue")),
        digest(spec=pb.GenerationSpec(prompt="red", guidance_scale=0)),
        digest(preview=pb.PreviewPolicy(every_n_steps=2)),
        digest(encoding=pb.PixelEncoding(media_type="image/png")),
        digest(scheduling=pb.Scheduling(priority=pb.PRIORITY_BATCH)),
        digest(disconnect=pb.DisconnectPolicy(action=pb.DisconnectPolicy.ACTION_DETACH)),
        digest(labels={"a": "1"}),
        digest(cache=pb.CachePolicy(mode=pb.CachePolicy.MODE_BYPASS)),
    }
    assert len(others - {plain}) == 8


def test_times_keep_their_value() -> None:
    assert times.duration(1.25).ToMilliseconds() == 1250
    at = datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)
    assert times.timestamp(at).ToDatetime(tzinfo=UTC) == at


async def test_a_model_says_what_it_offers(tmp_path: Path) -> None:
    pipeline = small_pipeline(tmp_path)
    runtime = SimulatedRuntime(1, 0.0, 0.0)
    message = wire.model_message(pipeline, runtime, True)
    assert (message.name, message.revision, message.is_default) == ("models/small", "r1", True)
    assert message.runtime == "simulated"
    assert [(size.width_px, size.height_px) for size in message.sizes] == [(64, 64), (64, 96)]
    assert [offer.name for offer in message.samplers] == ["ddim", "euler", "dpmpp_2m"]
    assert list(message.samplers[0].spacings) == [pb.TIMESTEP_SPACING_TRAILING, pb.TIMESTEP_SPACING_LEADING]
    assert pb.PREVIEW_METHOD_TINY_DECODER not in message.preview_methods
    assert list(message.media_types) == [media_type.value for media_type in MediaType]
    assert (message.defaults.num_inference_steps, message.defaults.guidance_scale) == (20, 3.0)
    assert (message.limits.max_outputs, message.limits.max_prompt_tokens) == (4, 8)
    assert message.step_times[0].num_rows == CostCurve((1,), (0.0,)).rows[0]


def test_statuses_are_those_of_grpc() -> None:
    assert statuses.OK.code == grpc.StatusCode.OK.value[0]
