"""Training an adapter, on a tiny budget: the shipped weights again in torch, runs that go on, and what the server takes."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from safelight_server.catalog import adapters
from safelight_server.catalog.manifest import AdapterRoom
from safelight_server.export.adapters import Adapters

from training import checkpoint, lora, parallel, style
from training.evaluate import find_manifest
from training.icons import held_out, sample_spec
from training.icons.render import NEON, PLAIN, render
from training.lora import CHECKPOINT, LORA, NAME, Options
from training.restore import restore_pipeline

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]
MODELS = Path(__file__).parents[2] / "models"
TINY = replace(LORA, num_drawings=8, wordings=2, batch_size=4, num_samples=16)


class Killed(Exception):
    """In place of the signal."""


@pytest.fixture(scope="module")
def icons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped pipeline as a diffusers folder; each network was compared with its file."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("lora") / "icons"
    restore_pipeline(find_manifest(MODELS, "icons", None), folder)
    return folder


def train(icons: Path, folder: Path, options: Options = Options(), recipe: lora.LoraRecipe = TINY) -> None:
    """A training in this process, where the one before may have been of another precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder.mkdir(exist_ok=True)
    lora.train(recipe, options, icons, folder, 0, 1)


def weights(folder: Path) -> torch.Tensor:
    """Those of the adapter at the end, one after the other."""
    state = checkpoint.load(folder / CHECKPOINT)
    assert state is not None and state["step"] == TINY.num_steps
    return torch.cat([weight.flatten() for weight in state["adapter"].values()])


@pytest.fixture(scope="module")
def plain(icons: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training in float32, one process, from the begin to the end."""
    folder = tmp_path_factory.mktemp("plain")
    train(icons, folder)
    return folder


def test_the_restored_pipeline_says_what_the_manifest_says(icons: Path) -> None:
    said = json.loads(find_manifest(MODELS, "icons", None).read_text())
    assert json.loads((icons / "prompts.json").read_text())["example_prompts"] == said["example_prompts"]
    pipeline = StableDiffusionPipeline.from_pretrained(icons, safety_checker=None)
    assert pipeline.tokenizer("a red potion").input_ids[0] == said["tokenizer"]["bos_id"]
    assert all((weight.half().float() == weight).all() for weight in pipeline.unet.parameters())


def test_a_stopped_run_goes_on_to_the_same_adapter(
    icons: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = lora.Run.advance

    def until(run: lora.Run) -> float:
        if run.step == 2:
            raise Killed
        return advance(run)

    monkeypatch.setattr(lora, "CHECKPOINT_EVERY_S", -1.0)
    with monkeypatch.context() as patch:
        patch.setattr(lora.Run, "advance", until)
        with pytest.raises(Killed):
            train(icons, tmp_path)
    train(icons, tmp_path)
    assert torch.equal(weights(plain), weights(tmp_path))
    with pytest.raises(SystemExit, match="another recipe"):
        train(icons, tmp_path, recipe=replace(TINY, learning_rate=1.0))


def test_precision_and_checkpointing_change_how_it_is_computed_and_not_what_is_learned(
    icons: Path, plain: Path, tmp_path: Path
) -> None:
    train(icons, tmp_path / "twice", Options(checkpointing=True))
    assert torch.equal(weights(plain), weights(tmp_path / "twice"))
    train(icons, tmp_path / "half", Options(bfloat16=True))
    assert 0 < (weights(plain) - weights(tmp_path / "half")).norm() < 0.1 * weights(plain).norm()


def test_two_processes_learn_what_one_learns(icons: Path, plain: Path, tmp_path: Path) -> None:
    parallel.start(lora.train, (TINY, Options(processes=2), icons, tmp_path), tmp_path, 2)
    assert (weights(plain) - weights(tmp_path)).norm() < 1e-2 * weights(plain).norm()


def test_the_server_takes_what_was_trained(icons: Path, plain: Path) -> None:
    [file] = (plain / NAME).glob("*.safetensors")
    unet = StableDiffusionPipeline.from_pretrained(icons, safety_checker=None).unet
    room = AdapterRoom.model_validate(Adapters(unet).room(8))
    for folder in (plain, MODELS / "adapters"):
        offered = adapters.AdapterLibrary(folder, {"icons": room}).of("icons")
        assert offered[NAME].rank == LORA.rank, folder
    packed = adapters.packed(adapters.parse(file.read_bytes()), room)
    assert packed.shape == (LORA.rank, room.width)
    assert np.abs(packed).max() > 0


def test_no_drawing_shows_what_the_evaluation_asks_for() -> None:
    specs = lora.drawn_specs(LORA)
    assert len(specs) == 200
    assert not any(held_out(spec.object, spec.colour, spec.background) for spec in specs)
    assert specs == lora.drawn_specs(LORA)


def test_the_styles_are_told_apart_on_unseen_drawings() -> None:
    rng = random.Random(1)
    specs = [sample_spec(rng) for _ in range(240)]
    plain, styled = (np.stack([render(spec, 64, look) for spec in specs]) for look in (PLAIN, NEON))
    made = style.StyleClassifier(plain[:160], styled[:160])
    assert made.share(plain[160:]) <= 0.2  # a twelfth of the drawings that it is fitted to in earnest
    assert made.share(styled[160:]) >= 0.8


@pytest.mark.parametrize(
    ("with_", "without", "objects", "faults"),
    [
        (0.99, 0.01, 0.95, []),
        (0.5, 0.01, 0.95, ["styled 0.500 < 0.95"]),
        (0.99, 0.2, 0.95, ["plain 0.200 > 0.05"]),
        (0.99, 0.01, float("nan"), ["object nan < 0.9"]),
    ],
)
def test_each_bar_of_the_style_can_fail(with_: float, without: float, objects: float, faults: list[str]) -> None:
    result = {"looks": {"with": with_, "without": without}, "scores": {"with": {"object": objects}}}
    assert style.below_bars(result) == faults
