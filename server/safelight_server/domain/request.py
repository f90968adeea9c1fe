"""A valid request for pictures, with every default filled in.

`validation/` makes a `Request` from the protobuf message: it checks the message
against the model's manifest and the server's limits and fills in the defaults.
Code that gets a `Request` need not check it again.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from safelight_server.domain.ktx2 import TextureFormat
from safelight_server.sampler import SamplerSpec, controlled_steps, guided_steps, steps_left_out
from safelight_server.scheduler import Priority

TEXT_BYTES = 100
"""Memory of a short text in addition to its characters: CPython's object and its entry in a dict."""
TOKEN_BYTES = 36
"""Memory of a token id: an int and its reference in a tuple."""
IMAGE_PROMPT_FIELD = "image_prompt.image"
"""Where a GenerationSpec message has the picture of its image prompt."""
EVERY_STEP = (0.0, 1.0)
"""The guidance interval that limits nothing."""


class MediaType(enum.StrEnum):
    """The encodings of pixels that the server offers."""

    JPEG = "image/jpeg"
    WEBP = "image/webp"
    PNG = "image/png"
    RAW_RGBA8 = "application/x-raw-rgba8"
    KTX2 = "image/ktx2"


class PreviewMethod(enum.Enum):
    """How a preview is made from the denoised latent."""

    AUTO = "auto"
    LINEAR = "linear"
    TINY_DECODER = "tiny_decoder"
    FULL_DECODER = "full_decoder"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class PixelEncoding:
    """How pixels are encoded.

    Attributes:
        quality: for JPEG and WebP: 1 to 100.
        row_alignment_bytes: for raw RGBA8: rows begin at multiples of it.
        bottom_up: for raw RGBA8 and KTX2: whether the bottom row comes first.
        texture_format: for KTX2: the block format.
    """

    media_type: MediaType = MediaType.PNG
    quality: int = 85
    row_alignment_bytes: int = 4
    bottom_up: bool = False
    texture_format: TextureFormat = TextureFormat.BC1


@dataclass(frozen=True, slots=True)
class PreviewPolicy:
    """Which previews a stream gets: every n-th step, or one per interval if `min_interval_s` is above 0."""

    encoding: PixelEncoding = PixelEncoding(MediaType.JPEG)
    method: PreviewMethod = PreviewMethod.AUTO
    max_edge_px: int | None = None
    every_n_steps: int = 1
    min_interval_s: float = 0.0
    max_bytes_per_second: int | None = None


class CacheMode(enum.Enum):
    """Which cached results may answer a request. ALLOW_LATENT includes DEFAULT; ALLOW_SIMILAR includes both.

    DEFAULT:       an identical output, finished or still being computed.
    BYPASS:        none. Its result is not cached, and no other request joins it.
    ALLOW_LATENT:  also the latent of an output with a similar prompt, to start from.
    ALLOW_SIMILAR: also a finished picture for a prompt with the same meaning.
    """

    DEFAULT = "default"
    BYPASS = "bypass"
    ALLOW_LATENT = "allow_latent"
    ALLOW_SIMILAR = "allow_similar"


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """Which cached results may answer a request. `min_similarity` (cosine) is for ALLOW_SIMILAR."""

    mode: CacheMode = CacheMode.DEFAULT
    min_similarity: float = 0.95


@dataclass(frozen=True, slots=True)
class Branch:
    """Start from the latent that an output of the generation `generation_id` had after `step` steps."""

    generation_id: str
    output_index: int
    step: int


@dataclass(frozen=True, slots=True)
class DisconnectPolicy:
    """What happens when the last stream is lost: with `detach` the generation runs on, else it is suspended."""

    detach: bool
    resume_grace_s: float


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """An adapter that a spec names: the content of its file by `sha256`, and the factor of what it adds."""

    name: str
    scale: float
    sha256: str


@dataclass(frozen=True, slots=True)
class ControlUse:
    """A control network that a spec names, and the picture for it.

    Attributes:
        image: SHA-256 of the picture, in hexadecimal, or before its generation begins the name of an output, as
            `Spec.init_image`.
        scale: factor of what the network adds.
        start, end: where it acts, as shares of all steps.
    """

    name: str
    image: str
    scale: float = 1.0
    start: float = EVERY_STEP[0]
    end: float = EVERY_STEP[1]

    @property
    def field(self) -> str:
        """The path of its picture below `spec`, for errors."""
        return f"controls[{self.name}].image"

    def steps(self, num_steps: int) -> range:
        """The steps, from 0, in which it acts."""
        return controlled_steps(num_steps, self.start, self.end)


@dataclass(frozen=True, slots=True)
class Spec:
    """What to generate, with every default filled in and every seed chosen.

    Attributes:
        negative_prompt: empty where none was given, or a step has one row.
        token_ids: of the prompt, padded to the text encoder's context length.
        negative_token_ids: None where a step has one row: guidance_scale is 1, or the model was distilled for guidance.
        seeds: one per output, each 0 to 2**64 - 1.
        init_image: SHA-256 of the picture to start from, in hexadecimal; "": none, and then `strength` is 1. Before its
            generation begins it may be the name of an output, "generations/ID/outputs/INDEX".
        mask: the same for the mask, whose white part is developed anew; "": everything is.
        guidance_rescale: how far the contrast that guidance adds is reduced again, 0 to 1 (`sampler.rescale`).
        guidance_interval: start and end of guidance as shares of all steps; `EVERY_STEP`: no limit.
        adapters: in the order of their names; none has the scale 0.
        controls: likewise.
        image_prompt: SHA-256 of the picture that says what to draw beside the prompt, or the name of an output, as
            `init_image`; "": none, and then `image_prompt_scale` is 0.
        image_prompt_scale: how much it counts, above 0.
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
    init_image: str = ""
    strength: float = 1.0
    mask: str = ""
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = EVERY_STEP
    adapters: tuple[AdapterUse, ...] = ()
    controls: tuple[ControlUse, ...] = ()
    image_prompt: str = ""
    image_prompt_scale: float = 0.0

    @property
    def first_step(self) -> int:
        """The first step that is made; above 0 if development starts from a picture."""
        return steps_left_out(self.num_inference_steps, self.strength)

    @property
    def named_outputs(self) -> dict[str, str]:
        """The names of outputs that its pictures still have instead of digests, by their fields in the contract."""
        pictures = {"init_image": self.init_image, "mask": self.mask, IMAGE_PROMPT_FIELD: self.image_prompt}
        pictures |= {control.field: control.image for control in self.controls}
        return {field: name for field, name in pictures.items() if "/" in name}

    def with_images(self, digests: Mapping[str, str]) -> Spec:
        """A copy with digests in place of the `named_outputs`, by field."""
        return replace(
            self,
            init_image=digests.get("init_image", self.init_image),
            mask=digests.get("mask", self.mask),
            controls=tuple(replace(at, image=digests.get(at.field, at.image)) for at in self.controls),
            image_prompt=digests.get(IMAGE_PROMPT_FIELD, self.image_prompt),
        )

    @property
    def guided_steps(self) -> range:
        """The steps, from 0, that have guidance if the spec has any."""
        return guided_steps(self.num_inference_steps, *self.guidance_interval)

    @property
    def model_revision(self) -> str:
        """The model and its revision in the form of purge requests: "MODEL/REVISION"."""
        return f"{self.model}/{self.revision}"

    @property
    def token_ids_by_row(self) -> tuple[tuple[int, ...], ...]:
        """The token ids of each row that a step needs: the prompt and, with guidance, the negative prompt."""
        return (self.token_ids,) if self.negative_token_ids is None else (self.token_ids, self.negative_token_ids)


@dataclass(frozen=True, slots=True)
class QualityFloor:
    """How far quality may go down while the class of a request is under pressure; by default not at all.

    Attributes:
        min_num_steps: fewest denoising steps; None: no fewer than the spec has.
        cheaper_previews: whether LINEAR previews may stand in for those of a decoder.
        min_similarity: least similarity (cosine) of a picture that may be served instead; None: no other picture may.
    """

    min_num_steps: int | None = None
    cheaper_previews: bool = False
    min_similarity: float | None = None


class DegradationKind(enum.Enum):
    """What a request gave up under load."""

    FEWER_STEPS = "fewer_steps"
    CHEAPER_PREVIEWS = "cheaper_previews"
    SIMILAR_PICTURE = "similar_picture"


@dataclass(frozen=True, slots=True)
class Degradation:
    """One property that a request gave up under load, with the requested and the applied value as in the proto."""

    kind: DegradationKind
    requested: str
    applied: str


@dataclass(frozen=True, slots=True)
class Notice:
    """A warning to the caller that did not stop the request."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Request:
    """A valid request.

    Attributes:
        spec: what is developed; with fewer steps than the client requested if `degradations` says so.
        body_digest: digest of the message without `request_id`; empty if there is no request id.
        degradations: what the request gave up under load, decided before it was accepted.
    """

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
    quality_floor: QualityFloor = QualityFloor()
    degradations: tuple[Degradation, ...] = ()

    @property
    def requested_spec(self) -> Spec:
        """The spec with the number of steps that the client requested."""
        for loss in self.degradations:
            if loss.kind is DegradationKind.FEWER_STEPS:
                return replace(self.spec, num_inference_steps=int(loss.requested))
        return self.spec

    @property
    def held_bytes(self) -> int:
        """Upper bound on the memory of its texts and token ids; parts of fixed size are not counted."""
        texts = [self.spec.prompt, self.spec.negative_prompt, *self.labels, *self.labels.values()]
        num_tokens = sum(map(len, self.spec.token_ids_by_row))
        return sum(map(_text_bytes, texts)) + num_tokens * TOKEN_BYTES


def _text_bytes(text: str) -> int:
    # Beyond ASCII up to 4 bytes a character, and as much again for the UTF-8 that protobuf leaves at the string.
    return TEXT_BYTES + len(text) * (1 if text.isascii() else 8)


@dataclass(frozen=True, slots=True)
class PurgeRequest:
    """What to purge from the caches: entries that match every field that is not empty. At least one is not.

    Attributes:
        model_revision: "MODEL/REVISION".
        generation: its resource name.
    """

    tenant: str = ""
    model_revision: str = ""
    generation: str = ""
