"""What the exporter reads: weights in one file or in a folder, and its tables of keys against diffusers' own classes."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safelight_server.export import loading, networks, onnx_file, plan, schedulers
from safelight_server.export.options import ExportOptions
from safelight_server.export.source import ExportError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPVisionConfig, Qwen3Config, T5Config

from tests.training import folders
from tests.training.checkpoints import save_checkpoint

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]
OPTIONS = ExportOptions("small", licence="CC0-1.0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sources")
    folders.pipeline().save_pretrained(place / "folder")
    return place / "folder"


def weights(pipeline: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": tensor
        for name in ("unet", "vae", "text_encoder", "text_encoder_2")
        if hasattr(pipeline, name)
        for key, tensor in getattr(pipeline, name).state_dict().items()
    }


def test_a_checkpoint_in_one_file_has_the_weights_of_its_folder(folder: Path, tmp_path: Path) -> None:
    expected = loading.load(plan.make(folder, OPTIONS))
    save_checkpoint(expected, tmp_path / "one.safetensors")
    options = ExportOptions("small", licence="CC0-1.0", config=folder)
    found = loading.load(plan.make(tmp_path / "one.safetensors", options))
    ours, theirs = weights(found), weights(expected)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_checkpoint_of_sdxl_in_one_file_has_the_weights_of_its_folder(tmp_path: Path) -> None:
    folders.sdxl_pipeline().save_pretrained(tmp_path / "xl")
    expected = loading.load(plan.make(tmp_path / "xl", OPTIONS))
    save_checkpoint(expected, tmp_path / "one.safetensors")
    options = ExportOptions("small", licence="CC0-1.0", config=tmp_path / "xl")
    found = loading.load(plan.make(tmp_path / "one.safetensors", options))
    ours, theirs = weights(found), weights(expected)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_checkpoint_that_inpaints_in_one_file_has_the_weights_of_its_folder(tmp_path: Path) -> None:
    parts = folders.pipeline(unet=folders.unet(in_channels=9)).components
    diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False).save_pretrained(tmp_path / "nine")
    expected = loading.load(plan.make(tmp_path / "nine", OPTIONS))
    save_checkpoint(expected, tmp_path / "one.safetensors")
    options = ExportOptions("small", licence="CC0-1.0", config=tmp_path / "nine")
    found = loading.load(plan.make(tmp_path / "one.safetensors", options))
    ours, theirs = weights(found), weights(expected)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert found.unet.config.in_channels == 9


def test_a_file_that_lacks_a_network_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    pipeline = loading.load(plan.make(folder, OPTIONS))
    save_checkpoint(pipeline, tmp_path / "one.safetensors")
    tensors = load_file(tmp_path / "one.safetensors")
    rest = {key: tensor for key, tensor in tensors.items() if not key.startswith("cond_stage_model.")}
    save_file(rest, tmp_path / "one.safetensors")
    config = tmp_path / "config"
    shutil.copytree(folder, config)
    (config / "text_encoder" / "model.safetensors").unlink()
    options = ExportOptions("small", licence="CC0-1.0", config=config)
    with pytest.raises(ExportError, match="cannot be read: Failed to load CLIPTextModel"):
        loading.load(plan.make(tmp_path / "one.safetensors", options))


def test_weights_that_are_not_there_are_not_made_up(folder: Path, tmp_path: Path) -> None:
    pipeline = loading.load(plan.make(folder, OPTIONS))
    pipeline.save_pretrained(tmp_path / "folder")
    file = tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["conv_in.weight"]
    save_file(tensors, file)
    with pytest.raises(ExportError, match=r"unet: the files lack 1 of its weights, such as conv_in\.weight"):
        loading.load(plan.make(tmp_path / "folder", OPTIONS))


def test_a_variant_is_loaded(folder: Path, tmp_path: Path) -> None:
    pipeline = loading.load(plan.make(folder, OPTIONS))
    pipeline.save_pretrained(tmp_path / "folder", variant="fp16")
    with pytest.raises(ExportError, match="say --variant fp16"):
        plan.make(tmp_path / "folder", OPTIONS)
    options = ExportOptions("small", licence="CC0-1.0", variant="fp16")
    assert set(weights(loading.load(plan.make(tmp_path / "folder", options)))) == set(weights(pipeline))


def signature(kind: type) -> dict[str, inspect.Parameter]:
    found = inspect.signature(kind.__init__).parameters
    return {name: at for name, at in found.items() if name not in ("self", "args", "kwargs")}


@pytest.mark.parametrize("name", schedulers.SCHEDULERS)
def test_the_keys_and_defaults_of_a_scheduler_are_those_of_diffusers(name: str) -> None:
    known = schedulers.SCHEDULERS[name]
    kind = getattr(diffusers, name)
    if "dummy" in kind.__module__:
        pytest.skip("needs scipy or torchsde, which are not installed")
    theirs = signature(kind)
    assert known.keys | schedulers._NOISE == set(theirs)
    assert known.betas == tuple(theirs[key].default for key in ("beta_schedule", "beta_start", "beta_end"))
    if known.same and "clip_sample" in theirs:
        assert known.clips == theirs["clip_sample"].default
    if "set_alpha_to_one" in theirs:
        assert known.set_alpha_to_one == theirs["set_alpha_to_one"].default
    if "timestep_spacing" in theirs:
        assert known.spacing == theirs["timestep_spacing"].default


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        (diffusers.UNet2DConditionModel, networks.UNET_SHAPE | set(networks.UNET_RULES)),
        (diffusers.AutoencoderKL, networks.KL_SHAPE | set(networks.VAE_RULES)),
        (diffusers.AutoencoderTiny, networks.TINY_SHAPE | set(networks.VAE_RULES)),
        (diffusers.FluxTransformer2DModel, networks.FLUX_SHAPE | set(networks.FLUX_RULES)),
        (diffusers.SD3Transformer2DModel, networks.SD3_SHAPE),
        (diffusers.ZImageTransformer2DModel, networks.Z_IMAGE_SHAPE | set(networks.Z_IMAGE_RULES)),
        (diffusers.FlowMatchEulerDiscreteScheduler, schedulers.FLOW_KEYS | set(schedulers.FLOW_RULES)),
    ],
    ids=lambda at: getattr(at, "__name__", ""),
)
def test_the_keys_of_a_network_are_those_of_diffusers(kind: type, known: set[str]) -> None:
    assert set(signature(kind)) <= known


def test_what_transformers_writes_of_a_text_encoder_is_known() -> None:
    keys = {key for key in CLIPTextConfig().to_dict() if not key.startswith("_")}
    assert keys <= networks.TEXT_SHAPE | set(networks.TEXT_RULES)
    assert {key for key in T5Config().to_dict() if not key.startswith("_")} <= networks.T5_SHAPE
    assert {key for key in Qwen3Config().to_dict() if not key.startswith("_")} <= networks.QWEN3_SHAPE


def test_what_transformers_writes_of_an_image_encoder_is_known() -> None:
    config = CLIPVisionConfig()
    keys = {key for key in config.to_dict() if not key.startswith("_")}
    assert keys <= networks.VISION_SHAPE | set(networks.VISION_RULES)
    assert {key: getattr(config, key) for key in networks.VISION_DEFAULTS} == networks.VISION_DEFAULTS


class Wide(nn.Module):
    """One layer with more weights than an alignment."""

    outputs = ("y",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 64)
        self.layer.weight.data = self.layer.weight.data.half().float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@torch.no_grad()
def test_many_weights_are_in_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, file = [{"x": torch.randn(2, 64)}], tmp_path / "wide" / "1" / "model.onnx"
    monkeypatch.setattr(onnx_file, "EXTERNAL_BYTES", 8000)
    data = onnx_file.write_onnx(Wide(), inputs, Wide.outputs, file)
    assert data == file.with_name("model.onnx.data")
    assert data.stat().st_size == 64 * 64 * 2, "float16"
    assert onnx_file.check_parity(Wide(), inputs, Wide.outputs, file) < 1e-5
    first = data.read_bytes() + file.read_bytes()
    onnx_file.write_onnx(Wide(), inputs, Wide.outputs, file)
    assert data.read_bytes() + file.read_bytes() == first


class Undecided(nn.Module):
    """Its path depends on its input, which a graph cannot express."""

    outputs = ("y",)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_what_torch_cannot_export_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="undecided: torch cannot export this network: ") as caught:
        onnx_file.write_onnx(
            Undecided(), [{"x": torch.ones(2, 3)}], ("y",), tmp_path / "undecided" / "1" / "model.onnx"
        )
    assert "\n" not in str(caught.value)
