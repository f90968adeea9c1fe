"""A small random CLIP of transformers becomes a judge, whose figures are those of transformers; what is no CLIP is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from prometheus_client import CollectorRegistry
from safelight_server.export.judge import MEAN, STD, export_judge
from safelight_server.export.source import ExportError
from safelight_server.quality import QualityProbe
from safelight_server.quality.judge import JudgeError, PromptJudge
from safelight_server.telemetry.quality_metrics import QualityMetrics
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from tests.support.streams import Here
from tests.training.folders import MAX_TOKENS, clip_tokenizer

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
EDGE = 32
PROMPTS = ("a red potion", "a blue sword on a dark background", "word " * 200)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as transformers saves it."""
    folder = tmp_path_factory.mktemp("clip") / "small-clip"
    torch.manual_seed(1)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = layers | {
        "vocab_size": 49408,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 49407,
    }
    vision = layers | {"image_size": EDGE, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).half().float().save_pretrained(
        folder
    )
    clip_tokenizer().save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": EDGE}, crop_size=EDGE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judge(clip: Path) -> Path:
    folder = clip.parent / "judge"
    export_judge(clip, folder)
    return folder


def pictures() -> list[np.ndarray]:
    draws = np.random.default_rng(2)
    small = draws.integers(0, 256, (6, 5, 3), np.uint8)
    return [np.asarray(Image.fromarray(small).resize(size)) for size in ((64, 64), (96, 64), (40, 80), (EDGE, EDGE))]


@torch.no_grad()
def test_its_figures_are_those_of_transformers(clip: Path, judge: Path) -> None:
    model, processor, tokenizer = (
        CLIPModel.from_pretrained(clip).eval(),
        CLIPImageProcessor.from_pretrained(clip),
        clip_tokenizer(),
    )
    ours = PromptJudge(judge)
    ids = tokenizer(list(PROMPTS), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    for pixels in pictures():
        prepared = processor(Image.fromarray(pixels), return_tensors="pt").pixel_values
        found = model(input_ids=ids.input_ids, pixel_values=prepared)
        expected = (found.text_embeds @ found.image_embeds.T)[:, 0].tolist()
        assert [ours.agreement(prompt, pixels) for prompt in PROMPTS] == pytest.approx(expected, abs=2e-3)


def test_the_metric_has_what_the_judge_measures(judge: Path) -> None:
    registry, measured = CollectorRegistry(), PromptJudge(judge)
    probe = QualityProbe(1.0, QualityMetrics(registry), Here(), judge=measured)
    pixels = pictures()[0]
    sample = probe.begin("small", 20, "origin", PROMPTS[0])
    assert sample is not None
    sample.finish(pixels)
    value = registry.get_sample_value("safelight_prompt_agreement_sum", {"model": "small"})
    assert value == pytest.approx(max(0.0, measured.agreement(PROMPTS[0], pixels)))


def test_without_a_preprocessor_it_normalises_as_clip_does(clip: Path, judge: Path) -> None:
    written = json.loads((judge / "judge.json").read_text())
    assert (written["mean"], written["std"]) == (list(MEAN), list(STD))
    assert written["image_px"] == EDGE
    assert written["max_tokens"] == MAX_TOKENS


def test_what_is_no_clip_and_a_folder_that_exists_are_refused(clip: Path, judge: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="exists already"):
        export_judge(clip, judge)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match="cannot be read as a CLIPModel"):
        export_judge(tmp_path / "empty", tmp_path / "judge")
    assert not (tmp_path / "judge").exists()


@pytest.mark.parametrize(
    ("change", "said"), [({"image_px": EDGE * 2}, "a trial failed"), ({"max_tokens": MAX_TOKENS + 1}, "a trial failed")]
)
def test_networks_that_do_not_fit_the_configuration_are_refused(
    judge: Path, tmp_path: Path, change: dict[str, int], said: str
) -> None:
    for file in judge.rglob("*"):
        if file.is_file():
            copy = tmp_path / file.relative_to(judge)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(file)
    config = json.loads((judge / "judge.json").read_text()) | change
    (tmp_path / "judge.json").unlink()
    (tmp_path / "judge.json").write_text(json.dumps(config))
    with pytest.raises(JudgeError, match=said):
        PromptJudge(tmp_path)
