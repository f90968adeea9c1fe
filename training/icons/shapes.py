"""The objects, each drawn upright in the square [-1, 1] x [-1, 1], y down, by one function of a brush and a surface."""

from __future__ import annotations

import math
from collections.abc import Callable

import skia

from training.icons.brush import INK, WHITE, Brush, Surface, circle, curve, mix, oval, polygon, slab, union, without
from training.icons.spec import COLOURS, RGB

BROWN = Surface((138, 88, 50))
GOLD = Surface(COLOURS["gold"], "gold")
STEEL = Surface(COLOURS["silver"], "silver")
IRON = Surface((58, 58, 70))
CREAM = Surface((240, 226, 200))
LEAF = Surface((70, 168, 60))
GLASS: RGB = (214, 232, 240)
FLAMES: tuple[RGB, RGB] = ((255, 140, 20), (255, 240, 120))


def trim(surface: Surface) -> Surface:
    """Fittings that stand out from `surface`."""
    return STEEL if surface.texture == "gold" else GOLD


def _spikes(x: float, y: float, outer: float, inner: float, count: int) -> skia.Path:
    points = []
    for i in range(2 * count):
        angle, radius = -math.pi / 2 + i * math.pi / count, inner if i % 2 else outer
        points.append((x + radius * math.cos(angle), y + radius * math.sin(angle)))
    return polygon(*points)


def potion(brush: Brush, surface: Surface) -> None:
    body = union(circle(0, 0.28, 0.62), slab(-0.2, -0.62, 0.2, -0.1))
    brush.solid(slab(-0.16, -0.9, 0.16, -0.56, 0.06), BROWN)
    brush.flat(body, GLASS)
    brush.canvas.save()
    brush.canvas.clipPath(body, doAntiAlias=True)
    level = brush.rng.uniform(-0.06, 0.06)
    brush.solid(slab(-1, level, 1, 1, 0), surface, line=False)
    brush.flat(oval(-0.64, level - 0.07, 0.64, level + 0.07), surface.light)
    for _ in range(3):
        brush.flat(circle(brush.rng.uniform(-0.35, 0.35), brush.rng.uniform(0.2, 0.7), 0.05), WHITE, 0.5)
    brush.canvas.restore()
    brush.stroke([(-0.4, 0.12), (-0.45, 0.32), (-0.36, 0.52)], 0.09, WHITE, 0.8)
    brush.outline(body, (40, 44, 62))
    brush.solid(slab(-0.26, -0.67, 0.26, -0.53), CREAM)


def sword(brush: Brush, surface: Surface) -> None:
    brush.solid(polygon((-0.17, 0.32), (-0.17, -0.7), (0, -0.98), (0.17, -0.7), (0.17, 0.32)), surface)
    brush.stroke([(0, -0.78), (0, 0.2)], 0.05, surface.dark, 0.7)
    brush.stroke([(-0.09, -0.66), (-0.09, 0.12)], 0.04, WHITE, 0.6)
    brush.solid(slab(-0.09, 0.38, 0.09, 0.82), BROWN)
    brush.solid(slab(-0.46, 0.27, 0.46, 0.43, 0.08), trim(surface))
    brush.solid(circle(0, 0.86, 0.13), trim(surface))


def shield(brush: Brush, surface: Surface) -> None:
    def form(k: float) -> skia.Path:
        return curve(
            (0, -0.85 * k),
            (0.3 * k, -0.68 * k, 0.5 * k, -0.66 * k, 0.74 * k, -0.66 * k),
            (0.76 * k, 0.1 * k, 0.5 * k, 0.6 * k, 0, 0.92 * k),
            (-0.5 * k, 0.6 * k, -0.76 * k, 0.1 * k, -0.74 * k, -0.66 * k),
            (-0.5 * k, -0.66 * k, -0.3 * k, -0.68 * k, 0, -0.85 * k),
        )

    rim = GOLD if surface.texture == "silver" else STEEL
    brush.solid(form(1.0), rim)
    brush.solid(form(0.78), surface)
    brush.stroke([(0, -0.58), (0, 0.6)], 0.08, mix(surface.light, WHITE, 0.2), 0.6)
    brush.solid(circle(0, -0.08, 0.17), rim)


def gem(brush: Brush, surface: Surface) -> None:
    table, girdle = [(-0.46, -0.6), (0.46, -0.6)], [(-0.87, -0.15), (-0.38, -0.15), (0.38, -0.15), (0.87, -0.15)]
    culet = (0.0, 0.84)
    form = polygon(*table, girdle[3], culet, girdle[0])
    brush.solid(form, surface, line=False)
    for facet, shade, alpha in (
        ((table[0], girdle[0], girdle[1]), WHITE, 0.5),
        ((table[0], girdle[1], (0, -0.6)), WHITE, 0.25),
        (((0, -0.6), girdle[1], girdle[2]), WHITE, 0.6),
        ((table[1], girdle[2], girdle[3]), INK, 0.12),
        ((girdle[1], girdle[2], culet), WHITE, 0.18),
        ((girdle[2], girdle[3], culet), INK, 0.3),
    ):
        brush.flat(polygon(*facet), shade, alpha)
    brush.outline(form, surface.line)


def heart(brush: Brush, surface: Surface) -> None:
    form = curve(
        (0, 0.82),
        (-0.5, 0.4, -0.94, 0.05, -0.9, -0.32),
        (-0.86, -0.82, -0.2, -0.86, 0, -0.38),
        (0.2, -0.86, 0.86, -0.82, 0.9, -0.32),
        (0.94, 0.05, 0.5, 0.4, 0, 0.82),
    )
    brush.solid(form, surface, gloss=True)
    brush.stroke([(-0.58, -0.44), (-0.67, -0.26)], 0.12, WHITE, 0.85)


def coin(brush: Brush, surface: Surface) -> None:
    brush.solid(oval(-0.68, -0.76, 0.84, 0.8), Surface(surface.dark, surface.texture))
    brush.solid(circle(-0.06, 0, 0.77), surface)
    brush.outline(circle(-0.06, 0, 0.58), surface.dark, 0.07)
    brush.solid(polygon((-0.06, -0.38), (0.2, 0), (-0.06, 0.38), (-0.32, 0)), Surface(surface.light))


def key(brush: Brush, surface: Surface) -> None:
    bow = without(circle(0, -0.5, 0.42), circle(0, -0.5, 0.19))
    bits = slab(0, 0.4, 0.4, 0.56, 0.03), slab(0, 0.7, 0.34, 0.88, 0.03)
    brush.solid(union(bow, slab(-0.11, -0.15, 0.11, 0.92, 0.03), *bits), surface)


def star(brush: Brush, surface: Surface) -> None:
    brush.solid(_spikes(0, 0.05, 0.94, 0.42, 5), surface, gloss=True)


def mushroom(brush: Brush, surface: Surface) -> None:
    brush.solid(
        curve(
            (-0.24, 0),
            (-0.18, 0.4, -0.36, 0.6, -0.36, 0.74),
            (-0.2, 0.94, 0.2, 0.94, 0.36, 0.74),
            (0.36, 0.6, 0.18, 0.4, 0.24, 0),
        ),
        CREAM,
    )
    cap = curve(
        (-0.88, 0.1), (-0.92, -0.55, -0.4, -0.86, 0, -0.86), (0.4, -0.86, 0.92, -0.55, 0.88, 0.1),
        (0.5, 0.28, -0.5, 0.28, -0.88, 0.1),
    )  # fmt: skip
    brush.solid(cap, surface)
    spots: RGB = WHITE if sum(surface.colour) < 640 else (216, 60, 60)
    for x, y, radius in ((-0.44, -0.24, 0.16), (0.1, -0.52, 0.14), (0.5, -0.12, 0.16), (0, -0.03, 0.1)):
        brush.flat(oval(x - radius, y - 0.85 * radius, x + radius, y + 0.85 * radius), spots, 0.9)


def crown(brush: Brush, surface: Surface) -> None:
    brush.solid(
        polygon((-0.8, 0.5), (-0.9, -0.42), (-0.42, 0.02), (0, -0.66), (0.42, 0.02), (0.9, -0.42), (0.8, 0.5)), surface
    )
    for x, y in ((-0.88, -0.46), (0.0, -0.7), (0.88, -0.46)):
        brush.solid(circle(x, y, 0.12), surface)
    brush.solid(slab(-0.84, 0.4, 0.84, 0.68, 0.06), surface)
    stones = Surface(COLOURS["blue" if surface.colour == COLOURS["red"] else "red"])
    for x in (-0.5, 0.0, 0.5):
        brush.solid(circle(x, 0.54, 0.09), stones)


def ring(brush: Brush, surface: Surface) -> None:
    jewelled = surface.texture in ("plain", "crystal")
    band = without(circle(0, 0.26, 0.64), circle(0, 0.26, 0.42))
    brush.solid(band, GOLD if jewelled else surface)
    stone = surface if jewelled else Surface(COLOURS["red"])
    brush.solid(polygon((-0.26, -0.92), (0.26, -0.92), (0.48, -0.62), (0, -0.12), (-0.48, -0.62)), stone)
    brush.stroke([(-0.38, -0.62), (0.38, -0.62)], 0.04, WHITE, 0.65)


def bomb(brush: Brush, surface: Surface) -> None:
    fuse = skia.Path()
    fuse.moveTo(0.3, -0.42)
    fuse.cubicTo(0.4, -0.75, 0.6, -0.7, 0.68, -0.62)
    brush.outline(fuse, (176, 136, 88), 0.09)
    brush.solid(circle(-0.08, 0.2, 0.67), surface, gloss=True)
    brush.canvas.save()
    brush.canvas.rotate(38)
    brush.solid(slab(-0.2, -0.66, 0.2, -0.42), STEEL if surface.colour == COLOURS["black"] else IRON)
    brush.canvas.restore()
    for colour, radius in zip(FLAMES, (0.26, 0.14), strict=True):
        brush.flat(_spikes(0.7, -0.64, radius, radius / 2, 6), colour)


def apple(brush: Brush, surface: Surface) -> None:
    brush.stroke([(0, -0.4), (0.08, -0.84)], 0.1, (100, 64, 36))
    brush.solid(
        curve(
            (0, -0.4),
            (0.3, -0.66, 0.88, -0.52, 0.8, 0.1),
            (0.74, 0.6, 0.4, 0.94, 0, 0.78),
            (-0.4, 0.94, -0.74, 0.6, -0.8, 0.1),
            (-0.88, -0.52, -0.3, -0.66, 0, -0.4),
        ),
        surface,
        gloss=True,
    )
    foliage = Surface((160, 205, 70)) if surface.colour == COLOURS["green"] else LEAF
    brush.solid(
        curve((0.06, -0.6), (0.2, -0.95, 0.5, -0.94, 0.64, -0.8), (0.5, -0.55, 0.25, -0.5, 0.06, -0.6)), foliage
    )


def axe(brush: Brush, surface: Surface) -> None:
    brush.solid(slab(-0.1, -0.92, 0.1, 0.95, 0.06), BROWN)
    brush.solid(
        curve(
            (-0.2, -0.64),
            (0.3, -0.68),
            (0.5, -0.78, 0.64, -0.88, 0.76, -0.94),
            (0.94, -0.5, 0.94, -0.1, 0.72, 0.32),
            (0.6, 0.1, 0.46, -0.02, 0.3, -0.08),
            (-0.2, -0.14),
        ),
        surface,
    )


def chest(brush: Brush, surface: Surface) -> None:
    bands = trim(surface)
    brush.solid(slab(-0.8, -0.02, 0.8, 0.72), surface)
    lid = curve((-0.84, -0.02), (-0.84, -0.2), (-0.82, -0.74, 0.82, -0.74, 0.84, -0.2), (0.84, -0.02))
    brush.solid(lid, surface)
    for x in (-0.56, 0.56):
        brush.solid(slab(x - 0.09, -0.5, x + 0.09, 0.72, 0.03), bands)
    brush.stroke([(-0.82, 0), (0.82, 0)], 0.06, surface.line)
    brush.solid(slab(-0.16, -0.14, 0.16, 0.24), bands)
    brush.flat(circle(0, 0.04, 0.06), INK)


def moon(brush: Brush, surface: Surface) -> None:
    brush.solid(without(circle(0, 0, 0.88), circle(0.4, -0.18, 0.68)), surface)


def book(brush: Brush, surface: Surface) -> None:
    brush.solid(slab(-0.6, -0.7, 0.74, 0.84, 0.06), CREAM)
    for y in (0.72, 0.78):
        brush.stroke([(-0.5, y), (0.68, y)], 0.02, CREAM.dark, 0.6)
    brush.solid(slab(-0.68, -0.84, 0.66, 0.66, 0.06), surface)
    brush.solid(slab(-0.68, -0.84, -0.46, 0.66, 0.06), Surface(surface.dark))
    clasp = trim(surface)
    brush.solid(polygon((0.1, -0.42), (0.36, -0.09), (0.1, 0.24), (-0.16, -0.09)), clasp)
    for y in (-0.78, 0.48):
        brush.solid(slab(0.5, y, 0.66, y + 0.12, 0.02), clasp)


def hammer(brush: Brush, surface: Surface) -> None:
    brush.solid(slab(-0.1, -0.5, 0.1, 0.95, 0.05), BROWN)
    brush.solid(slab(-0.12, 0.7, 0.12, 0.95, 0.05), trim(surface))
    brush.solid(slab(-0.6, -0.86, 0.6, -0.3, 0.06), surface)
    for x in (-0.8, 0.56):
        brush.solid(slab(x, -0.94, x + 0.24, -0.22, 0.06), surface)


def candle(brush: Brush, surface: Surface) -> None:
    brush.solid(oval(-0.62, 0.6, 0.62, 0.92), trim(surface))
    brush.solid(slab(-0.32, -0.3, 0.32, 0.76, 0.08), surface)
    brush.solid(curve((-0.32, -0.2), (-0.32, -0.36, 0.32, -0.36, 0.32, -0.2), (0.3, 0.2, 0.14, 0.2, 0.14, -0.04),
                      (0.06, -0.1, -0.04, -0.1, -0.08, 0.06), (-0.2, 0.16, -0.3, 0.1, -0.32, -0.2)),
                Surface(surface.light), line=False)  # fmt: skip
    brush.stroke([(0, -0.3), (0, -0.48)], 0.06, INK)
    for colour, k in zip(FLAMES, (1.0, 0.55), strict=True):
        tip = -0.42 - 0.56 * k
        brush.flat(
            curve((0, tip), (0.34 * k, -0.66, 0.2 * k, -0.4, 0, -0.4), (-0.2 * k, -0.4, -0.34 * k, -0.66, 0, tip)),
            colour,
        )


def leaf(brush: Brush, surface: Surface) -> None:
    brush.stroke([(0, 0.4), (0, 0.96)], 0.09, surface.dark)
    brush.solid(curve((0, -0.96), (0.5, -0.62, 0.86, -0.02, 0, 0.7), (-0.86, -0.02, -0.5, -0.62, 0, -0.96)), surface)
    brush.stroke([(0, -0.8), (0, 0.66)], 0.05, surface.dark, 0.8)
    for y in (-0.42, -0.1, 0.22):
        for side in (-1, 1):
            brush.stroke([(0, y + 0.14), (side * 0.32, y - 0.1)], 0.04, surface.dark, 0.7)


def flower(brush: Brush, surface: Surface) -> None:
    brush.stroke([(0, 0.2), (0.02, 0.96)], 0.1, LEAF.dark)
    brush.solid(curve((0.02, 0.86), (0.2, 0.46, 0.5, 0.5, 0.62, 0.56), (0.5, 0.84, 0.2, 0.9, 0.02, 0.86)), LEAF)
    for i in range(6):
        angle = i * math.pi / 3
        brush.solid(circle(0.42 * math.cos(angle), -0.28 + 0.42 * math.sin(angle), 0.29), surface)
    centre = (
        Surface((132, 84, 40)) if surface.colour in (COLOURS["yellow"], COLOURS["gold"]) else Surface((252, 206, 60))
    )
    brush.solid(circle(0, -0.28, 0.24), centre)


def skull(brush: Brush, surface: Surface) -> None:
    brush.solid(slab(-0.42, 0.2, 0.42, 0.86, 0.1), surface)
    brush.solid(oval(-0.8, -0.88, 0.8, 0.5), surface)
    brush.flat(slab(-0.39, 0.3, 0.39, 0.5, 0.05), surface.colour)
    for x in (-0.34, 0.34):
        brush.flat(circle(x, -0.1, 0.22), INK, 0.92)
    brush.flat(polygon((0, 0.14), (0.1, 0.34), (-0.1, 0.34)), INK, 0.92)
    for x in (-0.2, 0.0, 0.2):
        brush.stroke([(x, 0.56), (x, 0.8)], 0.05, surface.line)


def goblet(brush: Brush, surface: Surface) -> None:
    brush.solid(slab(-0.1, 0.1, 0.1, 0.74, 0.04), surface)
    brush.solid(oval(-0.46, 0.62, 0.46, 0.92), surface)
    brush.solid(
        curve((-0.62, -0.72), (-0.62, 0.02, -0.34, 0.24, 0, 0.24), (0.34, 0.24, 0.62, 0.02, 0.62, -0.72)), surface
    )
    brush.solid(oval(-0.62, -0.9, 0.62, -0.56), Surface(surface.dark))
    brush.stroke([(-0.42, -0.42), (-0.36, -0.14)], 0.08, WHITE, 0.6)


def bolt(brush: Brush, surface: Surface) -> None:
    brush.solid(
        polygon((0.16, -0.96), (-0.62, 0.14), (-0.1, 0.14), (-0.26, 0.96), (0.62, -0.26), (0.08, -0.26), (0.5, -0.96)),
        surface,
    )


DRAWINGS: dict[str, Callable[[Brush, Surface], None]] = {
    function.__name__: function
    for function in (
        potion, sword, shield, gem, heart, coin, key, star, mushroom, crown, ring, bomb, apple, axe, chest, moon,
        book, hammer, candle, leaf, flower, skull, goblet, bolt,
    )
}  # fmt: skip
"""Object -> how it is drawn."""

SLANTED = frozenset({"sword", "axe", "key", "hammer"})
"""Long objects, which a tilt turns further."""
