"""What the pictures that calibrate and compare bring beside their prompts, so that all inputs of a denoiser are met.

Half of the pictures are plain, and half bring what the denoiser takes: pictures for its control networks, a picture as
a prompt. A denoiser that inpaints is given a picture and a mask for all of them. Nobody's photos are here, so these
pictures are ones that the pipeline drew itself. Pure numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from safelight_server.catalog.manifest import Manifest, SizeOffer
from safelight_server.catalog.pipeline import Pipeline
from safelight_server.domain.picture import Pixels, clip_centre
from safelight_server.engine.latents import RowControl

GREY = 128
LINE_CONTRAST = 24
"""Difference of neighbouring bytes from which on outlines show a line."""


@dataclass(frozen=True, slots=True, eq=False)
class Conditions:
    """What a picture is given beside its prompt, at the default settings.

    Attributes:
        guidance_scale: None: the default.
        controls: for the control networks.
        image_prompt: (S, S, 3), a picture as a prompt, as the image encoder takes it; None: there is none.
        init_image: (H, W, 3), of which a denoiser that inpaints is given what `mask` (H, W) keeps.
    """

    guidance_scale: float | None = None
    controls: tuple[RowControl, ...] = ()
    image_prompt: Pixels | None = None
    init_image: Pixels | None = None
    mask: Pixels | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Wish:
    """A picture to draw."""

    prompt: str
    seed: int
    size: SizeOffer
    conditions: Conditions

    @property
    def kind(self) -> tuple[SizeOffer, bool]:
        """What it has in common with others that are drawn and judged together: the size, and whether it is plain."""
        return self.size, not self.conditions.controls and self.conditions.image_prompt is None


def takes_pictures(manifest: Manifest) -> bool:
    """Whether the denoiser is given anything of a picture."""
    return bool(manifest.controls) or manifest.image_prompt is not None or manifest.is_inpainting


def plain(pipeline: Pipeline, size: SizeOffer) -> Conditions:
    """Those of a picture that is drawn from its prompt alone; a denoiser that inpaints develops all of a grey one."""
    if not pipeline.manifest.is_inpainting:
        return Conditions()
    shape = size.height_px, size.width_px
    return Conditions(init_image=np.full((*shape, 3), GREY, np.uint8), mask=np.full(shape, 255, np.uint8))


def least_wishes(manifest: Manifest, least: int) -> int:
    """How many wishes have each size, plain and with conditions; at least `least`."""
    return max(least, len(manifest.sizes) * (2 if takes_pictures(manifest) else 1))


def wishes(
    pipeline: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    own: Mapping[SizeOffer, Sequence[Pixels]],
) -> list[Wish]:
    """A wish for each prompt and its seed; sizes take turns, and so do plain pictures and those with conditions.

    Args:
        own: pictures of each size; not needed where the denoiser takes nothing of them.
    """
    sizes, made = pipeline.manifest.sizes, []
    for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        size, turn = sizes[number % len(sizes)], number // len(sizes)
        pictures = own.get(size, ())
        made.append(Wish(prompt, seed, size, _conditions(pipeline, size, turn, pictures)))
    return made


def _conditions(pipeline: Pipeline, size: SizeOffer, turn: int, pictures: Sequence[Pixels]) -> Conditions:
    """Those of the picture of a size in a turn: every second one has some."""
    manifest, which = pipeline.manifest, turn // 2
    scale = None
    if manifest.is_guidance_distilled:  # it is an input of the denoiser, and requests choose it
        scale = (manifest.defaults.guidance_scale, 1.0, 2 * manifest.defaults.guidance_scale)[turn % 3]
    if not takes_pictures(manifest) or (turn % 2 == 0 and not manifest.is_inpainting):
        return Conditions(scale)
    picture = pictures[which % len(pictures)]
    init_image = mask = None
    if manifest.is_inpainting:
        init_image, mask = picture, _mask(size, turn)
    if turn % 2 == 0:
        return Conditions(scale, init_image=init_image, mask=mask)
    room = manifest.image_prompt
    prompt = None if room is None else np.asarray(clip_centre(Image.fromarray(picture), room.edge_px))
    return Conditions(scale, _controls(manifest, picture, which), prompt, init_image, mask)


def _controls(manifest: Manifest, picture: Pixels, which: int) -> tuple[RowControl, ...]:
    """All networks, then each alone; their pictures are by turns the one that was drawn and its outlines."""
    places = range(len(manifest.controls))
    acting = places if which % (len(places) + 1) == 0 else [which % (len(places) + 1) - 1]
    steps = range(manifest.limits.max_num_inference_steps)
    return tuple(
        RowControl(place, outlines(picture) if (which + place) % 2 == 0 else picture, 1.0, steps) for place in acting
    )


def outlines(picture: Pixels) -> Pixels:
    """The outlines of a picture (H, W, 3), white on black, as many control networks take them."""
    grey = picture.astype(np.int16).mean(axis=2)
    down = np.abs(np.diff(grey, axis=0, prepend=grey[:1]))
    across = np.abs(np.diff(grey, axis=1, prepend=grey[:, :1]))
    lines = np.where(down + across > LINE_CONTRAST, 255, 0).astype(np.uint8)
    return np.repeat(lines[..., None], 3, axis=2)


def _mask(size: SizeOffer, turn: int) -> Pixels:
    """All of the picture in the first turn, and by turns its left, lower and middle part after that."""
    height, width = size.height_px, size.width_px
    mask = np.zeros((height, width), np.uint8)
    parts = (
        (slice(None), slice(None)),
        (slice(None), slice(0, width // 2)),
        (slice(height // 2, None), slice(None)),
        (slice(height // 4, 3 * height // 4), slice(width // 4, 3 * width // 4)),
    )
    mask[parts[turn % len(parts)]] = 255
    return mask
