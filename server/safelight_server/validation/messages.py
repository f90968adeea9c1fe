"""Messages to drafts, in our words and not judged: whatever protobuf parses has a draft; `resolve` judges it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from itertools import islice
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration
from safelight.v1 import cache_pb2
from safelight.v1 import generation_pb2 as pb

from safelight_server.scheduler import Priority
from safelight_server.validation.draft import (
    MAX_ENTRIES,
    BranchDraft,
    CacheDraft,
    DisconnectDraft,
    Draft,
    EncodingDraft,
    PreviewDraft,
    PromptDraft,
    PurgeDraft,
    SamplerDraft,
    SpecDraft,
    Unknown,
)
from safelight_server.wire.enums import (
    BOTTOM_UP,
    CACHE_MODES,
    DETACH,
    PREVIEW_METHODS,
    PRIORITIES,
    ROLES,
    SIGMA_SCHEDULES,
    SPACINGS,
)

T = TypeVar("T")


def draft_request(message: pb.GenerateRequest) -> Draft:
    """What was sent, as it was sent."""
    return Draft(
        spec=_draft_spec(message.spec),
        preview=draft_preview(message.preview),
        encoding=_draft_encoding(message.encoding) if message.HasField("encoding") else None,
        priority=draft_priority(message.scheduling),
        disconnect=DisconnectDraft(
            _enum(DETACH.items(), message.disconnect.action),
            _seconds(message.disconnect.resume_grace) if message.disconnect.HasField("resume_grace") else None,
        ),
        cache=CacheDraft(
            _enum(CACHE_MODES.items(), message.cache.mode),
            message.cache.min_similarity if message.cache.HasField("min_similarity") else None,
        ),
        branch=_draft_branch(message.branch) if message.HasField("branch") else None,
        request_id=message.request_id,
        labels=dict(islice(message.labels.items(), MAX_ENTRIES)),
        body_digest=_body_digest(message) if message.request_id else b"",
    )


def _draft_branch(message: pb.Branch) -> BranchDraft:
    return BranchDraft(message.generation, message.output_index, message.step)


def draft_preview(message: pb.PreviewPolicy) -> PreviewDraft:
    """A preview policy as it was sent."""
    return PreviewDraft(
        accept=tuple(_draft_encoding(encoding) for encoding in message.accept[:MAX_ENTRIES]),
        max_edge_px=message.max_edge_px if message.HasField("max_edge_px") else None,
        every_n_steps=message.every_n_steps if message.HasField("every_n_steps") else None,
        min_interval_s=_seconds(message.min_interval) if message.HasField("min_interval") else None,
        method=_enum(PREVIEW_METHODS.items(), message.method),
        max_bytes_per_second=message.max_bytes_per_second if message.HasField("max_bytes_per_second") else None,
    )


def draft_priority(message: pb.Scheduling) -> Priority | Unknown | None:
    """A priority as it was sent."""
    return _enum(PRIORITIES.items(), message.priority)


def _draft_spec(message: pb.GenerationSpec) -> SpecDraft:
    sampler = message.sampler
    return SpecDraft(
        model=message.model,
        prompt=message.prompt,
        prompts=tuple(
            PromptDraft(_enum(ROLES.items(), entry.role), entry.text) for entry in message.prompts[:MAX_ENTRIES]
        ),
        width_px=message.width_px if message.HasField("width_px") else None,
        height_px=message.height_px if message.HasField("height_px") else None,
        num_inference_steps=message.num_inference_steps if message.HasField("num_inference_steps") else None,
        guidance_scale=message.guidance_scale if message.HasField("guidance_scale") else None,
        sampler=SamplerDraft(
            name=sampler.name,
            sigma_schedule=_enum(SIGMA_SCHEDULES.items(), sampler.sigma_schedule),
            spacing=_enum(SPACINGS.items(), sampler.spacing),
            eta=sampler.eta if sampler.HasField("eta") else None,
        ),
        seeds=tuple(output.seed if output.HasField("seed") else None for output in message.outputs[:MAX_ENTRIES]),
    )


def _draft_encoding(message: pb.PixelEncoding) -> EncodingDraft:
    return EncodingDraft(
        media_type=message.media_type,
        quality=message.quality if message.HasField("quality") else None,
        row_alignment_bytes=message.row_alignment_bytes if message.HasField("row_alignment_bytes") else None,
        bottom_up=_enum(BOTTOM_UP.items(), message.row_order),
    )


def _enum(names: Iterable[tuple[T, int]], number: int) -> T | Unknown | None:
    """0 is absent; proto3 enums are open, so that any other number may come."""
    if not number:
        return None
    return next((ours for ours, theirs in names if theirs == number), Unknown(number))


def _seconds(duration: Duration) -> float:
    """Seconds; NaN where the message breaks the rules of google.protobuf.Duration."""
    seconds, nanos = duration.seconds, duration.nanos
    valid = abs(seconds) <= 315_576_000_000 and abs(nanos) < 1_000_000_000 and seconds * nanos >= 0
    return seconds + nanos / 1e9 if valid else math.nan


def _body_digest(message: pb.GenerateRequest) -> bytes:
    body = pb.GenerateRequest()
    body.CopyFrom(message)
    body.ClearField("request_id")
    return hashlib.sha256(body.SerializeToString(deterministic=True)).digest()


def draft_purge(message: cache_pb2.PurgeCacheRequest) -> PurgeDraft:
    """What a client wants to be purged."""
    return PurgeDraft(message.tenant, message.model_revision, message.generation)
