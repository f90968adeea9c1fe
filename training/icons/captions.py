"""How one would ask for an icon, in plain words; a new wording at each call."""

from __future__ import annotations

import random

from training.icons.spec import MATERIALS, OBJECTS, Spec

BACKGROUND_WORDS = {
    "dark": ("dark", "black"),
    "white": ("white", "light"),
    "grey": ("grey", "gray"),
    "blue": ("blue",),
    "green": ("green",),
    "purple": ("purple", "violet"),
    "red": ("red",),
    "sandy": ("sandy", "beige"),
}
COLOUR_WORDS = {
    "purple": ("purple", "purple", "violet"),
    "cyan": ("cyan", "turquoise"),
    "gold": ("gold", "golden"),
    "wooden": ("wooden", "wood"),
    "stone": ("stone", "rock"),
}
OPENINGS = ("", "", "the ", "{a} ", "{a} ", "{a} ", "icon of {a} ", "game icon, {a} ", "a picture of {a} ")
KEEP = 0.9
"""Probability that a caption mentions a detail; the object and its colour are always named."""


def caption(spec: Spec, rng: random.Random, full: bool = False) -> str:
    """One wording of what `spec` shows; with `full` every detail is mentioned."""

    def mentioned(detail: object) -> bool:
        return bool(detail) and (full or rng.random() < KEEP)

    colour = rng.choice(COLOUR_WORDS.get(spec.colour, (spec.colour,)))
    adjectives = [colour, rng.choice(("crystal", "crystal", "glass"))] if spec.crystal else [colour]
    front: list[str] = []
    tail: list[str] = []
    if mentioned(spec.glow):
        if rng.random() < 0.75:
            front.append(rng.choice(("glowing", "glowing", "shining", "magic")))
        else:
            tail.append(rng.choice(("with a glow", "with a bright glow")))
    if mentioned(spec.outline):
        tail.append(rng.choice(("with a white outline", "with a thick white outline", "outlined in white")))
    if mentioned(spec.sparkles):
        tail.append(rng.choice(("with sparkles", "and sparkles", "surrounded by sparkles")))
    if mentioned(spec.tilt):
        tail.append(f"{rng.choice(('tilted', 'tilted', 'leaning'))} {spec.tilt}")
    rng.shuffle(tail)
    if mentioned(spec.background):
        word = rng.choice(BACKGROUND_WORDS[spec.background])
        phrase = rng.choice(("on a {} background", "on a {} background", "on {} background", "against a {} background"))
        tail.insert(len(tail) if rng.random() < 0.8 else 0, phrase.format(word))
    noun = rng.choice(OBJECTS[spec.object])
    if spec.colour in MATERIALS and rng.random() < 0.12:
        material = {"wooden": "wood"}.get(spec.colour, spec.colour)
        core = " ".join([*front, noun, "made of", material])
    else:
        core = " ".join([*front, *adjectives, noun])
    opening = rng.choice(OPENINGS).format(a="an" if core[0] in "aeiou" else "a")
    separator = ", " if rng.random() < 0.25 else " "
    return separator.join([opening + core, *tail])
