"""Training data is a function of the recipe and an index: a run taken up again sees what it would have seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from training.data import Batches, captions, draw_latents, pictures, training_spec
from training.icons import held_out
from training.latents import fit
from training.recipe import RECIPE

SMALL = replace(RECIPE, num_icons=96, size_px=32, latent_channels=8, batch_size=16)


def test_no_training_icon_is_held_out() -> None:
    specs = [training_spec(RECIPE, index) for index in range(4_000)]
    assert not any(held_out(spec.object, spec.colour, spec.background) for spec in specs)
    assert len({spec.seed for spec in specs}) == len(specs)


def test_training_icons_depend_on_seed_and_index_alone() -> None:
    assert training_spec(RECIPE, 17) == training_spec(replace(RECIPE, num_icons=3), 17)
    assert training_spec(RECIPE, 17) != training_spec(replace(RECIPE, seed=1), 17)


def test_a_batch_is_the_same_whenever_it_is_asked_for() -> None:
    straight, resumed = Batches(SMALL, 0, 2), Batches(SMALL, 0, 2)
    wanted = [straight.at(step) for step in range(8)]
    for step in (7, 2, 5):
        picks, texts = resumed.at(step)
        assert np.array_equal(picks, wanted[step][0])
        assert texts == wanted[step][1]


def test_the_ranks_share_an_epoch_without_repetition() -> None:
    ranks = [Batches(SMALL, rank, 2) for rank in range(2)]
    for epoch in range(2):
        seen = [ranks[rank].at(step)[0] for step in range(3 * epoch, 3 * epoch + 3) for rank in range(2)]
        assert sorted(np.concatenate(seen)) == list(range(SMALL.num_icons))


def test_captions_are_worded_afresh_and_some_are_empty() -> None:
    batches = Batches(SMALL, 0, 1)
    texts = [text for step in range(60) for text in batches.at(step)[1]]
    assert 0.06 < np.mean([text == "" for text in texts]) < 0.14
    wordings: dict[int, set[str]] = {}
    for step in range(60):
        for index, text in zip(*batches.at(step), strict=True):
            wordings.setdefault(int(index), set()).add(text)
    assert np.mean([len(found) for found in wordings.values()]) > 5


def test_latents_on_disk_are_those_of_the_icons(tmp_path: Path) -> None:
    projection = fit(SMALL, pictures(SMALL, range(64)))
    draw_latents(SMALL, projection, tmp_path / "latents.npy", workers=1)
    stored = np.load(tmp_path / "latents.npy")
    assert stored.shape == (96, 8, 2, 2)
    expected = projection.encode(pictures(SMALL, range(90, 96)))
    np.testing.assert_allclose(stored[90:], expected, atol=2e-3, rtol=2e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["latents.npy"]


def test_the_tokenizer_sees_the_same_captions_each_time() -> None:
    assert list(captions(RECIPE, 20)) == list(captions(RECIPE, 20))
