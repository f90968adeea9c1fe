"""What is asked, in the domain's own words; validated whole before anything is computed.

`wire.py` makes a `Draft` of a proto request without judging it; `resolve`
checks the draft against the model's manifest and the server's limits, collects
every fault, fills in the defaults and returns a `Request`. Past this module
nothing is optional and nothing is invalid.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from safelight_server.sampler import SamplerSpec
from safelight_server.scheduler import Priority


class MediaType(enum.StrEnum):
    """Encodings of pixels that the server makes."""

    JPEG = "image/jpeg"
    WEBP = "image/webp"
    PNG = "image/png"
    RAW_RGBA8 = "application/x-raw-rgba8"


class PreviewMethod(enum.Enum):
    """How previews are made from the denoised latent."""

    AUTO = "auto"
    LINEAR = "linear"
    TINY_DECODER = "tiny_decoder"
    FULL_DECODER = "full_decoder"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class PixelEncoding:
    """How pixels travel. `quality` counts for JPEG and WebP, the last two for raw RGBA8."""

    media_type: MediaType = MediaType.PNG
    quality: int = 85
    row_alignment_bytes: int = 4
    bottom_up: bool = False


@dataclass(frozen=True, slots=True)
class PreviewPolicy:
    """Which previews a stream wants. At most one of the cadences applies; neither: every step."""

    encoding: PixelEncoding = PixelEncoding(MediaType.JPEG)
    method: PreviewMethod = PreviewMethod.AUTO
    max_edge_px: int | None = None
    every_n_steps: int = 1
    min_interval_s: float = 0.0
    max_bytes_per_second: int | None = None


class CacheMode(enum.Enum):
    """What may serve a request beside its own development; each of the last two allows what the one before does.

    DEFAULT:       an identical output, finished or on its way.
    BYPASS:        nothing; and nobody joins it, and it is not kept.
    ALLOW_LATENT:  also the latent of an output with a prompt nearby.
    ALLOW_SIMILAR: also a finished picture whose prompt says the same.
    """

    DEFAULT = "default"
    BYPASS = "bypass"
    ALLOW_LATENT = "allow_latent"
    ALLOW_SIMILAR = "allow_similar"


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """What may serve a request; `min_similarity` is for pictures that are served as they are."""

    mode: CacheMode = CacheMode.DEFAULT
    min_similarity: float = 0.95


@dataclass(frozen=True, slots=True)
class Branch:
    """Start after `step` steps of an output of the generation with this id."""

    generation_id: str
    output_index: int
    step: int


@dataclass(frozen=True, slots=True)
class DisconnectPolicy:
    """What happens when the last stream is lost: run on, or stop and keep the state for the grace."""

    detach: bool
    resume_grace_s: float


@dataclass(frozen=True, slots=True)
class Spec:
    """What to develop, with every default filled in and every seed chosen.

    Attributes:
        negative_prompt: empty when guidance has nothing to lead away from.
        token_ids: of the prompt, padded to the encoder's context.
        negative_token_ids: None when guidance_scale is 1 (one row a step).
        seeds: one per output, each 0 to 2**64 - 1.
    """

    model: str
    revision: str
    prompt: str
    negative_prompt: str
    token_ids: tuple[int, ...]
    negative_token_ids: tuple[int, ...] | None
    width_px: int
    height_px: int
    num_inference_steps: int
    guidance_scale: float
    sampler: SamplerSpec
    seeds: tuple[int, ...]

    @property
    def model_revision(self) -> str:
        """As purges name it: "MODEL/REVISION"."""
        return f"{self.model}/{self.revision}"

    @property
    def token_ids_by_row(self) -> tuple[tuple[int, ...], ...]:
        """Token ids of the prompts of a step's rows: the prompt and, with guidance, the negative prompt."""
        return (self.token_ids,) if self.negative_token_ids is None else (self.token_ids, self.negative_token_ids)


@dataclass(frozen=True, slots=True)
class Notice:
    """Something the caller should know that did not stop the request."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Request:
    """A valid request. `body_digest` tells requests with one id apart: it covers what the client sent."""

    spec: Spec
    preview: PreviewPolicy
    encoding: PixelEncoding
    priority: Priority
    disconnect: DisconnectPolicy
    cache: CachePolicy = CachePolicy()
    branch: Branch | None = None
    request_id: str = ""
    body_digest: bytes = b""
    labels: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[Notice, ...] = ()


@dataclass(frozen=True, slots=True)
class PurgeRequest:
    """What is to be purged from the caches: what agrees with all that is given; empty is not given, one is.

    Attributes:
        model_revision: "MODEL/REVISION".
        generation: its resource name.
    """

    tenant: str = ""
    model_revision: str = ""
    generation: str = ""
