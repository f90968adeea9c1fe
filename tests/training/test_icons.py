"""Icons are a function of their spec, and captions say what is drawn."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from training.icons import BACKGROUNDS, COLOURS, OBJECTS, Spec, caption, held_out, sample_spec
from training.icons.captions import BACKGROUND_WORDS, COLOUR_WORDS
from training.icons.render import render
from training.icons.shapes import DRAWINGS, SLANTED

PLAIN = Spec("sword", "gold", "blue", seed=7)


def test_the_same_seed_gives_the_same_icons() -> None:
    first, second = random.Random(3), random.Random(3)
    for _ in range(12):
        assert np.array_equal(render(sample_spec(first)), render(sample_spec(second)))


def test_an_icon_is_a_square_of_bytes_at_any_size() -> None:
    for size_px in (32, 128):
        icon = render(PLAIN, size_px)
        assert icon.shape == (size_px, size_px, 3)
        assert icon.dtype == np.uint8


def test_every_word_of_the_vocabulary_has_a_drawing() -> None:
    assert set(DRAWINGS) == set(OBJECTS)
    assert set(OBJECTS) >= SLANTED
    assert set(BACKGROUND_WORDS) == set(BACKGROUNDS)
    assert set(COLOUR_WORDS) <= set(COLOURS)


@pytest.mark.parametrize(
    "changes",
    [
        {"object": "axe"},
        {"colour": "yellow"},
        {"colour": "silver"},
        {"background": "red"},
        {"glow": True},
        {"outline": True},
        {"sparkles": True},
        {"tilt": "left"},
        {"tilt": "right"},
        {"seed": 8},
    ],
    ids=str,
)
def test_each_part_of_a_spec_shows(changes: dict[str, object]) -> None:
    change = np.abs(render(PLAIN).astype(int) - render(replace(PLAIN, **changes)).astype(int))
    assert (change.max(axis=2) > 24).sum() > 100


def test_a_tilt_leans_the_way_it_says() -> None:
    """Where a sword's bright blade lies, weighed above the middle of the picture."""
    middle = []
    for tilt in ("left", None, "right"):
        top = render(replace(PLAIN, tilt=tilt, background="dark"))[:50].astype(float).sum(axis=2)
        weight = np.clip(top - 200, 0, None).sum(axis=0)
        middle.append(float((weight * np.arange(128)).sum() / weight.sum()))
    assert middle[0] < middle[1] - 10 < middle[2] - 20


def test_held_out_is_one_triple_in_twenty_and_never_changes() -> None:
    triples = [(o, c, b) for o in OBJECTS for c in COLOURS for b in BACKGROUNDS]
    kept = [triple for triple in triples if held_out(*triple)]
    assert 0.04 < len(kept) / len(triples) < 0.06
    assert not held_out("sword", "gold", "blue")
    assert kept[0] == ("potion", "red", "green")


def test_every_object_colour_and_background_is_also_trained_on() -> None:
    seen = [(o, c, b) for o in OBJECTS for c in COLOURS for b in BACKGROUNDS if not held_out(o, c, b)]
    for values, place in ((OBJECTS, 0), (COLOURS, 1), (BACKGROUNDS, 2)):
        assert {triple[place] for triple in seen} == set(values)


def test_a_full_caption_says_all_that_is_drawn() -> None:
    rng = random.Random(11)
    for _ in range(500):
        spec = sample_spec(rng)
        text = caption(spec, rng, full=True)
        assert any(name in text for name in OBJECTS[spec.object]), (spec, text)
        assert any(word in text for word in (spec.colour, "wood", *COLOUR_WORDS.get(spec.colour, ()))), (spec, text)
        assert "background" in text
        assert any(f"{word} background" in text for word in BACKGROUND_WORDS[spec.background]), (spec, text)
        assert ("sparkles" in text) is spec.sparkles
        assert ("outline" in text) is spec.outline
        assert any(word in text for word in ("glow", "shining", "magic")) is spec.glow
        assert any(word in text for word in ("tilted", "leaning")) is (spec.tilt is not None)
        assert spec.tilt is None or f" {spec.tilt}" in text


def test_a_caption_always_names_object_and_colour_and_sometimes_leaves_the_rest() -> None:
    rng = random.Random(12)
    spec = replace(PLAIN, sparkles=True, tilt="left")
    texts = [caption(spec, rng) for _ in range(400)]
    assert all("gold" in text and ("sword" in text or "blade" in text) for text in texts)
    assert 0.03 < np.mean(["background" not in text for text in texts]) < 0.25
    assert 0.03 < np.mean(["sparkles" not in text for text in texts]) < 0.25
    assert len(set(texts)) > 100
