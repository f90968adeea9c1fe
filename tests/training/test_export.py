"""The exporter on small random pipelines of Stable Diffusion's classes: contract, parity, bytes, refusals."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safelight_server.export import exporter, manifest, onnx_file
from safelight_server.export.exporter import round_weights
from safelight_server.export.options import ExportOptions
from safelight_server.export.source import ExportError
from safelight_server.sampler import NoiseSchedule, SamplerSpec, refusal
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from training import networks
from training.recipe import RECIPE

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
TOKENS = 8


def export(folder: Path, models: Path, name: str, revision: str, **options: object) -> None:
    options = {"licence": "CC0-1.0", "guidance_scale": 3.0} | options
    exporter.export(folder, models, ExportOptions(name, revision, **options))


GUARD = {"groups": {"object": [["potion", "elixir"], ["sword"]]}, "ignored": ["a"], "closed": True}


def save(folder: Path, vae: AutoencoderKL | AutoencoderTiny, scheduler: DDIMScheduler | PNDMScheduler) -> None:
    """A random pipeline around `vae`, 4 channels of 4 x 4."""
    torch.manual_seed(0)
    tokenizer = networks.tokenizer(RECIPE, ["a red potion", "a blue sword"])
    tokenizer.model_max_length = TOKENS
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def tiny_vae(scaling_factor: float) -> AutoencoderTiny:
    torch.manual_seed(1)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(0, 0),
        num_decoder_blocks=(1, 0),
        scaling_factor=scaling_factor,
    )


@pytest.fixture(scope="module")
def classic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 1.5 in small: AutoencoderKL, noise prediction, PNDM; exported beside it into models/."""
    place = tmp_path_factory.mktemp("classic")
    torch.manual_seed(2)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        scaling_factor=0.18215,
    )
    save(place / "folder", vae, PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1))
    export(place / "folder", place / "models", "classic", "r1", guidance_scale=7.5)
    return place


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `icons`: AutoencoderTiny, zero terminal SNR, a preview decoder that counts on a scaling factor of 1."""
    place = tmp_path_factory.mktemp("small")
    save(place / "folder", tiny_vae(2.5), networks.noise_schedule())
    tiny_vae(1.0).save_pretrained(place / "folder" / "preview_decoder")
    weights, bias = np.arange(48, dtype=np.float32).reshape(4, 12) / 100, np.linspace(-1, 1, 12, dtype=np.float32)
    np.savez(place / "folder" / "linear_preview.npz", weights=weights, bias=bias)
    (place / "folder" / "training.json").write_text("{}")
    (place / "folder" / "prompts.json").write_text(json.dumps({"guard": GUARD, "example_prompts": ["a sword"]}))
    export(place / "folder", place / "models", "small", "r1")
    return place


def read(models: Path, name: str, revision: str = "r1") -> dict[str, object]:
    return json.loads((models / "pipelines" / name / revision / "pipeline.json").read_text())


def run(models: Path, model: str, **inputs: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(models / "repository" / model / "1" / "model.onnx")
    return session.run(None, inputs)[0]


def test_the_decoder_of_autoencoder_kl_is_what_the_pipeline_does(classic: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(classic / "folder", safety_checker=None)
    round_weights(pipeline.vae)
    latent = np.random.default_rng(0).standard_normal((5, 4, 4, 4), np.float32)
    with torch.no_grad():
        expected = pipeline.vae.decode(torch.from_numpy(latent)).sample.numpy()
    image = run(classic / "models", "classic_decoder", latent=latent)
    assert image.shape == (5, 3, 8, 8)
    np.testing.assert_allclose(image, expected, atol=1e-4)


def test_rows_of_one_batch_have_their_own_timesteps(classic: Path) -> None:
    rng = np.random.default_rng(1)
    sample, context = rng.standard_normal((3, 4, 4, 4), np.float32), rng.standard_normal((3, TOKENS, 16), np.float32)
    timestep = np.array([999, 500.5, 0], np.float32)
    inputs = {"sample": sample, "timestep": timestep, "encoder_hidden_states": context}
    together = run(classic / "models", "classic_denoiser", **inputs)
    for row in range(3):
        alone = {key: value[row : row + 1] for key, value in inputs.items()}
        np.testing.assert_allclose(
            run(classic / "models", "classic_denoiser", **alone), together[row : row + 1], atol=1e-5
        )
    elsewhere = run(classic / "models", "classic_denoiser", **(inputs | {"timestep": timestep[::-1].copy()}))
    assert np.abs(elsewhere[0] - together[0]).max() > 1e-4


def test_a_preview_decoder_with_its_own_scaling_factor_sees_what_it_expects(small: Path) -> None:
    preview = AutoencoderTiny.from_pretrained(small / "folder" / "preview_decoder")
    round_weights(preview)
    scaled = np.random.default_rng(2).standard_normal((2, 4, 4, 4), np.float32)
    with torch.no_grad():
        expected = preview.decode(torch.from_numpy(scaled)).sample.numpy()
    image = run(small / "models", "small_preview_decoder", latent=scaled / np.float32(2.5))
    np.testing.assert_allclose(image, expected, atol=1e-4)


@pytest.mark.parametrize("which", ["classic", "small"])
def test_the_manifest_names_what_is_there_and_offers_what_the_server_can_run(
    which: str, request: pytest.FixtureRequest
) -> None:
    models = request.getfixturevalue(which) / "models"
    found = read(models, which)
    for role, component in found["components"].items():
        file = models / "repository" / f"{which}_{role}" / "1" / "model.onnx"
        assert component == {
            "model": f"{which}_{role}",
            "version": 1,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "row_bytes": 1 << 20,  # the least that is said
        }
        assert not onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
        assert b"/home" not in file.read_bytes() and b"site-packages" not in file.read_bytes()
    schedule, prediction = NoiseSchedule(**found["noise_schedule"]), found["prediction_type"]
    cells = [
        SamplerSpec(cell["name"], spacing, sigmas)
        for cell in found["samplers"]
        for spacing in cell["spacings"]
        for sigmas in cell["sigma_schedules"]
    ]
    for spec in [*cells, SamplerSpec(**found["defaults"]["sampler"])]:
        for steps in (1, 2, 20, found["limits"]["max_num_inference_steps"]):
            assert refusal(spec, schedule, prediction, steps) is None, (spec, steps)
    assert found["defaults"]["sampler"]["name"] in {cell["name"] for cell in found["samplers"]}


def test_the_words_that_must_agree_are_the_folders_own(classic: Path, small: Path) -> None:
    assert read(small / "models", "small")["guard"] == GUARD
    assert read(small / "models", "small")["example_prompts"] == ["a sword"]
    assert "guard" not in read(classic / "models", "classic")


def test_a_classic_folder_keeps_its_schedule(classic: Path) -> None:
    found = read(classic / "models", "classic")
    assert found["prediction_type"] == "epsilon"
    assert found["noise_schedule"]["rescale_zero_terminal_snr"] is False
    assert found["noise_schedule"]["set_alpha_to_one"] is False
    assert found["defaults"]["guidance_scale"] == 7.5
    assert found["defaults"]["sampler"] == {
        "name": "euler",
        "spacing": "leading",
        "sigma_schedule": "default",
        "eta": 0.0,
    }
    assert found["latent"] == {"channels": 4, "height": 4, "width": 4, "scaling_factor": 0.18215, "shift_factor": 0.0}
    assert found["sizes"] == [{"width_px": 8, "height_px": 8}]
    assert found["linear_preview"]["block"] == 1 and len(found["linear_preview"]["weights"]) == 4


def test_zero_terminal_snr_is_sampled_from_its_last_timestep(small: Path) -> None:
    found = read(small / "models", "small")
    assert found["defaults"]["sampler"]["name"] == "ddim"
    assert {spacing for cell in found["samplers"] for spacing in cell["spacings"]} == {"trailing"}
    assert found["linear_preview"]["block"] == 2
    assert found["linear_preview"]["weights"][1][0] == 0.12
    assert (small / "models" / "pipelines" / "small" / "r1" / "training.json").exists()


def test_the_same_folder_gives_the_same_bytes(small: Path, tmp_path: Path) -> None:
    export(small / "folder", tmp_path, "small", "r1")
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    first = sorted(path.relative_to(small / "models") for path in (small / "models").rglob("*") if path.is_file())
    assert files == first
    for file in files:
        assert (tmp_path / file).read_bytes() == (small / "models" / file).read_bytes(), file


def test_a_revision_in_use_is_replaced_only_when_told_to(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(module: nn.Module, inputs: object, outputs: object, path: Path, *rest: object) -> None:
        path.parent.mkdir(parents=True)
        path.write_text("another network")

    monkeypatch.setattr("safelight_server.export.exporter.write_onnx", write)
    monkeypatch.setattr("safelight_server.export.exporter.check_parity", lambda *args: 0.0)
    monkeypatch.setattr("safelight_server.export.exporter.memory.row_bytes", lambda *args: 0)
    models, folder = tmp_path / "models", tmp_path / "folder"
    shutil.copytree(small / "models", models)
    shutil.copytree(small / "folder", folder, ignore=shutil.ignore_patterns("preview_decoder"))
    with pytest.raises(ExportError, match="--replace removes that revision"):
        export(folder, models, "small", "r2")
    assert read(models, "small")["revision"] == "r1"
    (models / "repository" / "small_denoiser_int8").mkdir()
    export(folder, models, "small", "r2", replace=True)
    assert sorted(path.name for path in (models / "pipelines" / "small").iterdir()) == ["r2"]
    assert sorted(path.name for path in (models / "repository").iterdir()) == [
        "small_decoder",
        "small_denoiser",
        "small_encoder",
        "small_text_encoder",
    ]


def test_disagreement_with_torch_stops_the_export_and_changes_nothing(
    classic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "PARITY", -1.0)
    with pytest.raises(ExportError, match="ONNX Runtime is off by"):
        export(classic / "folder", tmp_path, "classic", "r1")
    assert list(tmp_path.iterdir()) == []


def test_not_a_number_is_not_parity(tmp_path: Path) -> None:
    class Root(nn.Module):
        outputs = ("y",)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sqrt()

    inputs, file = [{"x": torch.ones(2, 3)}], tmp_path / "root" / "1" / "model.onnx"
    assert onnx_file.write_onnx(Root(), inputs, Root.outputs, file) is None
    assert onnx_file.check_parity(Root(), inputs, Root.outputs, file) == 0.0
    with pytest.raises(ExportError, match="off by nan"):
        onnx_file.check_parity(Root(), [{"x": -torch.ones(2, 3)}], Root.outputs, file)


def test_free_axes_are_those_of_their_inputs_in_whatever_order_the_examples_are(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        outputs = ("y",)

        def forward(self, x: torch.Tensor, factor: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            scaled = x * factor[:, None, None, None]
            return scaled if mask is None else scaled * mask

    examples = [
        {"mask": torch.ones(2, 1, *size), "x": torch.ones(2, 3, *size), "factor": torch.ones(2)}
        for size in ((2, 4), (4, 2))
    ]
    file = tmp_path / "scaled" / "1" / "model.onnx"
    onnx_file.write_onnx(Scaled(), examples, Scaled.outputs, file)
    assert onnx_file.check_parity(Scaled(), examples, Scaled.outputs, file) == 0.0


def test_weights_beyond_float16_are_refused() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.data[0, 0] = 1e6
    with pytest.raises(ExportError, match="weight has values that float16 cannot hold"):
        round_weights(layer)


def test_folders_that_cannot_be_exported_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="it has no model_index"):
        export(tmp_path, tmp_path / "models", "x", "r1")
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
    with pytest.raises(ExportError, match="is a PixArtAlphaPipeline"):
        export(tmp_path, tmp_path / "models", "x", "r1")
    assert not (tmp_path / "models").exists()


def test_rows_of_numbers_are_lines_of_the_manifest() -> None:
    text = manifest.readable({"a": [[1.5, -2e-05], [0, 3]], "b": ["x", "y"], "c": [], "d": [{"e": 1}]})
    assert json.loads(text) == {"a": [[1.5, -2e-05], [0, 3]], "b": ["x", "y"], "c": [], "d": [{"e": 1}]}
    assert "  [1.5, -2e-05],\n  [0, 3]\n" in text
