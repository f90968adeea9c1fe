"""The number on the wire of each enum value of the domain, and the reverse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from safelight.v1 import generation_pb2 as pb

from safelight_server.domain.events import Disposition, Durability, FinishReason, GenerationState
from safelight_server.domain.ktx2 import TextureFormat
from safelight_server.domain.request import CacheMode, DegradationKind, PreviewMethod
from safelight_server.domain.roles import Role
from safelight_server.scheduler import Priority

T = TypeVar("T")


def from_number(numbers: Mapping[T, int], number: int, default: T | None) -> T | None:
    """The domain's value for an enum number that a client sent.

    Returns:
        `default` for 0, which is an absent field. None for a number that this server has no name for:
        proto3 enums are open, so that a newer client may send any number.
    """
    if number == 0:
        return default
    return next((value for value, known in numbers.items() if known == number), None)


PRIORITIES = {
    Priority.INTERACTIVE: pb.PRIORITY_INTERACTIVE,
    Priority.STANDARD: pb.PRIORITY_STANDARD,
    Priority.BATCH: pb.PRIORITY_BATCH,
}
PREVIEW_METHODS = {
    PreviewMethod.AUTO: pb.PREVIEW_METHOD_AUTO,
    PreviewMethod.LINEAR: pb.PREVIEW_METHOD_LINEAR,
    PreviewMethod.TINY_DECODER: pb.PREVIEW_METHOD_TINY_DECODER,
    PreviewMethod.FULL_DECODER: pb.PREVIEW_METHOD_FULL_DECODER,
    PreviewMethod.NONE: pb.PREVIEW_METHOD_NONE,
}
SPACINGS = {
    "leading": pb.TIMESTEP_SPACING_LEADING,
    "trailing": pb.TIMESTEP_SPACING_TRAILING,
    "linspace": pb.TIMESTEP_SPACING_LINSPACE,
}
SIGMA_SCHEDULES = {"default": pb.SIGMA_SCHEDULE_DEFAULT, "karras": pb.SIGMA_SCHEDULE_KARRAS}
ROLES = {Role.POSITIVE: pb.Prompt.ROLE_POSITIVE, Role.NEGATIVE: pb.Prompt.ROLE_NEGATIVE}
BOTTOM_UP = {False: pb.PixelEncoding.ROW_ORDER_TOP_DOWN, True: pb.PixelEncoding.ROW_ORDER_BOTTOM_UP}
TEXTURE_FORMATS = {
    TextureFormat.BC1: pb.PixelEncoding.TEXTURE_FORMAT_BC1,
    TextureFormat.BC7: pb.PixelEncoding.TEXTURE_FORMAT_BC7,
}
DETACH = {False: pb.DisconnectPolicy.ACTION_CANCEL, True: pb.DisconnectPolicy.ACTION_DETACH}
CACHE_MODES = {
    CacheMode.DEFAULT: pb.CachePolicy.MODE_DEFAULT,
    CacheMode.BYPASS: pb.CachePolicy.MODE_BYPASS,
    CacheMode.ALLOW_LATENT: pb.CachePolicy.MODE_ALLOW_LATENT,
    CacheMode.ALLOW_SIMILAR: pb.CachePolicy.MODE_ALLOW_SIMILAR,
}
STATES = {
    GenerationState.QUEUED: pb.Generation.STATE_QUEUED,
    GenerationState.RUNNING: pb.Generation.STATE_RUNNING,
    GenerationState.SUSPENDED: pb.Generation.STATE_SUSPENDED,
    GenerationState.SUCCEEDED: pb.Generation.STATE_SUCCEEDED,
    GenerationState.CANCELLED: pb.Generation.STATE_CANCELLED,
    GenerationState.FAILED: pb.Generation.STATE_FAILED,
}
REASONS = {
    FinishReason.COMPLETED: pb.OutputFinished.FINISH_REASON_COMPLETED,
    FinishReason.CANCELLED: pb.OutputFinished.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE_EXCEEDED: pb.OutputFinished.FINISH_REASON_DEADLINE_EXCEEDED,
    FinishReason.FAILED: pb.OutputFinished.FINISH_REASON_FAILED,
}
DISPOSITIONS = {
    Disposition.MISS: pb.CacheResult.DISPOSITION_MISS,
    Disposition.COALESCED: pb.CacheResult.DISPOSITION_COALESCED,
    Disposition.EXACT: pb.CacheResult.DISPOSITION_EXACT,
    Disposition.SIMILAR: pb.CacheResult.DISPOSITION_SIMILAR,
    Disposition.LATENT: pb.CacheResult.DISPOSITION_LATENT,
    Disposition.BRANCHED: pb.CacheResult.DISPOSITION_BRANCHED,
}
DEGRADATIONS = {
    DegradationKind.FEWER_STEPS: pb.Degradation.KIND_FEWER_STEPS,
    DegradationKind.CHEAPER_PREVIEWS: pb.Degradation.KIND_CHEAPER_PREVIEWS,
    DegradationKind.SIMILAR_PICTURE: pb.Degradation.KIND_SIMILAR_PICTURE,
}
DURABILITIES = {
    Durability.LOCAL: pb.Accepted.DURABILITY_LOCAL,
    Durability.REPLICATED: pb.Accepted.DURABILITY_REPLICATED,
}
