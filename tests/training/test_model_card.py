"""The model card: figures of these weights, or none."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from training import model_card

HEADS = ("object", "colour", "background", "sparkles", "tilt")
RESULT: dict[str, Any] = {
    "sha256": {"denoiser": "ab"},
    "captions": 500,
    "judge_on_real_drawings": dict.fromkeys(HEADS, 0.999),
    "scores": dict.fromkeys(HEADS, 0.987),
    "copies": {"share_below": 0.002, "limit": 3.0, "median": 4.5, "held_out_median": 4.0},
    "faults": [],
    "confused": ["gold as yellow 13"],
}
TRAINED = {"samples": 263168, "diffusion_cpu_s": 3600, "psnr_db": {"decoder": 24.11, "linear_preview": 18.0}}
MANIFEST: dict[str, Any] = {
    "name": "icons",
    "revision": "r1",
    "description": "Icons",
    "license": "Apache-2.0",
    "sizes": [{"width_px": 128, "height_px": 128}],
    "latent": {"channels": 32, "height": 8, "width": 8},
    "prediction_type": "v_prediction",
    "noise_schedule": {"rescale_zero_terminal_snr": True},
    "defaults": {"num_inference_steps": 20, "guidance_scale": 3.0, "sampler": {"name": "ddim"}},
    "components": {"denoiser": {"model": "icons_denoiser", "version": 1, "sha256": "ab"}},
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A revision with its training's account, and the command's arguments."""
    place = tmp_path / "pipelines" / "icons" / "r1"
    weights = tmp_path / "repository" / "icons_denoiser" / "1" / "model.onnx"
    for folder in (place, weights.parent):
        folder.mkdir(parents=True)
    weights.write_bytes(bytes(2**20))
    (place / "pipeline.json").write_text(json.dumps(MANIFEST))
    (place / "training.json").write_text(json.dumps(TRAINED))
    monkeypatch.setattr(
        sys, "argv", ["model_card", "--models", str(tmp_path), "--result", str(tmp_path / "result.json")]
    )
    return place


def test_the_card_has_the_figures_that_were_measured(place: Path, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    model_card.main()
    text = (place / "MODEL_CARD.md").read_text()
    for figure in (
        "263,168 samples, 1.00 cpu hours",
        "24.11 dB",
        "| colour | 0.987 | 0.999 | 0.95 |",
        "0.2%",
        "1.0 MiB",
    ):
        assert figure in text
    assert "All bars are met." in text


def test_a_card_says_what_is_below_the_bars(place: Path, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(RESULT | {"faults": ["colour 0.936 < 0.95"]}))
    model_card.main()
    assert "Below the bars: colour 0.936 < 0.95." in (place / "MODEL_CARD.md").read_text()


def test_an_evaluation_of_other_weights_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(RESULT | {"sha256": {"denoiser": "cd"}}))
    with pytest.raises(SystemExit, match="is of other weights"):
        model_card.main()
    assert not (place / "MODEL_CARD.md").exists()


def test_no_figures_no_card(place: Path) -> None:
    with pytest.raises(SystemExit, match="only figures that were measured"):
        model_card.main()
