"""How an icon's surfaces are painted: gradients, grain and gloss by material, on a skia canvas of [-1, 1] units."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import skia

from training.icons.spec import RGB

WHITE: RGB = (255, 255, 255)
INK: RGB = (10, 8, 18)
Point = tuple[float, float]


def mix(a: RGB, b: RGB, t: float) -> RGB:
    """The colour a fraction `t` of the way from `a` to `b`."""
    red, green, blue = (round(x * (1 - t) + y * t) for x, y in zip(a, b, strict=True))
    return red, green, blue


def ink(colour: RGB, alpha: float = 1.0) -> int:
    """A skia colour, clipped to the byte range."""
    red, green, blue = (max(0, min(255, int(channel))) for channel in colour)
    return int(skia.Color(red, green, blue, int(255 * alpha)))


@dataclass(frozen=True, slots=True)
class Surface:
    """What something is made of: its colour, and how light falls on it."""

    colour: RGB
    texture: str = "plain"

    @property
    def light(self) -> RGB:
        return mix(self.colour, WHITE, 0.62 if self.texture in ("gold", "silver", "crystal") else 0.36)

    @property
    def dark(self) -> RGB:
        return mix(self.colour, INK, 0.46)

    @property
    def line(self) -> RGB:
        return mix(self.colour, INK, 0.78)


def polygon(*points: Point) -> skia.Path:
    """A closed polygon."""
    path = skia.Path()
    path.addPoly([skia.Point(*point) for point in points], True)
    return path


def curve(start: Point, *segments: Sequence[float]) -> skia.Path:
    """A closed outline: segments of 2 numbers are lines, of 4 quadratic, of 6 cubic Bézier curves."""
    path = skia.Path()
    path.moveTo(*start)
    for segment in segments:
        {2: path.lineTo, 4: path.quadTo, 6: path.cubicTo}[len(segment)](*segment)
    path.close()
    return path


def circle(x: float, y: float, radius: float) -> skia.Path:
    """A circle."""
    path = skia.Path()
    path.addCircle(x, y, radius)
    return path


def oval(left: float, top: float, right: float, bottom: float) -> skia.Path:
    """An ellipse in a box."""
    path = skia.Path()
    path.addOval(skia.Rect(left, top, right, bottom))
    return path


def slab(left: float, top: float, right: float, bottom: float, corner: float = 0.05) -> skia.Path:
    """A rectangle with round corners."""
    path = skia.Path()
    path.addRoundRect(skia.Rect(left, top, right, bottom), corner, corner)
    return path


def union(first: skia.Path, *rest: skia.Path) -> skia.Path:
    """What any of the shapes covers."""
    for path in rest:
        first = skia.Op(first, path, skia.PathOp.kUnion_PathOp)
    return first


def without(path: skia.Path, hole: skia.Path) -> skia.Path:
    """What `path` covers and `hole` does not."""
    return skia.Op(path, hole, skia.PathOp.kDifference_PathOp)


class Brush:
    """Paints shapes on a canvas; `rng` decides grain and speckles."""

    def __init__(self, canvas: skia.Canvas, rng: random.Random, line_width: float = 0.06) -> None:
        self.canvas = canvas
        self.rng = rng
        self.line_width = line_width

    def solid(self, path: skia.Path, surface: Surface, *, gloss: bool = False, line: bool = True) -> None:
        """A lit shape with the surface's texture, an optional highlight and its outline."""
        box = path.computeTightBounds()
        self.canvas.drawPath(path, skia.Paint(AntiAlias=True, Shader=self._light(box, surface)))
        self.canvas.save()
        self.canvas.clipPath(path, doAntiAlias=True)
        self._texture(box, surface)
        if gloss:
            self._gloss(box, 0.2 if surface.texture == "stone" else 0.5)
        self.canvas.restore()
        if line:
            self.outline(path, surface.line)

    def flat(self, path: skia.Path, colour: RGB, alpha: float = 1.0) -> None:
        """A shape in one colour."""
        self.canvas.drawPath(path, skia.Paint(AntiAlias=True, Color=ink(colour, alpha)))

    def outline(self, path: skia.Path, colour: RGB, width: float | None = None, alpha: float = 1.0) -> None:
        """The border of a shape."""
        paint = skia.Paint(
            AntiAlias=True,
            Style=skia.Paint.kStroke_Style,
            StrokeWidth=width or self.line_width,
            StrokeJoin=skia.Paint.kRound_Join,
            StrokeCap=skia.Paint.kRound_Cap,
            Color=ink(colour, alpha),
        )
        self.canvas.drawPath(path, paint)

    def stroke(self, points: Sequence[Point], width: float, colour: RGB, alpha: float = 1.0) -> None:
        """A line through points."""
        path = skia.Path()
        path.addPoly([skia.Point(*point) for point in points], False)
        self.outline(path, colour, width, alpha)

    def _light(self, box: skia.Rect, surface: Surface) -> skia.Shader:
        dx, dy = 0.35 * box.width(), 0.35 * box.height()
        ends = [
            skia.Point(box.centerX() - dx, box.centerY() - dy),
            skia.Point(box.centerX() + dx, box.centerY() + dy),
        ]
        light, base, dark = surface.light, surface.colour, surface.dark
        if surface.texture in ("gold", "silver"):
            bands, stops = [light, base, mix(light, WHITE, 0.5), base, dark], [0.0, 0.3, 0.45, 0.6, 1.0]
        else:
            bands, stops = [light, base, dark], [0.0, 0.5, 1.0]
        return skia.GradientShader.MakeLinear(ends, [ink(band) for band in bands], stops)

    def _texture(self, box: skia.Rect, surface: Surface) -> None:
        rng, x, y = self.rng, box.centerX(), box.centerY()
        half_width, half_height = box.width() / 2, box.height() / 2
        if surface.texture == "wooden":
            top = box.top() + rng.uniform(0.03, 0.1)
            while top < box.bottom():
                bend = rng.uniform(-0.05, 0.05)
                grain = skia.Path()
                grain.moveTo(box.left(), top)
                grain.cubicTo(x - half_width * 0.3, top + bend, x + half_width * 0.3, top - bend, box.right(), top)
                self.outline(grain, surface.dark, 0.04, 0.65)
                top += 0.14
        elif surface.texture == "stone":
            for _ in range(int(16 + 44 * half_width * half_height)):
                spot = rng.uniform(box.left(), box.right()), rng.uniform(box.top(), box.bottom())
                shade = surface.dark if rng.random() < 0.6 else surface.light
                self.flat(circle(*spot, rng.uniform(0.02, 0.06)), shade, 0.5)
        elif surface.texture == "crystal":
            for facet in range(4):
                angle, reach = facet * 1.3 + 0.4, 3.0
                rim = [
                    (x + reach * math.cos(a) * half_width, y + reach * math.sin(a) * half_height)
                    for a in (angle, angle + 0.62)
                ]
                self.flat(polygon((x, y), *rim), WHITE if facet % 2 else surface.dark, 0.34)

    def _gloss(self, box: skia.Rect, alpha: float) -> None:
        x, y, half_width, half_height = box.centerX(), box.centerY(), box.width() / 2, box.height() / 2
        blur = skia.MaskFilter.MakeBlur(skia.kNormal_BlurStyle, 0.07 * min(1.0, max(half_width, half_height) / 0.5))
        spot = skia.Rect(x - 0.72 * half_width, y - 0.8 * half_height, x - 0.05 * half_width, y - 0.25 * half_height)
        self.canvas.drawOval(spot, skia.Paint(AntiAlias=True, MaskFilter=blur, Color=ink(WHITE, alpha)))
