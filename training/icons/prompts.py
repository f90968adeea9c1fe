"""What the pipeline's manifest says of captions: which words mean the same and must agree, and examples.

Invariant of the guard, tested both ways: two captions that mention every detail agree if
and only if they ask for the same icon.
"""

from __future__ import annotations

import random

from training.icons.captions import BACKGROUND_WORDS, COLOUR_WORDS, caption
from training.icons.spec import COLOURS, OBJECTS, sample_spec

MODIFIERS: dict[str, list[list[str]]] = {
    "material": [["crystal", "glass"]],
    "glow": [["glowing", "shining", "magic", "glow", "bright glow"]],
    "outline": [["white outline", "thick white outline", "outlined in white"]],
    "sparkles": [["sparkles"]],
    "tilt": [["tilted left", "leaning left"], ["tilted right", "leaning right"]],
}
IGNORED = "a an the of on against with and in by icon game picture made surrounded"

NUM_EXAMPLES = 128


def about() -> dict[str, object]:
    """Both sections of pipeline.json; see `safelight_server.catalog.manifest.Manifest`."""
    rng = random.Random("examples")
    examples = [caption(sample_spec(rng), rng) for _ in range(NUM_EXAMPLES)]
    return {"guard": guard(), "example_prompts": examples}


def guard() -> dict[str, object]:
    """See `safelight_server.catalog.manifest.GuardWords`."""
    backgrounds = [[f"{word} background" for word in words] for words in BACKGROUND_WORDS.values()]
    groups = {
        "object": [list(names) for names in OBJECTS.values()],
        "colour": [list(dict.fromkeys(COLOUR_WORDS.get(colour, (colour,)))) for colour in COLOURS],
        "background": backgrounds,
        **MODIFIERS,
    }
    return {"groups": groups, "ignored": IGNORED.split(), "closed": True}
