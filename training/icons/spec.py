"""What an icon shows: the one place for the vocabulary of objects, colours and backgrounds."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

RGB = tuple[int, int, int]

OBJECTS: dict[str, tuple[str, ...]] = {
    "potion": ("potion", "potion bottle", "elixir", "flask"),
    "sword": ("sword", "blade", "longsword"),
    "shield": ("shield",),
    "gem": ("gem", "jewel", "gemstone"),
    "heart": ("heart",),
    "coin": ("coin",),
    "key": ("key",),
    "star": ("star",),
    "mushroom": ("mushroom", "toadstool"),
    "crown": ("crown",),
    "ring": ("ring",),
    "bomb": ("bomb",),
    "apple": ("apple",),
    "axe": ("axe", "hatchet"),
    "chest": ("treasure chest", "chest"),
    "moon": ("moon", "crescent moon"),
    "book": ("book", "spellbook", "tome"),
    "hammer": ("hammer", "war hammer"),
    "candle": ("candle",),
    "leaf": ("leaf",),
    "flower": ("flower", "blossom"),
    "skull": ("skull",),
    "goblet": ("goblet", "cup", "chalice"),
    "bolt": ("lightning bolt", "lightning"),
}
"""Object -> its names in captions."""

PAINTS: dict[str, RGB] = {
    "red": (222, 42, 48),
    "orange": (245, 132, 28),
    "yellow": (252, 220, 40),
    "green": (52, 176, 66),
    "cyan": (52, 205, 216),
    "blue": (44, 98, 226),
    "purple": (144, 66, 212),
    "pink": (246, 112, 178),
    "white": (240, 241, 244),
    "black": (44, 44, 54),
}
MATERIALS: dict[str, RGB] = {
    "gold": (236, 176, 40),
    "silver": (182, 194, 212),
    "wooden": (158, 100, 52),
    "stone": (134, 132, 128),
}
COLOURS: dict[str, RGB] = PAINTS | MATERIALS
"""What an object can be coloured with or made of; one word of a caption either way."""

BACKGROUNDS: dict[str, RGB] = {
    "dark": (28, 28, 40),
    "white": (244, 244, 246),
    "grey": (128, 132, 140),
    "blue": (60, 104, 176),
    "green": (74, 138, 84),
    "purple": (92, 62, 140),
    "red": (156, 52, 56),
    "sandy": (222, 196, 150),
}


@dataclass(frozen=True, slots=True)
class Spec:
    """One icon. `seed` decides all that a caption does not say; `crystal` only with a paint."""

    object: str
    colour: str
    background: str
    crystal: bool = False
    glow: bool = False
    outline: bool = False
    sparkles: bool = False
    tilt: str | None = None
    seed: int = 0


def held_out(obj: str, colour: str, background: str) -> bool:
    """Whether a triple is kept from training, to be asked for in evaluation: one in twenty, by hash."""
    digest = hashlib.sha256(f"{obj},{colour},{background}".encode()).hexdigest()
    return int(digest, 16) % 20 == 0


def sample_spec(rng: random.Random) -> Spec:
    """Draws a spec, held out or not. Paints are as frequent as they are needed most."""
    obj = rng.choice(list(OBJECTS))
    crystal = False
    if rng.random() < 0.7:
        colour = rng.choice(list(PAINTS))
        crystal = colour != "black" and rng.random() < 0.18
    else:
        colour = rng.choice(list(MATERIALS))
        while obj in ("potion", "candle") and colour in ("wooden", "stone"):
            colour = rng.choice(list(MATERIALS))
    glow = rng.random() < 0.22
    return Spec(
        object=obj,
        colour=colour,
        background=rng.choice(list(BACKGROUNDS)),
        crystal=crystal,
        glow=glow,
        outline=not glow and rng.random() < 0.15,
        sparkles=rng.random() < 0.25,
        tilt=rng.choice((None, None, None, "left", "right")),
        seed=rng.getrandbits(32),
    )
