"""The decoders are trained by several processes as by one, and a run that was killed goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from training import checkpoint, decoders, parallel
from training.data import pictures
from training.latents import Projection, fit
from training.recipe import RECIPE

TINY = replace(
    RECIPE,
    num_icons=16,
    size_px=32,
    latent_channels=4,
    decoder_channels=8,
    decoder_blocks=(1, 0, 0, 0, 0),
    preview_channels=8,
    preview_blocks=(1, 0),
    decoder_icons=8,
    decoder_batch_size=4,
    decoder_samples=24,
)


class Killed(Exception):
    """In place of the signal."""


@pytest.fixture(scope="module")
def encoder() -> Projection:
    return fit(TINY, pictures(TINY, range(16)))


@pytest.fixture(autouse=True)
def few_test_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "HELD_OUT", 2)


def _weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    state = checkpoint.load(folder / f"{name}.pt")
    assert state is not None and state["step"] == 6
    return state["decoder"]


def test_two_processes_learn_what_one_does(tmp_path: Path, encoder: Projection) -> None:
    for world in (1, 2):
        (tmp_path / str(world)).mkdir()
        parallel.start(decoders.train_all, (TINY, tmp_path / str(world), encoder), tmp_path / str(world), world)
    for name in ("decoder", "preview_decoder"):
        alone, together = (_weights(tmp_path / str(world), name) for world in (1, 2))
        for key, value in alone.items():
            torch.testing.assert_close(together[key], value, rtol=1e-3, atol=1e-4, msg=f"{name} {key}")
    assert set(json.loads((tmp_path / "2" / "decoders.json").read_text())) == {
        "linear_preview",
        "decoder",
        "preview_decoder",
    }


def test_a_killed_run_goes_on_to_the_same_weights(
    tmp_path: Path, encoder: Projection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "CHECKPOINT_EVERY_S", -1.0)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for folder in (straight, broken):
        folder.mkdir()
    decoders.train_all(TINY, straight, encoder, 0, 1)

    share = decoders.Job.share

    def dies_at(job: decoders.Job, step: int) -> object:
        if step == 3:
            raise Killed
        return share(job, step)

    with monkeypatch.context() as patch:
        patch.setattr(decoders.Job, "share", dies_at)
        with pytest.raises(Killed):
            decoders.train_all(TINY, broken, encoder, 0, 1)
    decoders.train_all(TINY, broken, encoder, 0, 1)
    for name in ("decoder", "preview_decoder"):
        wanted, found = _weights(straight, name), _weights(broken, name)
        assert all(torch.equal(found[key], value) for key, value in wanted.items())


@pytest.mark.parametrize(("workers", "processes"), [(1, 1), (2, 2), (3, 1), (12, 4), (16, 16), (40, 8)])
def test_the_processes_share_a_batch_evenly(workers: int, processes: int) -> None:
    assert decoders.num_processes(replace(RECIPE, decoder_batch_size=16), workers) == processes
