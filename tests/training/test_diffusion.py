"""A run that is killed and taken up again ends with the weights that it would have had."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from training import checkpoint, diffusion, networks
from training.data import Batches, captions
from training.recipe import RECIPE

TINY = replace(
    RECIPE,
    num_icons=64,
    size_px=32,
    latent_channels=4,
    text_width=16,
    unet_channels=(16, 16),
    norm_groups=4,
    batch_size=4,
    warmup_samples=8,
    diffusion_samples=24,
)


class Killed(Exception):
    """In place of the signal."""


def _kill(*_: object) -> None:
    raise Killed


@pytest.fixture(scope="module")
def tokens() -> object:
    return networks.tokenizer(TINY, captions(TINY, 500))


def _folder(path: Path) -> Path:
    path.mkdir()
    rng = np.random.default_rng(0)
    np.save(path / "latents.npy", rng.standard_normal((TINY.num_icons, 4, 2, 2)).astype(np.float16))
    return path


def test_a_killed_run_goes_on_to_the_same_weights(
    tmp_path: Path, tokens: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusion, "CHECKPOINT_EVERY_S", -1.0)
    straight, broken = _folder(tmp_path / "straight"), _folder(tmp_path / "broken")
    diffusion.train(TINY, straight, tokens, 0, 1)

    at = Batches.at
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "at", lambda self, step: at(self, step) if step < 3 else _kill())
        with pytest.raises(Killed):
            diffusion.train(TINY, broken, tokens, 0, 1)
    diffusion.train(TINY, broken, tokens, 0, 1)

    wanted, found = (checkpoint.load(folder / "diffusion.pt") for folder in (straight, broken))
    assert wanted is not None and found is not None
    assert wanted["samples"] == found["samples"] == 24
    for part in ("model", "average"):
        for name, value in wanted[part].items():
            assert torch.equal(value, found[part][name]), name


def test_a_finished_run_is_left_alone(tmp_path: Path, tokens: object) -> None:
    folder = _folder(tmp_path / "work")
    diffusion.train(TINY, folder, tokens, 0, 1)
    before = (folder / "diffusion.pt").stat().st_mtime_ns
    diffusion.train(TINY, folder, tokens, 0, 1)
    assert (folder / "diffusion.pt").stat().st_mtime_ns == before


def test_the_learning_rate_warms_up_holds_and_decays() -> None:
    recipe = replace(RECIPE, learning_rate=1.0, warmup_samples=100, decay_fraction=0.25, diffusion_samples=1000)
    rates = [diffusion.learning_rate(recipe, samples) for samples in (0, 50, 100, 750, 875, 1000)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 1.0, 0.5, 0.01])


def test_a_checkpoint_that_was_not_finished_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.pt"
    assert checkpoint.load(path) is None
    checkpoint.save(path, {"step": 1})

    monkeypatch.setattr(checkpoint.os, "fsync", _kill)
    with pytest.raises(Killed):
        checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path) == {"step": 1}


def test_the_tokenizer_frames_and_pads_to_the_context(tokens: object) -> None:
    ids = tokens(["a red potion", ""], padding="max_length", truncation=True, max_length=TINY.max_tokens).input_ids
    assert [len(row) for row in ids] == [TINY.max_tokens] * 2
    assert all(row[0] == tokens.bos_token_id and row[-1] == tokens.eos_token_id for row in ids)
    assert set(ids[1][1:]) == {tokens.eos_token_id}
