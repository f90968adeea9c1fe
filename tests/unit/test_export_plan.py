"""The plan of `safelight export` before it loads a network: every kind of fault by name, every substitute."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safelight_server.catalog.manifest import ADAPTER_INPUTS, CONTROL_INPUTS, IMAGE_PROMPT_INPUTS
from safelight_server.cli.export import export as export_command
from safelight_server.export import schedulers
from safelight_server.export.options import AdapterLayers, ExportFormat, ExportOptions
from safelight_server.export.plan import ExportPlan, draft, make
from safelight_server.export.source import ExportError

UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 768,
    "block_out_channels": [8] * 4,
}
KL = {"latent_channels": 4, "out_channels": 3, "block_out_channels": [8] * 4, "scaling_factor": 0.18215}
TEXT = {"hidden_size": 768, "max_position_embeddings": 77, "model_type": "clip_text_model"}
PNDM = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "skip_prk_steps": True}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
}
SDXL_INDEX = INDEX | {
    "_class_name": "StableDiffusionXLPipeline",
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "image_encoder": [None, None],
    "force_zeros_for_empty_prompt": True,
    "add_watermarker": None,
}
SDXL_UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.19.0.dev0",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2048,
    "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}
"""The configuration of SDXL's base model, as the one after it."""
SDXL_EULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
SDXL_KL = KL | {"scaling_factor": 0.13025, "force_upcast": True, "sample_size": 1024, "norm_num_groups": 32}
SDXL_TEXT_2 = TEXT | {"hidden_size": 1280, "projection_dim": 1280, "bos_token_id": 0, "eos_token_id": 2}
CARD = "---\nlicense: creativeml-openrail-m\ntags:\n- x\n---\n# A model\n"


def safetensors(file: Path, num_values: int = 3, cut: int = 0) -> None:
    header = {"weight": {"dtype": "F16", "shape": [num_values], "data_offsets": [0, 2 * num_values]}}
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + b"\0" * 2 * num_values
    file.write_bytes(data[: len(data) - cut])


class Folder:
    """A diffusers folder without real weights; keyword arguments change its configurations."""

    configs: Mapping[str, dict[str, Any]] = {"unet": UNET, "vae": KL, "text_encoder": TEXT}
    index: Mapping[str, Any] = INDEX
    scheduler: Mapping[str, Any] = PNDM

    def __init__(self, place: Path) -> None:
        self.place = place

    def __call__(
        self, scheduler_class: str = "", scheduler: dict[str, Any] | None = None, **changes: dict[str, Any]
    ) -> Path:
        for name, config in self.configs.items():
            self.write(name, "config.json", config | changes.get(name, {}))
            stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
            safetensors(self.place / name / f"{stem}.safetensors")
        self.write("scheduler", "scheduler_config.json", self.scheduler if scheduler is None else scheduler)
        named = {"scheduler": ["diffusers", scheduler_class]} if scheduler_class else {}
        index = self.index | named | changes.get("index", {})
        self.write("", "model_index.json", index)
        (self.place / "README.md").write_text(CARD)
        return self.place

    def write(self, name: str, file: str, content: dict[str, Any]) -> None:
        (self.place / name).mkdir(parents=True, exist_ok=True)
        (self.place / name / file).write_text(json.dumps(content))


class SdxlFolder(Folder):
    """A folder of SDXL's base model, without real weights."""

    configs: Mapping[str, dict[str, Any]] = {
        "unet": SDXL_UNET,
        "vae": SDXL_KL,
        "text_encoder": TEXT,
        "text_encoder_2": SDXL_TEXT_2,
    }
    index = SDXL_INDEX
    scheduler = SDXL_EULER


@pytest.fixture
def sdxl(tmp_path: Path) -> SdxlFolder:
    return SdxlFolder(tmp_path / "xl")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "folder")


def plan(place: Path, **options: Any) -> ExportPlan:
    return make(place, ExportOptions(**({"name": "sd15"} | options)))


def fault(place: Path, **options: Any) -> str:
    with pytest.raises(ExportError) as caught:
        plan(place, **options)
    return str(caught.value)


def test_the_folder_of_stable_diffusion_is_planned_in_full(folder: Folder) -> None:
    made = plan(folder())
    assert made.options.sizes == ((512, 512),)
    assert made.shape == (4, 64, 64)
    assert made.options.licence == "creativeml-openrail-m"
    assert (made.options.steps, made.options.guidance_scale) == (20, 7.5)
    assert made.offer.schedule.set_alpha_to_one is False, "PNDM's own default"
    assert made.notes == ("scheduler PNDMScheduler is not served: euler is the default in its place",)


@pytest.mark.parametrize(
    ("part", "key", "value", "wanted"),
    [
        ("unet", "time_cond_proj_dim", 256, "guidance scale as an input"),
        ("unet", "class_embed_type", "timestep", "a class as an input"),
        ("unet", "addition_embed_type", "text_time", "a second condition"),
        ("unet", "encoder_hid_dim_type", "text_image_proj", "other than the prompt's"),
        ("unet", "attention_type", "gated", "boxes"),
        ("unet", "in_channels", 5, "in_channels 5: a UNet; the server gives the denoiser the 4 channels of the latent"),
        ("unet", "in_channels", 8, "a UNet that edits pictures"),
        ("unet", "out_channels", 8, "out_channels 8 is not the latent's 4"),
        ("unet", "cross_attention_dim", 1024, "is not the text encoder's 768"),
        ("unet", "sample_size", None, "sample_size is null: say --sizes"),
        ("vae", "latents_mean", [0.1] * 4, "one factor for all channels"),
        ("vae", "latents_std", [0.1] * 4, "one factor for all channels"),
        ("vae", "shift_factor", 0.1, "ignores it"),
        ("text_encoder", "use_attention_mask", True, "padding as an input"),
        ("unet", "wavelet_order", 3, "unet/config.json: wavelet_order is not known to this exporter"),
        ("vae", "wavelet_order", 3, "vae/config.json: wavelet_order is not known to this exporter"),
        ("text_encoder", "rope_theta", 3, "text_encoder/config.json: rope_theta is not known to this exporter"),
        ("index", "refiner", ["diffusers", "UNet2DConditionModel"], "model_index.json: refiner is not known"),
        ("index", "unet", ["diffusers", "UNetMotionModel"], "unet is a UNetMotionModel"),
        ("index", "_class_name", "HunyuanDiTPipeline", "is a HunyuanDiTPipeline; what can be exported: "),
        ("index", "_class_name", "StableDiffusionXLPipeline", "text_encoder_2 is missing; what can be exported: CLIP"),
    ],
)
def test_what_the_server_cannot_honour_is_refused_by_its_key(
    folder: Folder, part: str, key: str, value: object, wanted: str
) -> None:
    assert wanted in fault(folder(**{part: {key: value}}))


@pytest.mark.parametrize(
    ("name", "config", "wanted"),
    [
        ("DDIMScheduler", {"thresholding": True}, "thresholding True cannot be served"),
        ("DDIMScheduler", {"trained_betas": [0.1, 0.2]}, "trained_betas [0.1, 0.2] cannot be served"),
        ("DDIMScheduler", {"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid' cannot be served"),
        ("DDIMScheduler", {"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction'"),
        ("DDPMScheduler", {"variance_type": "learned_range"}, "variance_type 'learned_range'"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timestep_type 'continuous'"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas True"),
        ("LCMScheduler", {"original_inference_steps": 100}, "original_inference_steps 100"),
        ("LCMScheduler", {"timestep_scaling": 1.0}, "timestep_scaling 1.0"),
        ("EDMEulerScheduler", {"sigma_data": 0.5}, "scheduler EDMEulerScheduler cannot be served"),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "FlowMatchEulerDiscreteScheduler cannot be served"),
        (
            "TCDScheduler",
            {},
            "scheduler TCDScheduler has no counterpart in the server: choose a default with --sampler",
        ),
        ("DDIMScheduler", {"momentum": 0.9}, "scheduler DDIMScheduler: momentum is not known to this exporter"),
    ],
)
def test_schedulers_that_no_sampler_can_stand_for_are_refused(
    folder: Folder, name: str, config: dict[str, object], wanted: str
) -> None:
    assert wanted in fault(folder(name, PNDM | config))


@pytest.mark.parametrize(
    ("name", "config", "sampler", "note"),
    [
        ("DDIMScheduler", {"timestep_spacing": "leading"}, "ddim", None),
        (
            "DDIMScheduler",
            {"use_karras_sigmas": True},
            "ddim",
            None,
        ),  # not a key of its class: diffusers ignores it too
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "euler", None),
        ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}, "euler", "use_exponential_sigmas True"),
        ("EulerDiscreteScheduler", {"sigma_max": 14.0}, "euler", "sigma_max 14.0 is not served"),
        ("EulerAncestralDiscreteScheduler", {}, "euler_ancestral", None),
        ("DPMSolverMultistepScheduler", {}, "dpmpp_2m", None),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "dpmpp_2m", "solver_order 3 is not served"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m", "'sde-dpmsolver++' is not"),
        ("DPMSolverMultistepScheduler", {"euler_at_final": True}, "dpmpp_2m", "euler_at_final True"),
        ("LCMScheduler", {"timestep_spacing": "leading"}, "lcm", None),
        ("UniPCMultistepScheduler", {}, "dpmpp_2m", "UniPCMultistepScheduler is not served: dpmpp_2m"),
        ("HeunDiscreteScheduler", {}, "euler", "HeunDiscreteScheduler is not served: euler"),
        ("DDPMScheduler", {"variance_type": "fixed_small"}, "euler_ancestral", "DDPMScheduler is not served"),
        ("PNDMScheduler", {}, "euler", "PNDMScheduler is not served: euler is the default in its place"),
    ],
)
def test_a_substitute_is_never_silent(
    folder: Folder, name: str, config: dict[str, object], sampler: str, note: str | None
) -> None:
    made = plan(folder(name, PNDM | config))
    assert made.offer.default["name"] == sampler
    assert sampler in {cell["name"] for cell in made.offer.cells}
    if note is None:
        assert made.notes == ()
    else:
        [found] = made.notes
        assert note in found


def test_a_distilled_model_has_its_own_sampler_alone_and_its_few_steps(folder: Folder) -> None:
    made = plan(folder("LCMScheduler", {}))
    assert [cell["name"] for cell in made.offer.cells] == ["lcm"]
    assert (made.options.steps, made.options.guidance_scale) == (4, 1.0)
    assert made.offer.schedule.beta_schedule == "scaled_linear", "LCMScheduler's own default"


def test_a_default_may_be_chosen_where_none_may_be_taken_unasked(folder: Folder) -> None:
    made = plan(folder("TCDScheduler", {}), sampler="euler")
    assert made.notes == ("scheduler TCDScheduler is not served: euler is the default in its place",)
    assert "--sampler heun: not among those of this model" in fault(folder(), sampler="heun")


def test_only_what_works_is_offered(folder: Folder) -> None:
    made = plan(folder("DDIMScheduler", PNDM | {"prediction_type": "sample"}))
    assert "euler_ancestral" not in {cell["name"] for cell in made.offer.cells}
    short = plan(folder("DDIMScheduler", PNDM | {"num_train_timesteps": 30}))
    assert short.offer.max_steps == 30


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"name": "SD15"}, "--name 'SD15': must have lower-case letters"),
        ({"revision": "Version 2"}, "--revision 'Version 2': must have lower-case letters"),
        ({"steps": 0}, "--steps: Input should be greater than 0"),
        ({"guidance_scale": 0.0}, "--guidance-scale: Input should be greater than or equal to 1"),
        ({"guidance_scale": 0.0}, "--guidance-scale 0: what diffusers calls 0, a model without guidance, is 1 here"),
        ({"guidance_scale": 50.0}, "--guidance-scale: above the limit"),
        ({"guidance_scale": float("nan")}, "--guidance-scale: Input should be a finite number"),
        ({"sizes": ((500, 512),)}, "--sizes 500x512: must be multiples of 64"),
        ({"sizes": ((512, 512), (512, 512))}, "--sizes: names a size twice"),
        ({"sizes": ((99_968, 512),)}, "--sizes 99968x512: edges have at most 16384 pixels"),
        ({"max_rows": 0}, "--max-rows 0: must be at least 1"),
        ({"config": Path("elsewhere")}, "--config is for a checkpoint in one file"),
    ],
)
def test_options_are_judged_by_the_servers_own_rules(folder: Folder, options: dict[str, Any], wanted: str) -> None:
    assert wanted in fault(folder(), **options)


def test_all_faults_are_said_at_once(folder: Folder) -> None:
    said = fault(folder("EDMEulerScheduler", {}, unet={"in_channels": 8}, vae={"latents_mean": [1.0]}), max_rows=0)
    assert all(word in said for word in ("EDMEulerScheduler", "in_channels 8", "latents_mean", "--max-rows"))
    place = folder(unet={"in_channels": 8})
    (place / "README.md").unlink()
    said = fault(place, name="X", steps=0)
    assert all(word in said for word in ("in_channels 8", "--licence", "--name", "--steps"))


def test_there_is_no_default_licence(folder: Folder) -> None:
    place = folder()
    (place / "README.md").write_text("# A model without front matter\nlicense: mit\n")
    assert "--licence: say what" in fault(place)
    assert plan(place, licence="MIT").options.licence == "MIT"
    (place / "README.md").write_text("---\nlicense: other\nlicense_name: flux-dev\n---\n")
    assert plan(place).options.licence == "flux-dev"


def test_several_sizes_are_planned_as_latents(folder: Folder) -> None:
    made = plan(folder(unet={"sample_size": None}), sizes=((512, 768), (768, 512)))
    assert made.shape == (4, 96, 64)
    assert made.latent_sizes == [(96, 64), (64, 96)]


def test_files_of_old_diffusers_are_read_as_diffusers_mends_them(folder: Folder) -> None:
    assert plan(folder(unet={"sample_size": 32, "_diffusers_version": "0.6.0"})).options.sizes == ((512, 512),)
    assert plan(folder(unet={"sample_size": 32, "_diffusers_version": "0.21.4"})).options.sizes == ((256, 256),)


def test_weights_are_looked_at_before_anything_is_loaded(folder: Folder) -> None:
    place = folder()
    file = place / "unet" / "diffusion_pytorch_model.safetensors"
    safetensors(file, cut=2)
    assert "unet: diffusion_pytorch_model.safetensors is cut off: 2 bytes are missing" in fault(place)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "is a pointer of git-lfs" in fault(place)
    file.write_bytes(b"not at all")
    assert "is no safetensors file" in fault(place)
    file.unlink()
    assert "unet: no weights" in fault(place)
    safetensors(place / "unet" / "diffusion_pytorch_model.fp16.safetensors", num_values=5)
    assert "say --variant fp16" in fault(place)


def test_a_variant_is_taken_where_it_is_asked_for(folder: Folder) -> None:
    place = folder()
    for name, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        (place / name / f"{stem}.safetensors").rename(place / name / f"{stem}.fp16.safetensors")
    assert plan(place, variant="fp16").num_values == {"text_encoder": 3, "unet": 3, "vae": 3}


def test_weights_in_parts_are_all_needed(folder: Folder) -> None:
    place = folder()
    file = place / "unet" / "diffusion_pytorch_model.safetensors"
    shards = [file.with_name(f"diffusion_pytorch_model-0000{part}-of-00002.safetensors") for part in (1, 2)]
    file.unlink()
    safetensors(shards[0])
    index = {"weight_map": {f"w{number}": shard.name for number, shard in enumerate(shards)}}
    file.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert "-00002-of-00002.safetensors is missing" in fault(place)


def test_a_checkpoint_in_one_file_needs_a_configuration(folder: Folder, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    safetensors(file)
    assert "say --config FOLDER" in fault(file)
    assert plan(file, config=folder()).checkpoint == file
    only = tmp_path / "only"
    only.mkdir()
    safetensors(only / "v1-5.safetensors")
    assert "v1-5.safetensors in it is a checkpoint: give that file" in fault(only)


def test_files_that_are_no_json_are_named(folder: Folder) -> None:
    place = folder()
    (place / "vae" / "config.json").write_text("{")
    assert "vae/config.json is not JSON" in fault(place)
    (place / "vae" / "config.json").unlink()
    assert "vae/config.json cannot be read" in fault(place)


def test_a_safety_checker_is_not_left_out_in_silence(folder: Folder) -> None:
    made = plan(folder(index={"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}))
    assert any("safety_checker (StableDiffusionSafetyChecker) is not exported" in note for note in made.notes)


def test_a_dry_run_says_all_and_loads_no_torch(folder: Folder) -> None:
    place = folder()
    code = (
        "import sys\nfrom safelight_server.cli.main import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "assert not {'torch', 'diffusers', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, "export", str(place), "--dry-run", "--sizes", "512x512,768x512"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert said.returncode == 0, said.stderr
    assert "models/folder 1: StableDiffusionPipeline from folder; licence creativeml-openrail-m" in said.stdout
    assert "pictures of 512x512, 768x512; latents of 4x64x64; at most 64 rows a call" in said.stdout
    assert "note: scheduler PNDMScheduler is not served: euler is the default in its place" in said.stdout
    assert "exporting takes 0.0 GiB of memory, as reckoned; free here are " in said.stdout


def test_each_scheduler_knows_its_own_keys() -> None:
    assert all(set(known.exactly) <= known.keys for known in schedulers.SCHEDULERS.values())


def test_the_folder_of_sdxl_is_planned_in_full(sdxl: SdxlFolder) -> None:
    made = plan(sdxl())
    assert made.notes == ()
    assert made.options.sizes == ((1024, 1024),)
    assert made.shape == (4, 128, 128)
    assert (made.options.steps, made.options.guidance_scale) == (20, 5.0)
    assert (made.offer.default["name"], made.offer.default["spacing"]) == ("euler", "leading")
    assert set(made.num_values) == {"text_encoder", "text_encoder_2", "unet", "vae"}
    written = draft(made)
    assert written["family"] == "stable-diffusion-xl"
    assert written["inputs"]["time_ids"] == "size_ids"
    assert written["latent"]["scaling_factor"] == 0.13025


@pytest.mark.parametrize(
    ("part", "key", "value", "wanted"),
    [
        ("index", "requires_aesthetics_score", True, "the server does not run SDXL's refiner"),
        ("index", "_class_name", "StableDiffusionXLImg2ImgPipeline", "(the server does not run SDXL's refiner)"),
        ("index", "text_encoder", [None, None], "text_encoder is missing; what can be exported: CLIPTextModel"),
        ("index", "text_encoder_2", ["transformers", "CLIPTextModel"], "text_encoder_2 is a CLIPTextModel"),
        ("index", "text_encoder_3", ["transformers", "T5EncoderModel"], "text_encoder_3 is not known"),
        ("unet", "addition_embed_type", "image", "is given the prompt's pooled output and the size"),
        ("unet", "addition_time_embed_dim", None, "6 times the addition_time_embed_dim None"),
        ("unet", "projection_class_embeddings_input_dim", 2560, "input_dim 2560 is not the 1280 of the pooled output"),
        ("unet", "cross_attention_dim", 1280, "is not that of the text encoders, 768 + 1280"),
        ("unet", "time_cond_proj_dim", 256, "guidance scale as an input"),
        ("unet", "in_channels", 8, "a UNet that edits pictures"),
        ("text_encoder_2", "rope_theta", 3, "text_encoder_2/config.json: rope_theta is not known to this exporter"),
        ("vae", "latents_mean", [0.1] * 4, "one factor for all channels"),
    ],
)
def test_what_the_server_cannot_honour_of_sdxl_is_refused_by_its_key(
    sdxl: SdxlFolder, part: str, key: str, value: object, wanted: str
) -> None:
    assert wanted in fault(sdxl(**{part: {key: value}}))


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionInpaintPipeline"])
def test_a_unet_that_inpaints_is_planned(folder: Folder, name: str) -> None:
    made = plan(folder(unet={"in_channels": 9}, index={"_class_name": name}))
    assert (made.is_inpainting, made.shape[0]) == (True, 4)
    assert made.source.pipeline_class == "StableDiffusionPipeline"
    assert draft(made)["inputs"]["mask"] == "mask"
    assert draft(made)["inputs"]["masked_image"] == "masked_image"
    assert "only inpaints: each request needs a picture and a mask" in made.notes[-1]


def test_a_unet_of_sdxl_that_inpaints_is_planned(sdxl: SdxlFolder) -> None:
    made = plan(sdxl(unet={"in_channels": 9}, index={"_class_name": "StableDiffusionXLInpaintPipeline"}))
    assert made.is_inpainting
    assert made.source.pipeline_class == "StableDiffusionXLPipeline"
    assert {"mask", "masked_image", "time_ids"} <= draft(made)["inputs"].keys()


def test_a_unet_that_does_not_inpaint_is_planned_as_any_other(folder: Folder) -> None:
    made = plan(folder(index={"_class_name": "StableDiffusionInpaintPipeline"}))
    assert not made.is_inpainting
    assert "inputs" not in draft(made)


def test_an_sdxl_denoiser_without_its_second_condition_is_refused(sdxl: SdxlFolder) -> None:
    unet = {key: value for key, value in SDXL_UNET.items() if not key.startswith("addition")}
    place = sdxl()
    sdxl.write("unet", "config.json", unet)
    said = fault(place)
    assert "addition_embed_type is missing: SDXL's is text_time" in said
    assert "projection_class_embeddings_input_dim 2816" in said


def test_the_pipeline_of_sdxl_does_not_mend_its_scheduler(sdxl: SdxlFolder, folder: Folder) -> None:
    unsaid = {key: value for key, value in SDXL_EULER.items() if key not in ("steps_offset", "set_alpha_to_one")}
    schedule = plan(sdxl(scheduler=unsaid)).offer.schedule
    assert (schedule.steps_offset, schedule.set_alpha_to_one) == (0, True)
    schedule = plan(sdxl()).offer.schedule
    assert (schedule.steps_offset, schedule.set_alpha_to_one) == (1, False)
    assert plan(folder(scheduler=PNDM | {"steps_offset": 0})).offer.schedule.steps_offset == 1


@pytest.mark.parametrize(
    ("name", "config", "note"),
    [
        ("DDIMScheduler", {"clip_sample": True}, "clip_sample is not served: no sampler clips what is predicted"),
        ("LCMScheduler", {"clip_sample": True}, "clip_sample is not served: no sampler clips what is predicted"),
        ("UniPCMultistepScheduler", {}, "UniPCMultistepScheduler is not served: dpmpp_2m"),
        ("DDIMScheduler", {}, None),
    ],
)
def test_a_substitute_in_sdxl_is_never_silent(
    sdxl: SdxlFolder, name: str, config: dict[str, object], note: str | None
) -> None:
    made = plan(sdxl(name, SDXL_EULER | config))
    assert len(made.notes) == (note is not None)
    assert all(note in found for found in made.notes if note)


def test_a_scheduler_clips_where_diffusers_does_unasked(sdxl: SdxlFolder, folder: Folder) -> None:
    unsaid = {key: value for key, value in SDXL_EULER.items() if key != "clip_sample"}
    assert any("clip_sample" in note for note in plan(sdxl("DDIMScheduler", unsaid)).notes)
    assert plan(folder("DDIMScheduler", unsaid)).notes == (), "StableDiffusionPipeline sets it"
    inpaints = folder("DDIMScheduler", unsaid, index={"_class_name": "StableDiffusionInpaintPipeline"})
    [note] = plan(inpaints).notes
    assert note.startswith("scheduler DDIMScheduler: clip_sample is not served"), "this class does not set it"


def test_a_watermark_is_not_left_out_in_silence(sdxl: SdxlFolder) -> None:
    assert plan(sdxl(index={"add_watermarker": True})).notes == (
        "add_watermarker is not served: pictures have no watermark",
    )


@pytest.mark.parametrize(
    ("scheduler_class", "scheduler", "saved_as", "why"),
    [
        ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, None, "its timesteps are trailing"),
        ("", {}, "ByteDance/SDXL-Lightning", "its name says lightning"),
        ("", {}, "stabilityai/sdxl-turbo", "its name says turbo"),
        ("", {}, "someone/turbine-xl", ""),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}, None, ""),
    ],
)
def test_a_distilled_model_of_sdxl_draws_in_few_steps_without_guidance(
    sdxl: SdxlFolder, scheduler_class: str, scheduler: dict[str, object], saved_as: str | None, why: str
) -> None:
    place = sdxl(scheduler_class, SDXL_EULER | scheduler, index={"_name_or_path": saved_as})
    made = plan(place)
    chosen = (made.options.steps, made.options.guidance_scale)
    if not why:
        assert (chosen, made.notes) == ((20, 5.0), ())
        return
    assert chosen == (4, 1.0)
    [note] = made.notes
    assert note.startswith(f"taken for a distilled model, as {why}: 4 steps without guidance")
    assert plan(place, steps=8, guidance_scale=2.0).notes == ()


def test_a_checkpoint_of_sdxl_in_one_file_is_planned_by_its_name(sdxl: SdxlFolder, tmp_path: Path) -> None:
    file = tmp_path / "sd_xl_turbo_1.0.safetensors"
    safetensors(file)
    made = plan(file, config=sdxl())
    assert (made.checkpoint, made.options.steps) == (file, 4)


T5 = {"d_model": 4096, "vocab_size": 32128, "feed_forward_proj": "gated-gelu", "model_type": "t5", "is_gated_act": True}
WIDE_KL = {"latent_channels": 16, "out_channels": 3, "block_out_channels": [8] * 4, "latents_mean": None}
FLUX_TRANSFORMER = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
DYNAMIC = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
SD3_TRANSFORMER = {
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "sample_size": 128,
}


class FluxFolder(Folder):
    """A folder of FLUX.1-dev, without real weights."""

    configs: Mapping[str, dict[str, Any]] = {
        "transformer": FLUX_TRANSFORMER,
        "vae": WIDE_KL | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
        "text_encoder": TEXT,
        "text_encoder_2": T5,
    }
    index: Mapping[str, Any] = {
        "_class_name": "FluxPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
    }
    scheduler = DYNAMIC


class Sd3Folder(Folder):
    """A folder of Stable Diffusion 3, without real weights."""

    configs: Mapping[str, dict[str, Any]] = {
        "transformer": SD3_TRANSFORMER,
        "vae": WIDE_KL | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
        "text_encoder": TEXT | {"projection_dim": 768},
        "text_encoder_2": SDXL_TEXT_2,
        "text_encoder_3": T5,
    }
    index: Mapping[str, Any] = FluxFolder.index | {
        "_class_name": "StableDiffusion3Pipeline",
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"],
    }
    scheduler: Mapping[str, Any] = {"num_train_timesteps": 1000, "shift": 3.0}


@pytest.fixture
def flux(tmp_path: Path) -> FluxFolder:
    return FluxFolder(tmp_path / "flux")


@pytest.fixture
def sd3(tmp_path: Path) -> Sd3Folder:
    return Sd3Folder(tmp_path / "sd3")


def test_the_folder_of_flux_dev_is_planned_in_full(flux: FluxFolder) -> None:
    made = plan(flux())
    assert made.shape == (16, 128, 128)
    assert made.options.sizes == ((1024, 1024),)
    assert (made.options.steps, made.options.guidance_scale) == (28, 3.5)
    assert (made.multiple, made.largest_edge) == (2, None)
    [note] = made.notes
    assert note.startswith("guidance is an input of the denoiser: a step has one row")
    written = draft(made)
    assert written["inputs"] == {
        "sample": "latent",
        "timestep": "timestep",
        "encoder_hidden_states": "encoder:last_hidden_state",
        "pooled_projections": "encoder:pooled_output",
        "guidance": "scalar:guidance",
    }
    assert (written["latent"]["scaling_factor"], written["latent"]["shift_factor"]) == (0.3611, 0.1159)
    assert written["samplers"] == [
        {"name": "flow_match_euler", "spacings": ["trailing"], "sigma_schedules": ["default"]}
    ]
    assert written["prediction_type"] == "flow"
    assert written["noise_schedule"]["use_dynamic_shifting"] is True
    assert "second_tokenizer" in written


def test_the_memory_of_an_export_is_reckoned(flux: FluxFolder) -> None:
    """All weights in float32, plus six bytes for each weight of the compared network: transformer or text encoder."""
    place = flux()
    assert plan(place).peak_bytes == max(4 * 12 + 6 * 6, 4 * 6 + 6 * 3), "four networks of three weights"
    assert plan(place, format=ExportFormat.TORCH).peak_bytes == 4 * 12, "none is compared with its file"
    safetensors(place / "transformer" / "diffusion_pytorch_model.safetensors", num_values=100)
    assert plan(place).peak_bytes == 4 * 103 + 6 * 100
    (place / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (place / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"pickled weights")
    assert plan(place).peak_bytes == 0, "nobody opens a pickle to count"


def test_flux_schnell_draws_in_four_steps_without_guidance(flux: FluxFolder) -> None:
    made = plan(flux(scheduler={"shift": 1.0, "use_dynamic_shifting": False}, transformer={"guidance_embeds": False}))
    assert (made.options.steps, made.options.guidance_scale) == (4, 1.0)
    [note] = made.notes
    assert note.startswith("taken for a distilled model, as its transformer is given no guidance scale")
    written = draft(made)
    assert "guidance" not in written["inputs"]
    assert written["noise_schedule"] == {"num_train_timesteps": 1000, "shift": 1.0}


def test_the_folder_of_stable_diffusion_3_is_planned_in_full(sd3: Sd3Folder) -> None:
    made = plan(sd3())
    assert made.notes == ()
    assert made.shape == (16, 128, 128)
    assert (made.options.steps, made.options.guidance_scale) == (28, 7.0)
    assert (made.multiple, made.largest_edge) == (2, 384)
    assert made.offer.default == {
        "name": "flow_match_euler",
        "spacing": "linspace",
        "sigma_schedule": "default",
        "eta": 0.0,
    }
    written = draft(made)
    assert written["noise_schedule"] == {"num_train_timesteps": 1000, "shift": 3.0}
    assert {"second_tokenizer", "third_tokenizer"} <= written.keys()
    turbo = plan(sd3(index={"_name_or_path": "stabilityai/stable-diffusion-3.5-large-turbo"}))
    assert (turbo.options.steps, turbo.options.guidance_scale) == (4, 1.0)


@pytest.mark.parametrize(
    ("part", "key", "value", "wanted"),
    [
        ("transformer", "in_channels", 384, "in_channels 384 is not 64"),
        ("transformer", "out_channels", 32, "out_channels 32 is not in_channels 64"),
        ("transformer", "patch_size", 2, "latents are packed by 2 x 2 pixels"),
        ("transformer", "joint_attention_dim", 2048, "is not that of text_encoder_2, 4096"),
        ("transformer", "pooled_projection_dim", 2048, "is not that of text_encoder, 768"),
        ("transformer", "qk_norm", "rms_norm", "transformer/config.json: qk_norm is not known to this exporter"),
        ("vae", "shift_factor", None, "shift_factor is missing"),
        ("vae", "latents_std", [1.0], "one factor for all channels"),
        ("text_encoder_2", "num_experts", 8, "text_encoder_2/config.json: num_experts is not known"),
        ("index", "text_encoder_2", [None, None], "text_encoder_2 is missing"),
        ("index", "_class_name", "FluxFillPipeline", "its transformer needs a mask as an input"),
        ("scheduler", "time_shift_type", "linear", "time_shift_type 'linear' cannot be served"),
        ("scheduler", "stochastic_sampling", True, "draws noise between the steps"),
        ("scheduler", "use_beta_sigmas", True, "use_beta_sigmas True cannot be served"),
        ("scheduler", "shift_terminal", 0.1, "ends at the picture"),
        ("scheduler", "wavelet_order", 3, "wavelet_order is not known to this exporter"),
        ("scheduler", "max_image_seq_len", 256, "max_image_seq_len is not above base_image_seq_len"),
    ],
)
def test_what_the_server_cannot_honour_of_flux_is_refused_by_its_key(
    flux: FluxFolder, part: str, key: str, value: object, wanted: str
) -> None:
    changed = {"scheduler": DYNAMIC | {key: value}} if part == "scheduler" else {part: {key: value}}
    assert wanted in fault(flux(**changed))


@pytest.mark.parametrize(
    ("part", "key", "value", "wanted"),
    [
        ("transformer", "in_channels", 33, "in_channels 33 is not 16"),
        ("transformer", "pooled_projection_dim", 768, "is not that of text_encoder and text_encoder_2, 2048"),
        ("text_encoder_3", "d_model", 1024, "is not that of text_encoder_3, 1024"),
        ("text_encoder_3", "d_model", 1024, "d_model 1024 is less than 2048, that of text_encoder and text_encoder_2"),
        ("index", "text_encoder_3", [None, None], "text_encoder_3 is missing"),
    ],
)
def test_what_the_server_cannot_honour_of_stable_diffusion_3_is_refused_by_its_key(
    sd3: Sd3Folder, part: str, key: str, value: object, wanted: str
) -> None:
    assert wanted in fault(sd3(**{part: {key: value}}))


def test_the_options_of_transformers_are_judged(flux: FluxFolder, sd3: Sd3Folder, tmp_path: Path) -> None:
    assert plan(flux(), sizes=((1024, 1024), (1168, 880))).latent_sizes == [(128, 128), (110, 146)]
    assert "--sizes 1000x1024: must be multiples of 16" in fault(flux(), sizes=((1000, 1024),))
    assert "3088x1024: the denoiser has positions for edges of at most 3072" in fault(sd3(), sizes=((3088, 1024),))
    assert "--sampler euler: not among those of this model: flow_match_euler" in fault(flux(), sampler="euler")
    assert "DDIMScheduler cannot be served with flow matching" in fault(sd3("DDIMScheduler", {}))
    file = tmp_path / "flux1-dev.safetensors"
    safetensors(file)
    assert "a folder can be exported, no checkpoint in one file" in fault(file, config=flux())


class ZImageFolder(Folder):
    """A folder of Z-Image, without real weights."""

    configs: Mapping[str, dict[str, Any]] = {
        "transformer": {
            "_class_name": "ZImageTransformer2DModel",
            "all_f_patch_size": [1],
            "all_patch_size": [2],
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
            "cap_feat_dim": 2560,
            "dim": 3840,
            "in_channels": 16,
            "n_heads": 30,
            "n_kv_heads": 30,
            "n_layers": 30,
            "n_refiner_layers": 2,
            "norm_eps": 1e-05,
            "qk_norm": True,
            "rope_theta": 256.0,
            "t_scale": 1000.0,
        },
        "vae": WIDE_KL | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
        "text_encoder": {
            "architectures": ["Qwen3ForCausalLM"],
            "head_dim": 128,
            "hidden_size": 2560,
            "max_position_embeddings": 40960,
            "model_type": "qwen3",
            "num_hidden_layers": 36,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "vocab_size": 151936,
        },
    }
    index: Mapping[str, Any] = {
        "_class_name": "ZImagePipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "Qwen3Model"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
    }
    scheduler: Mapping[str, Any] = {"num_train_timesteps": 1000, "use_dynamic_shifting": False, "shift": 6.0}


@pytest.fixture
def z_image(tmp_path: Path) -> ZImageFolder:
    return ZImageFolder(tmp_path / "z-image")


def test_the_folder_of_z_image_is_planned_in_full(z_image: ZImageFolder) -> None:
    made = plan(z_image(), format=ExportFormat.TORCH)
    assert (made.shape, made.options.sizes) == ((16, 128, 128), ((1024, 1024),))
    assert (made.options.steps, made.options.guidance_scale) == (50, 6.0)
    assert (made.multiple, made.largest_edge) == (2, 1024)
    [note] = made.notes
    assert note == "guidance_scale is one more than what ZImagePipeline is given: its 0, no guidance, is 1 here"
    written = draft(made)
    assert written["inputs"] == {
        "sample": "latent",
        "timestep": "timestep",
        "encoder_hidden_states": "encoder:last_hidden_state",
        "encoder_attention_mask": "encoder:attention_mask",
    }
    assert (written["family"], written["prediction_type"]) == ("z-image", "flow")
    assert written["samplers"][0]["spacings"] == ["trailing"]
    assert written["noise_schedule"] == {"num_train_timesteps": 1000, "shift": 6.0}
    turbo = plan(z_image(index={"_name_or_path": "Tongyi-MAI/Z-Image-Turbo"}), format=ExportFormat.TORCH)
    assert (turbo.options.steps, turbo.options.guidance_scale) == (8, 1.0)


@pytest.mark.parametrize(
    ("place", "options", "scheduler", "why"),
    [
        ("models--Tongyi-MAI--Z-Image-Turbo/snapshots/04cc4abb", {}, {}, "its folder's path says turbo"),
        ("04cc4abb", {"name": "z-image-turbo"}, {}, "its name says turbo"),
        (
            "snapshots/04cc4abb",
            {},
            {"shift": 3.0},
            "its scheduler's shift is 3 like Z-Image-Turbo's, where Z-Image has 6",
        ),
        ("04cc4abb", {}, {}, ""),
    ],
)
def test_a_distilled_z_image_is_recognized_without_a_name_in_its_index(
    tmp_path: Path, place: str, options: dict[str, Any], scheduler: dict[str, Any], why: str
) -> None:
    folder = ZImageFolder(tmp_path / place)
    made = plan(folder("", folder.scheduler | scheduler), format=ExportFormat.TORCH, **options)
    assert (made.options.steps, made.options.guidance_scale) == ((8, 1.0) if why else (50, 6.0))
    assert made.is_default_assumed is not bool(why)
    if why:
        assert made.notes[0].startswith(f"taken for a distilled model, as {why}: 8 steps without guidance")


def test_a_dry_run_says_where_defaults_come_from_if_nothing_tells(
    z_image: ZImageFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"format": ExportFormat.TORCH, "licence": "apache-2.0", "name": "mine", "dry_run": True}
    export_command(z_image(), **options)
    said = "nothing says that it is distilled (turbo, lightning ...), so these steps and this guidance are those of"
    assert f"{said} ZImagePipeline; --steps and --guidance-scale give others" in capsys.readouterr().out
    export_command(z_image(), **options, steps=8, guidance_scale=1.0)
    assert said not in capsys.readouterr().out


@pytest.mark.parametrize("format", [ExportFormat.ONNX, ExportFormat.BOTH])
def test_z_image_is_written_for_torch_alone(z_image: ZImageFolder, format: ExportFormat) -> None:
    assert f"--format {format}: this denoiser computes with complex numbers" in fault(z_image(), format=format)


@pytest.mark.parametrize(
    ("part", "key", "value", "wanted"),
    [
        ("transformer", "all_patch_size", [1, 2], "all_patch_size [1, 2] cannot be exported"),
        ("transformer", "all_f_patch_size", [2], "a latent is one picture"),
        ("transformer", "siglip_feat_dim", 1152, "other pictures as an input"),
        ("transformer", "in_channels", 32, "in_channels 32 is not 16, that of the latent"),
        ("transformer", "cap_feat_dim", 4096, "cap_feat_dim 4096 is not that of text_encoder, 2560"),
        ("transformer", "dim", 3800, "dim 3800 is not n_heads 30 times the sum of axes_dims [32, 48, 48]"),
        ("transformer", "axes_dims", [64, 64], "do not have three axes"),
        ("transformer", "axes_lens", [512, 512, 512], "prompts of 512 tokens need 514 places"),
        ("transformer", "num_experts", 8, "transformer/config.json: num_experts is not known"),
        ("text_encoder", "num_experts", 8, "text_encoder/config.json: num_experts is not known"),
        ("text_encoder", "max_position_embeddings", 256, "max_position_embeddings 256 is less than 512"),
        ("vae", "shift_factor", None, "shift_factor is missing"),
        ("index", "text_encoder", ["transformers", "Qwen2Model"], "text_encoder is a Qwen2Model"),
        ("index", "_class_name", "ZImageOmniPipeline", "its transformer needs other pictures as an input"),
        ("scheduler", "num_train_timesteps", 500, "num_train_timesteps 500 cannot be served"),
        ("scheduler", "use_karras_sigmas", True, "use_karras_sigmas True cannot be served"),
    ],
)
def test_what_the_server_cannot_honour_of_z_image_is_refused_by_its_key(
    z_image: ZImageFolder, part: str, key: str, value: object, wanted: str
) -> None:
    changed = {"scheduler": ZImageFolder.scheduler | {key: value}} if part == "scheduler" else {part: {key: value}}
    assert wanted in fault(z_image(**changed), format=ExportFormat.TORCH)


def test_the_options_of_z_image_are_judged(z_image: ZImageFolder) -> None:
    torch = {"format": ExportFormat.TORCH}
    assert "--sizes 1000x1024: must be multiples of 16" in fault(z_image(), sizes=((1000, 1024),), **torch)
    assert "8208x1024: the denoiser has positions for edges of at most 8192" in fault(
        z_image(), sizes=((8208, 1024),), **torch
    )
    assert "what diffusers calls 0, a model without guidance, is 1 here" in fault(
        z_image(), guidance_scale=0.0, **torch
    )


@pytest.mark.parametrize("format", list(ExportFormat))
def test_every_format_takes_adapters(folder: Folder, format: ExportFormat) -> None:
    manifest = draft(plan(folder(), adapter_rank=8, format=format))
    assert manifest["adapters"]["max_rank"] == 8
    assert manifest["inputs"].items() >= ADAPTER_INPUTS.items()


def test_adapters_change_the_blocks_unless_said_otherwise(folder: Folder) -> None:
    assert plan(folder(), adapter_rank=8).options.adapter_layers is AdapterLayers.BLOCKS


def test_transformers_take_adapters(flux: FluxFolder, z_image: ZImageFolder) -> None:
    for made in (plan(flux(), adapter_rank=8), plan(z_image(), adapter_rank=8, format=ExportFormat.TORCH)):
        assert draft(made)["inputs"].items() >= ADAPTER_INPUTS.items()


def test_text_encoders_get_room_for_adapters_too_unless_they_are_left_out(
    folder: Folder, flux: FluxFolder, z_image: ZImageFolder
) -> None:
    roomy, plain = plan(folder(), adapter_rank=8), plan(folder(), adapter_rank=8, text_adapters=False)
    assert "text_adapters" in draft(roomy)
    assert "text_adapters" not in draft(plain)
    assert draft(plain)["adapters"] == draft(roomy)["adapters"]
    assert "text_adapters" not in draft(plan(folder()))
    assert "text_adapters" in draft(plan(flux(), adapter_rank=8)), "CLIP has room, beside T5"
    assert "text_adapters" not in draft(plan(z_image(), adapter_rank=8, format=ExportFormat.TORCH)), "no CLIP"
    assert "--no-text-adapters: goes with --adapter-rank; leave it out" in fault(folder(), text_adapters=False)


def control_folder(place: Path, **config: object) -> Path:
    """A folder of a control network that fits `UNET`."""
    shared = {"cross_attention_dim": 768, "block_out_channels": [8] * 4, "_class_name": "ControlNetModel"}
    place.mkdir()
    (place / "config.json").write_text(json.dumps(shared | config))
    safetensors(place / "diffusion_pytorch_model.safetensors", 5)
    return place


def test_control_networks_are_planned(folder: Folder, tmp_path: Path) -> None:
    controls = tuple((name, control_folder(tmp_path / name)) for name in ("edges", "depth"))
    made = plan(folder(), controls=controls, sizes=((512, 512), (768, 512)))
    whole = draft(made)
    assert whole["controls"] == ["edges", "depth"]
    assert whole["inputs"]["control_images"] == "control_images"
    assert whole["inputs"]["control_scales"] == "control_scales"
    assert made.num_values["--control edges"] == 5
    assert made.peak_bytes > plan(folder()).peak_bytes
    assert "controls" not in draft(plan(folder()))


def test_a_control_network_of_a_unet_that_inpaints_takes_the_latent_alone(folder: Folder, tmp_path: Path) -> None:
    place = folder(unet={"in_channels": 9})
    made = plan(place, controls=(("edges", control_folder(tmp_path / "four")),))
    assert {"mask", "masked_image", "control_images"} <= draft(made)["inputs"].keys()
    said = fault(place, controls=(("edges", control_folder(tmp_path / "nine", in_channels=9)),))
    assert said == "--control edges: config.json: in_channels is 9, that of the latent is 4"


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"_class_name": "ControlNetUnionModel"}, "is that of a ControlNetUnionModel; what can be exported"),
        ({"cross_attention_dim": 1024}, "cross_attention_dim is 1024, that of the UNet is 768"),
        (
            {"block_out_channels": [8, 8, 8, 16]},
            "block_out_channels is [8, 8, 8, 16], that of the UNet is [8, 8, 8, 8]",
        ),
        ({"addition_embed_type": "text_time"}, "addition_embed_type is text_time, that of the UNet is None"),
        ({"global_pool_conditions": True}, "global_pool_conditions True cannot be exported"),
        ({"conditioning_channels": 6}, "conditioning_channels 6 cannot be exported"),
        ({"conditioning_embedding_out_channels": [16, 32]}, "shrink a picture to 1/2, the autoencoder to 1/8"),
        ({"wavelets": 3}, "wavelets is not known to this exporter"),
    ],
)
def test_a_control_network_that_does_not_fit_is_refused(
    folder: Folder, tmp_path: Path, config: dict[str, object], wanted: str
) -> None:
    found = fault(folder(), controls=(("edges", control_folder(tmp_path / "edges", **config)),))
    assert found.startswith("--control edges: ")
    assert wanted in found


def test_what_takes_no_control_networks_is_refused_by_name(folder: Folder, flux: FluxFolder, tmp_path: Path) -> None:
    edges = (("edges", control_folder(tmp_path / "edges")),)
    assert "--control edges: only UNets take control networks" in fault(flux(), controls=edges)
    assert "--control: has a name twice" in fault(folder(), controls=edges * 2)
    assert "--control: there are 9; at most 8 are taken" in fault(folder(), controls=edges * 9)
    assert "--control 'Edges': must have lower-case letters" in fault(folder(), controls=(("Edges", edges[0][1]),))
    assert "it has no config.json" in fault(folder(), controls=(("edges", tmp_path / "nothing"),))
    (tmp_path / "edges" / "diffusion_pytorch_model.safetensors").unlink()
    assert "edges: no weights (such as" in fault(folder(), controls=edges)


VISION = {
    "model_type": "clip_vision_model",
    "architectures": ["CLIPVisionModelWithProjection"],
    "hidden_size": 1280,
    "projection_dim": 1024,
    "image_size": 224,
    "patch_size": 14,
}
BASE = {"image_proj.proj.weight": [4 * 768, 1024], "ip_adapter.1.to_k_ip.weight": [8, 768]}
PLUS = {
    "image_proj.latents": [1, 16, 768],
    "image_proj.proj_in.weight": [768, 1280],
    "image_proj.proj_out.weight": [768, 768],
    "ip_adapter.1.to_k_ip.weight": [8, 768],
}


def ip_adapter(place: Path, shapes: Mapping[str, list[int]] = BASE, **vision: object) -> Path:
    """A folder of an IP-Adapter whose weights are zeros."""
    encoder = place / "image_encoder"
    encoder.mkdir(parents=True)
    (encoder / "config.json").write_text(json.dumps(VISION | vision))
    safetensors(encoder / "model.safetensors")
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (place / "ip-adapter.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return place


@pytest.mark.parametrize(("shapes", "num_tokens"), [(BASE, 4), (PLUS, 16)])
@pytest.mark.parametrize("as_file", [False, True])
def test_an_ip_adapter_gives_the_model_image_prompts(
    folder: Folder, tmp_path: Path, shapes: Mapping[str, list[int]], num_tokens: int, as_file: bool
) -> None:
    given = ip_adapter(tmp_path / "ip", shapes)
    made = plan(folder(), image_prompt=given / "ip-adapter.safetensors" if as_file else given)
    manifest = draft(made)
    assert manifest["image_prompt"] == {"edge_px": 224, "num_tokens": num_tokens, "width": 768}
    assert manifest["inputs"]["image_prompt_tokens"] == "image_prompt_tokens"
    assert "image_encoder" in manifest["components"] and "image_encoder" in made.roles()
    assert made.num_values["image_encoder"] == 3 + sum(map(math.prod, shapes.values()))
    without = plan(folder())
    assert "image_encoder" not in without.roles() and "image_prompt" not in draft(without)


@pytest.mark.parametrize(
    ("shapes", "vision", "why"),
    [
        (BASE | {"image_proj.proj.weight": [4 * 2048, 1024]}, {}, "its tokens have 2048 numbers, and the UNet's"),
        (PLUS | {"image_proj.proj_out.weight": [2048, 768]}, {}, "its tokens have 2048 numbers, and the UNet's"),
        (BASE, {"projection_dim": 1280}, "takes 1024 numbers, and the projection_dim of image_encoder/ is 1280"),
        (PLUS, {"hidden_size": 1664}, "takes 1280 numbers, and the hidden_size of image_encoder/ is 1664"),
        ({"image_proj.proj.3.weight": [1, 1], "ip_adapter.1": [1]}, {}, "is IP-Adapter Full; the base IP-Adapter and"),
        ({"image_proj.proj.0.weight": [1, 1], "ip_adapter.1": [1]}, {}, "is IP-Adapter FaceID; the base"),
        ({"image_proj.x": [1], "ip_adapter.1": [1]}, {}, "is of a kind that is not known; the base"),
        ({"unet.lora": [1]}, {}, "is no IP-Adapter: it has no weights ip_adapter."),
        (BASE, {"model_type": "siglip_vision_model"}, "model_type 'siglip_vision_model': clip_vision_model can be"),
        (BASE, {"new_key": 1}, "image_encoder/config.json: new_key is not known to this exporter"),
        (BASE, {"image_size": [224, 224]}, "image_size [224, 224] is no number"),
    ],
)
def test_an_ip_adapter_that_does_not_fit_is_refused(
    folder: Folder, tmp_path: Path, shapes: Mapping[str, list[int]], vision: dict[str, object], why: str
) -> None:
    assert why in fault(folder(), image_prompt=ip_adapter(tmp_path / "ip", shapes, **vision))


def test_the_files_of_an_ip_adapter_are_judged(folder: Folder, tmp_path: Path) -> None:
    given = ip_adapter(tmp_path / "ip")
    file = given / "ip-adapter.safetensors"
    (given / "other.safetensors").write_bytes(file.read_bytes())
    assert "has several: ip-adapter.safetensors, other.safetensors; name one" in fault(folder(), image_prompt=given)
    pickle = file.rename(given / "ip-adapter.bin")
    (given / "other.safetensors").unlink()
    assert "ip-adapter.bin is a pickle, which can run code" in fault(folder(), image_prompt=given)
    assert "is a pickle, which can run code when it is read" in fault(folder(), image_prompt=pickle)
    assert "there is no such file or folder" in fault(folder(), image_prompt=file)
    pickle.rename(file)
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 2)
    assert "ip-adapter.safetensors is cut off: 2 bytes are missing" in fault(folder(), image_prompt=given)
    (given / "image_encoder" / "config.json").unlink()
    file.unlink()
    alone = ip_adapter(tmp_path / "again")
    (alone / "image_encoder" / "config.json").unlink()
    assert "image_encoder/ is missing beside it" in fault(folder(), image_prompt=alone)


@pytest.mark.parametrize("format", list(ExportFormat))
def test_every_format_takes_control_networks_and_image_prompts(
    folder: Folder, tmp_path: Path, format: ExportFormat
) -> None:
    edges = (("edges", control_folder(tmp_path / "edges")),)
    made = plan(folder(), controls=edges, image_prompt=ip_adapter(tmp_path / "ip"), format=format)
    assert draft(made)["inputs"].items() >= (CONTROL_INPUTS | IMAGE_PROMPT_INPUTS).items()
    assert "image_encoder" in made.roles()


def test_transformers_take_no_image_prompts(flux: FluxFolder, tmp_path: Path) -> None:
    assert "--image-prompt: only UNets take image prompts; leave it out" in fault(flux(), image_prompt=tmp_path)
