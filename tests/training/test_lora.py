"""Training an adapter, on a tiny budget: the shipped weights again in torch, runs that go on, and what the server takes."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from safelight_server.catalog import adapter_files
from safelight_server.catalog.adapters import AdapterLibrary
from safelight_server.catalog.manifest import AdapterRoom
from safelight_server.export.adapters import Adapters, target_names

from training import checkpoint, classifier, evaluate, lora, parallel, style
from training.evaluate import find_manifest
from training.icons import held_out, sample_spec
from training.icons.render import NEON, PLAIN, Style, render
from training.lora import CHECKPOINT, FACTS, LORA, NAME, Options
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
    room = AdapterRoom.model_validate(Adapters(unet, target_names(unet, LORA.layers)).room(8))
    for folder in (plain, MODELS / "adapters"):
        offered = AdapterLibrary(folder, {"icons": room}).of("icons")
        assert offered[NAME].rank == LORA.rank, folder
    packed = adapter_files.packed(adapter_files.parse(file.read_bytes()), room)
    assert packed.shape == (LORA.rank, room.width)
    assert np.abs(packed).max() > 0


def test_beside_an_adapter_it_says_what_it_was_trained_on(plain: Path) -> None:
    told = json.loads((plain / NAME / FACTS).read_text())
    assert told.pop("cpu_s") >= 0
    expected = {"samples": 16, "num_samples": 16, "num_drawings": 8, "rank": 4, "layers": "all"}
    expected |= {"computed": "float32, 1 process"}
    assert told == expected


def test_what_was_measured_is_a_table_of_all_options() -> None:
    figures = {"samples_per_s": 80.4, "cpu_ms": 11.72, "peak_mib": 700.0, "before_mib": 600.0}
    several = [Options(), Options(processes=2, bfloat16=True, checkpointing=True)]
    _, rule, first, second = lora.table([(options, figures) for options in several]).splitlines()
    assert first == "| float32, 1 process | 80 | 11.7 | 700 MiB | 100 MiB |"
    assert second == "| bfloat16, gradient checkpointing, 2 processes | 80 | 11.7 | 700 MiB | 100 MiB |"
    assert rule.count("|") == first.count("|")


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
        (0.86, 0.01, 0.95, []),
        (0.85, 0.01, 0.95, ["styled 0.850 < 0.855"]),
        (0.99, 0.2, 0.95, ["plain 0.200 > 0.05"]),
        (0.99, 0.01, float("nan"), ["object nan < 0.9"]),
    ],
)
def test_each_bar_of_the_style_can_fail(with_: float, without: float, objects: float, faults: list[str]) -> None:
    looks = {"with": with_, "without": without, "decoded": 0.9}
    result = {"looks": looks, "scores": {"with": {"object": objects}}}
    assert style.below_bars(result) == faults


class Drawn:
    """In place of the sampler: drawings of the style that the adapter is said to have."""

    def __init__(self, manifest: Path, threads: int, adapter: Path | None = None) -> None:
        self._look = PLAIN if adapter is None else NEON

    def pictures(self, prompts: Sequence[str], seeds: Sequence[int]) -> npt.NDArray[np.uint8]:
        specs = evaluate.held_out_specs(len(prompts), "style")
        return np.stack([render(spec, style=self._look) for spec in specs])

    def decoded(self, pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        return pictures


def drawn_here(count: int, seed: str, styles: Sequence[Style] = (PLAIN,)) -> tuple[npt.NDArray[np.uint8], torch.Tensor]:
    """`classifier.draw` without its processes."""
    rng = random.Random(seed)
    specs = [sample_spec(rng) for _ in range(count)]
    pictures = [render(spec, classifier.EDGE_PX, styles[at % len(styles)]) for at, spec in enumerate(specs)]
    return np.stack(pictures), torch.tensor([classifier.labels(spec) for spec in specs])


@pytest.fixture
def scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an adapter that `style.main` scores, with tiny numbers."""
    folder = tmp_path / NAME
    folder.mkdir()
    (folder / "weights.safetensors").write_bytes(b"weights")
    told = {"samples": 4800, "num_samples": 24000, "num_drawings": 200, "rank": 4, "cpu_s": 60}
    told |= {"layers": "blocks", "computed": "float32"}
    (folder / FACTS).write_text(json.dumps(told))
    monkeypatch.setattr(style, "NUM_DRAWINGS", 160)
    monkeypatch.setattr(style, "NUM_UNSEEN", 40)
    monkeypatch.setattr(style, "JUDGE_DRAWINGS", 64)
    monkeypatch.setattr(style, "CHECK_BAR", 0.7)
    monkeypatch.setattr(style, "Sampler", Drawn)
    monkeypatch.setattr(classifier, "draw", drawn_here)
    arguments = ["--models", MODELS, "--adapter", folder, "--captions", 20, "--out", tmp_path / "out", "--card"]
    monkeypatch.setattr(sys, "argv", ["style", *map(str, arguments)])
    return folder


def test_scoring_writes_its_figures_and_exits_below_the_bars(scored: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        style.main()
    assert ended.value.code == 1, "a judge of 64 drawings knows no objects"
    result = json.loads((scored.parent / "out" / "style.json").read_text())
    assert result["looks"]["with"] > 0.7
    assert result["looks"]["without"] < 0.3
    card = (scored / "MODEL_CARD.md").read_text()
    assert "LoRA of rank 4 on all layers of the transformer blocks;" in card
    assert "4,800 of\n24,000 samples, 60 CPU seconds (float32)" in card
    assert f"Below the bars: {'; '.join(result['faults'])}." in card
    assert hashlib.sha256(b"weights").hexdigest() in card


def test_a_card_without_what_the_adapter_was_trained_on_is_refused_at_once(scored: Path) -> None:
    (scored / FACTS).unlink()
    with pytest.raises(SystemExit, match=FACTS):
        style.main()
    assert not (scored.parent / "out").exists()


def test_the_shipped_card_is_of_the_shipped_adapter() -> None:
    [file] = (MODELS / "adapters" / NAME).glob("*.safetensors")
    card = (file.parent / "MODEL_CARD.md").read_text()
    assert hashlib.sha256(file.read_bytes()).hexdigest() in card
