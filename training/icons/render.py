"""Draws a spec: background, the object with its shadow, glow or outline, sparkles."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import skia

from training.icons.brush import INK, WHITE, Brush, Surface, ink, mix
from training.icons.neon import DARK, NeonBrush
from training.icons.shapes import DRAWINGS, SLANTED
from training.icons.spec import BACKGROUNDS, COLOURS, MATERIALS, Spec

SIZE_PX = 128


@dataclass(frozen=True, slots=True)
class Style:
    """How icons look.

    Attributes:
        darkness: how far backgrounds go to black, 0 to 1.
        shines: whether all objects glow, not only those whose spec says so.
    """

    brush: type[Brush] = Brush
    darkness: float = 0.0
    shines: bool = False


PLAIN = Style()
NEON = Style(NeonBrush, DARK, shines=True)


def render(spec: Spec, size_px: int = SIZE_PX, style: Style = PLAIN) -> npt.NDArray[np.uint8]:
    """The icon, (size_px, size_px, 3) uint8 sRGB. The same spec gives the same pixels."""
    rng = random.Random(spec.seed)
    surface = skia.Surface(size_px, size_px)
    canvas = surface.getCanvas()
    canvas.scale(size_px, size_px)
    _background(canvas, spec, rng, style)
    _object(canvas, spec, rng, style)
    if spec.sparkles:
        _sparkles(canvas, spec, rng)
    rgba: npt.NDArray[np.uint8] = surface.makeImageSnapshot().toarray(colorType=skia.kRGBA_8888_ColorType)
    return np.ascontiguousarray(rgba[..., :3])


def _background(canvas: skia.Canvas, spec: Spec, rng: random.Random, style: Style) -> None:
    shift = rng.uniform(-0.06, 0.06)
    base = mix(BACKGROUNDS[spec.background], WHITE if shift > 0 else INK, abs(shift))
    base = mix(base, INK, style.darkness)
    rim = 0.1 if spec.background == "white" else 0.28
    centre = skia.Point(rng.uniform(0.4, 0.6), rng.uniform(0.3, 0.5))
    lit = mix(base, WHITE, 0.22 * (1 - style.darkness))
    light = skia.GradientShader.MakeRadial(centre, 0.85, [ink(lit), ink(mix(base, INK, rim))])
    canvas.drawPaint(skia.Paint(Shader=light))


def _object(canvas: skia.Canvas, spec: Spec, rng: random.Random, style: Style) -> None:
    shift = rng.uniform(-0.08, 0.08)
    colour = (
        mix(COLOURS[spec.colour], WHITE if shift > 0 else INK, abs(shift))
        if abs(shift) > 0.02
        else COLOURS[spec.colour]
    )
    texture = spec.colour if spec.colour in MATERIALS else "crystal" if spec.crystal else "plain"
    turn = 38 if spec.object in SLANTED else 26
    angle = {"left": -turn, "right": turn, None: 0}[spec.tilt] + rng.uniform(-4, 4)

    canvas.save()
    canvas.translate(0.5 + rng.uniform(-0.03, 0.03), 0.5 + rng.uniform(-0.03, 0.03))
    scale = 0.5 * rng.uniform(0.7, 0.82)
    canvas.scale(scale, scale)

    recorder = skia.PictureRecorder()
    page = recorder.beginRecording(skia.Rect(-2, -2, 2, 2))
    page.rotate(angle)
    DRAWINGS[spec.object](style.brush(page, rng), Surface(colour, texture))
    drawing = recorder.finishRecordingAsPicture()

    if spec.outline:
        white = skia.ImageFilters.ColorFilter(skia.ColorFilters.Blend(ink(WHITE), skia.BlendMode.kSrcIn))
        border = skia.ImageFilters.Dilate(0.1, 0.1, white)
        canvas.saveLayer(None, skia.Paint(ImageFilter=border))
        canvas.drawPicture(drawing)
        canvas.restore()
        canvas.drawPicture(drawing)
    else:
        canvas.saveLayer(None, skia.Paint(ImageFilter=_halo(spec.glow or style.shines, colour)))
        canvas.drawPicture(drawing)
        canvas.restore()
    canvas.restore()


def _halo(shines: bool, colour: tuple[int, int, int]) -> skia.ImageFilter:
    if not shines:
        return skia.ImageFilters.DropShadow(0.05, 0.09, 0.07, 0.07, ink(INK, 0.5))
    shine = mix(colour, WHITE, 0.3)
    wide = skia.ImageFilters.DropShadow(0, 0, 0.22, 0.22, ink(shine))
    return skia.ImageFilters.DropShadow(0, 0, 0.1, 0.1, ink(mix(shine, WHITE, 0.35)), wide)


def _sparkles(canvas: skia.Canvas, spec: Spec, rng: random.Random) -> None:
    colour = (255, 176, 20) if spec.background in ("white", "sandy") else (255, 246, 190)
    start = rng.uniform(0, math.tau)
    count = rng.randint(5, 6)
    for i in range(count):
        angle = start + math.tau * (i + rng.uniform(-0.25, 0.25)) / count
        away, arm = rng.uniform(0.38, 0.45), rng.uniform(0.05, 0.085)
        x, y = 0.5 + away * math.cos(angle), 0.5 + away * math.sin(angle)
        spark = skia.Path()
        spark.moveTo(x, y - arm)
        for dx, dy in ((arm, 0.0), (0.0, arm), (-arm, 0.0), (0.0, -arm)):
            spark.quadTo(x, y, x + dx, y + dy)
        canvas.drawPath(spark, skia.Paint(AntiAlias=True, Color=ink(colour)))
