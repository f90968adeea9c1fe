"""What a client sent, in the domain's words and not judged yet: None is absent, every number is possible.

`convert` makes drafts of proto messages, `resolve` makes requests of drafts.
Invariants: any message that protobuf can parse has a draft; of a repeated field
a draft has at most `MAX_ENTRIES`, so that judging it never holds up the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from safelight_server.domain.request import CacheMode, PreviewMethod
from safelight_server.domain.roles import Role
from safelight_server.scheduler import Priority

MAX_ENTRIES = 257
"""More than any limit on a repeated field, so that too many are still seen to be too many."""


@dataclass(frozen=True, slots=True)
class Unknown:
    """A number of an enum that this version of the contract has no name for."""

    number: int


@dataclass(frozen=True, slots=True)
class PurgeDraft:
    """What is to be purged from the caches; empty is not given."""

    tenant: str = ""
    model_revision: str = ""
    generation: str = ""


@dataclass(frozen=True, slots=True)
class PromptDraft:
    """One entry of `spec.prompts`."""

    role: Role | Unknown | None
    text: str


@dataclass(frozen=True, slots=True)
class SamplerDraft:
    """`spec.sampler`; an empty name is absent."""

    name: str = ""
    sigma_schedule: str | Unknown | None = None
    spacing: str | Unknown | None = None
    eta: float | None = None


@dataclass(frozen=True, slots=True)
class SpecDraft:
    """`spec`. `seeds` has one entry per output; empty model and prompt are absent."""

    model: str = ""
    prompt: str = ""
    prompts: tuple[PromptDraft, ...] = ()
    width_px: int | None = None
    height_px: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    sampler: SamplerDraft = SamplerDraft()
    seeds: tuple[int | None, ...] = ()


@dataclass(frozen=True, slots=True)
class EncodingDraft:
    """A `PixelEncoding` message."""

    media_type: str = ""
    quality: int | None = None
    row_alignment_bytes: int | None = None
    bottom_up: bool | Unknown | None = None


@dataclass(frozen=True, slots=True)
class PreviewDraft:
    """A `PreviewPolicy` message. At most one of the two cadences is there; NaN seconds: no valid Duration."""

    accept: tuple[EncodingDraft, ...] = ()
    max_edge_px: int | None = None
    every_n_steps: int | None = None
    min_interval_s: float | None = None
    method: PreviewMethod | Unknown | None = None
    max_bytes_per_second: int | None = None


@dataclass(frozen=True, slots=True)
class DisconnectDraft:
    """A `DisconnectPolicy` message. NaN seconds: no valid Duration."""

    detach: bool | Unknown | None = None
    resume_grace_s: float | None = None


@dataclass(frozen=True, slots=True)
class CacheDraft:
    """A `CachePolicy` message."""

    mode: CacheMode | Unknown | None = None
    min_similarity: float | None = None


@dataclass(frozen=True, slots=True)
class BranchDraft:
    """A `Branch` message."""

    generation: str = ""
    output_index: int = 0
    step: int = 0


@dataclass(frozen=True, slots=True)
class Draft:
    """A `GenerateRequest` message.

    Attributes:
        body_digest: SHA-256 of all that was sent but the request id; empty without one.
    """

    spec: SpecDraft = SpecDraft()
    preview: PreviewDraft = PreviewDraft()
    encoding: EncodingDraft | None = None
    priority: Priority | Unknown | None = None
    disconnect: DisconnectDraft = DisconnectDraft()
    cache: CacheDraft = CacheDraft()
    branch: BranchDraft | None = None
    request_id: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    body_digest: bytes = b""
