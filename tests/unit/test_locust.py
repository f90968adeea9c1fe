"""The prompts of Locust's users, and the preview from which a picture counts as recognisable."""

from __future__ import annotations

import io
import random
from collections import Counter

import PIL.Image
import pytest
from PIL import ImageOps

from load_tests.locust.prompts import PROMPTS, Prompts
from load_tests.locust.recognition import MAX_DISTANCE, distance, first_recognisable, thumbnail


def encoded(colour: tuple[int, int, int], edge_px: int = 64, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    PIL.Image.new("RGB", (edge_px, edge_px), colour).save(out, kind)
    return out.getvalue()


def test_the_kth_prompt_is_drawn_with_a_weight_of_one_by_k(tmp_path):
    (tmp_path / "prompts").write_text("first\n\n  second \nthird\n")
    prompts, rng = Prompts(tmp_path / "prompts", 1.0, 0), random.Random(1)
    drawn = Counter(prompts.draw(rng) for _ in range(11_000))
    assert {prompt for prompt, _ in drawn} == {"first", "second", "third"}
    expected = {"first": 6000, "second": 3000, "third": 2000}
    for prompt, count in expected.items():
        assert drawn[prompt, None] == pytest.approx(count, rel=0.1)


def test_an_exponent_of_zero_draws_all_alike(tmp_path):
    (tmp_path / "prompts").write_text("first\nsecond\n")
    prompts, rng = Prompts(tmp_path / "prompts", 0.0, 0), random.Random(1)
    assert Counter(prompts.draw(rng)[0] for _ in range(2000))["first"] == pytest.approx(1000, rel=0.1)


def test_seeds_come_from_as_many_as_are_given():
    prompts, rng = Prompts(PROMPTS, 1.0, 2), random.Random(1)
    assert {prompts.draw(rng)[1] for _ in range(50)} == {0, 1}


@pytest.mark.parametrize(("text", "exponent", "num_seeds"), [("\n \n", 1.0, 0), ("x", -1.0, 0), ("x", 1.0, -1)])
def test_what_cannot_be_drawn_is_refused(tmp_path, text, exponent, num_seeds):
    (tmp_path / "prompts").write_text(text)
    with pytest.raises(ValueError, match=r"write one a line|at least 0"):
        Prompts(tmp_path / "prompts", exponent, num_seeds)


def test_distance_is_zero_for_equal_pictures_of_any_size_and_one_for_black_and_white():
    black, white = (thumbnail(encoded((shade,) * 3)) for shade in (0, 255))
    assert distance(black, thumbnail(encoded((0, 0, 0), 128, "JPEG"))) == 0
    assert distance(black, white) == distance(white, ImageOps.invert(white)) == 1


def test_the_first_preview_within_the_bound_counts():
    picture = encoded((100, 100, 100))
    within, beyond = (encoded((100 + round(255 * MAX_DISTANCE) + beside,) * 3) for beside in (-1, 2))
    assert first_recognisable([(1.0, beyond), (2.0, within), (3.0, picture)], picture) == 2.0
    assert first_recognisable([(1.0, beyond)], picture) is None
