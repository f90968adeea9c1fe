"""The events of a generation, in the order in which a client receives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from safelight import pixels
from safelight.v1 import generation_pb2 as pb

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    from numpy.typing import NDArray


class EncodedImage:
    """The pixels of a preview or a picture, for programs that have numpy or Pillow (the extra `safelight[images]`)."""

    __slots__ = ()
    media_type: str
    width_px: int
    height_px: int
    data: bytes
    stride_bytes: int
    bottom_up: bool

    def image(self) -> PIL.Image.Image:
        """Decodes to a Pillow image, its top row first.

        Raises:
            ModuleNotFoundError: Pillow is not installed.
        """
        return pixels.to_image(self)

    def array(self) -> NDArray[np.uint8]:
        """Decodes to (height, width, 4) uint8: red, green, blue, alpha; the top row first.

        Raises:
            ModuleNotFoundError: numpy is not installed, or Pillow, which all but raw pixels need.
        """
        return pixels.to_array(self)


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request was admitted; the first event.

    Attributes:
        generation: its name, "generations/ID", for `Client.watch` and `Client.cancel`.
        seeds: one for each output, also if the request left the choice to the server.
        numerics_id: equal specs and seeds give equal pixels on servers with equal ids.
        durable: whether another replica continues the generation if the server dies.
        warnings: reason -> text, of faults that did not stop the request.
        width_px, height_px: the size of its pictures; previews may be smaller.
    """

    generation: str
    seeds: tuple[int, ...]
    numerics_id: str
    durable: bool
    warnings: dict[str, str]
    width_px: int
    height_px: int


@dataclass(frozen=True, slots=True)
class Progress:
    """An output has finished a denoising step."""

    output_index: int
    step: int
    num_steps: int
    batch_size: int


@dataclass(frozen=True, slots=True)
class Preview(EncodedImage):
    """A preview of an output after `step` steps, encoded as `media_type`.

    Attributes:
        stride_bytes: from one row to the next for raw pixels, else 0.
        bottom_up: the first of the raw rows is the lowest one.
        num_dropped: due previews that were skipped since the last one, because the reader was not ready.
    """

    output_index: int
    step: int
    media_type: str
    width_px: int
    height_px: int
    data: bytes
    stride_bytes: int = 0
    bottom_up: bool = False
    num_dropped: int = 0


@dataclass(frozen=True, slots=True)
class Picture(EncodedImage):
    """A finished picture, encoded as `media_type`. Its SHA-256 has been checked.

    Attributes:
        stride_bytes: from one row to the next for raw pixels, else 0.
        bottom_up: the first of the raw rows is the lowest one.
        generation: the generation that it came from, "generations/ID".
    """

    output_index: int
    media_type: str
    width_px: int
    height_px: int
    seed: int
    data: bytes
    stride_bytes: int = 0
    bottom_up: bool = False
    generation: str = ""

    @property
    def name(self) -> str:
        """The name by which other generations can start from it, "generations/ID/outputs/INDEX"."""
        return f"{self.generation}/outputs/{self.output_index}"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a picture came from.

    Attributes:
        disposition: "miss" (computed in full), "coalesced" (shared with an identical output that was being computed),
            "exact" (cached, identical), "similar" (cached, for a similar prompt or another seed), "latent" (computed
            from the cached latent of a similar prompt) or "branched" (computed from the step of `branch`).
        similarity: cosine similarity of the prompts, for "similar" and "latent".
        source: the generation that computed the picture, for "exact" and "similar".
        num_steps_skipped: denoising steps that were not run for this picture.
        numerics_id: numerics id of the replica that continued the generation, if it differs from that in `Accepted`.
    """

    disposition: str
    similarity: float = 0.0
    source: str = ""
    num_steps_skipped: int = 0
    numerics_id: str = ""


@dataclass(frozen=True, slots=True)
class Degradation:
    """One property that a generation gave up under load, as its `quality_floor` allowed.

    Attributes:
        kind: "fewer_steps", "cheaper_previews" or "similar_picture".
        requested: the requested value: a number of steps, a PreviewMethod, or the least similarity.
        applied: the applied value, in the same form.
    """

    kind: str
    requested: str
    applied: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The generation has succeeded; the last event.

    Attributes:
        origins: where each picture came from, in the order of the outputs.
        degradations: what was given up under load; empty: nothing.
    """

    generation: str
    usage: pb.Usage
    timings: pb.Timings
    origins: tuple[Origin, ...] = ()
    degradations: tuple[Degradation, ...] = ()


Event = Accepted | Progress | Preview | Picture | Finished
