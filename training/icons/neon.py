"""The style of the shipped adapter: neon tubes in the dark. The base model was trained on no such drawing."""

from __future__ import annotations

import skia

from training.icons.brush import INK, WHITE, Brush, Surface, mix
from training.icons.spec import RGB

DARK = 0.7
"""How far a background goes to black."""
TUBE, CORE = 0.17, 0.06
"""Widths of a tube and of the light within it; half of a drawing is 1."""


class NeonBrush(Brush):
    """Draws the outlines of shapes as tubes of their colour; what they enclose stays dark."""

    def solid(self, path: skia.Path, surface: Surface, *, gloss: bool = False, line: bool = True) -> None:
        """A tube along the border of a dark shape; materials and gloss do not show."""
        super().flat(path, mix(surface.colour, INK, 0.9))
        self._tube(path, surface.colour)

    def flat(self, path: skia.Path, colour: RGB, alpha: float = 1.0) -> None:
        """Details are too small for tubes: they are left dark."""

    def _tube(self, path: skia.Path, colour: RGB) -> None:
        bright = mix(colour, WHITE, 0.25)
        self.outline(path, bright, TUBE)
        self.outline(path, mix(bright, WHITE, 0.6), CORE)
