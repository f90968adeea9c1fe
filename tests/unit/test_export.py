"""The files of `safelight repository`, parsed with Triton's own message type."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from google.protobuf import text_format
from safelight_server.catalog import export
from safelight_server.catalog.export import Accelerator, RepositoryError, Target
from safelight_server.cli import main
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from tests.conftest import MODELS
from tests.support.conditions import TWO_SIZES, models_with_conditions

ROOT = MODELS.parent
SOURCE = MODELS / "repository"
NAMES = sorted(path.parent.name for path in SOURCE.glob("*/config.pbtxt"))
DOCUMENTED = {
    "precision_mode",
    "max_workspace_size_bytes",
    "trt_engine_cache_enable",
    "trt_engine_cache_path",
    "trt_timing_cache_enable",
    "trt_timing_cache_path",
    "trt_layer_norm_fp32_fallback",
    "trt_profile_min_shapes",
    "trt_profile_opt_shapes",
    "trt_profile_max_shapes",
}
"""Options in the README of Triton's onnxruntime backend that we use."""


def written(folder: Path) -> dict[str, ModelConfig]:
    files = sorted(folder.glob("*/config.pbtxt"))
    return {file.parent.name: text_format.Parse(file.read_text(), ModelConfig()) for file in files}


@pytest.mark.parametrize("accelerator", list(Accelerator))
def test_gpus_get_an_instance_of_every_component_each(tmp_path, accelerator):
    export.write(SOURCE, tmp_path / "gpu", Target.GPU, 3, accelerator)
    configs = written(tmp_path / "gpu")
    assert sorted(configs) == NAMES
    for name, config in configs.items():
        groups = [(group.kind, group.count, list(group.gpus)) for group in config.instance_group]
        assert groups == [(ModelInstanceGroup.KIND_GPU, 1, [gpu]) for gpu in range(3)]
        assert "intra_op_thread_count" not in config.parameters
        original = (SOURCE / name / "1" / "model.onnx").read_bytes()
        assert (tmp_path / "gpu" / name / "1" / "model.onnx").read_bytes() == original


@pytest.mark.parametrize("accelerator", list(Accelerator))
def test_every_batch_size_is_warmed(tmp_path, accelerator):
    export.write(SOURCE, tmp_path / "gpu", Target.GPU, 1, accelerator)
    for config in written(tmp_path / "gpu").values():
        assert [sample.batch_size for sample in config.model_warmup] == list(range(1, config.max_batch_size + 1))
        for sample in config.model_warmup:
            assert {name: (made.data_type, list(made.dims)) for name, made in sample.inputs.items()} == {
                tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in config.input
            }


def test_tensorrt_in_the_onnxruntime_backend(tmp_path):
    export.write(SOURCE, tmp_path / "gpu", Target.GPU)
    for config in written(tmp_path / "gpu").values():
        assert config.backend == "onnxruntime"
        (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
        assert accelerator.name == "tensorrt"
        assert set(accelerator.parameters) == DOCUMENTED
        assert accelerator.parameters["precision_mode"] == "FP16"
    parameters = dict(
        written(tmp_path / "gpu")["icons_denoiser"]
        .optimization.execution_accelerators.gpu_execution_accelerator[0]
        .parameters
    )
    for end, rows in (("min", 1), ("opt", 16), ("max", 64)):
        shapes = f"sample:{rows}x32x8x8,timestep:{rows},encoder_hidden_states:{rows}x32x128"
        assert parameters[f"trt_profile_{end}_shapes"] == shapes


def test_plans_are_for_the_tensorrt_backend(tmp_path):
    export.write(SOURCE, tmp_path / "gpu", Target.GPU, 1, Accelerator.PLAN)
    for config in written(tmp_path / "gpu").values():
        assert (config.backend, config.default_model_filename) == ("tensorrt", "model.plan")
        assert not config.HasField("optimization")


def test_onnxruntime_alone_needs_no_accelerator(tmp_path):
    export.write(SOURCE, tmp_path / "gpu", Target.GPU, 1, Accelerator.ONNXRUNTIME)
    for config in written(tmp_path / "gpu").values():
        assert config.backend == "onnxruntime"
        assert not config.HasField("optimization")


@pytest.mark.parametrize("target", list(Target))
def test_tensors_bounds_and_queue_stay_as_they_are(tmp_path, target):
    export.write(SOURCE, tmp_path / "made", target)
    before, after = written(SOURCE), written(tmp_path / "made")
    for name in NAMES:
        for field in ("name", "max_batch_size", "input", "output", "dynamic_batching"):
            assert getattr(before[name], field) == getattr(after[name], field)


def test_a_bounded_queue_is_added_on_demand(tmp_path):
    export.write(SOURCE, tmp_path / "made", Target.GPU, bounded_queue=True)
    for config in written(tmp_path / "made").values():
        batching = config.dynamic_batching
        assert (batching.priority_levels, batching.default_priority_level) == (3, 2)
        assert batching.max_queue_delay_microseconds == 0
        policy = batching.default_queue_policy
        assert (policy.max_queue_size, policy.default_timeout_microseconds) == (64, 10_000_000)
        assert policy.allow_timeout_override


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_queue_has_nothing_that_makes_triton_wake_up_late(name):
    batching = written(SOURCE)[name].dynamic_batching
    assert not batching.priority_levels
    assert not batching.HasField("default_queue_policy")


def test_the_shipped_repository_is_what_the_cpu_target_writes_but_for_the_warm_up(tmp_path):
    export.write(SOURCE, tmp_path / "cpu", Target.CPU)
    before, after = written(SOURCE), written(tmp_path / "cpu")
    for name in NAMES:
        after[name].ClearField("model_warmup")
        after[name].instance_group[0].ClearField("name")
        assert before[name] == after[name]


def test_what_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(RepositoryError, match="holds no model"):
        export.write(tmp_path, tmp_path / "out", Target.GPU)
    (tmp_path / "there").mkdir()
    with pytest.raises(RepositoryError, match="exists already"):
        export.write(SOURCE, tmp_path / "there", Target.GPU)
    (tmp_path / "file").write_text("")
    with pytest.raises(RepositoryError, match="file"):
        export.write(SOURCE, tmp_path / "file" / "out", Target.GPU)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.pbtxt").write_text("max_batch_size: many")
    with pytest.raises(RepositoryError, match=r"bad/config\.pbtxt"):
        export.write(tmp_path, tmp_path / "out", Target.GPU)
    assert not (tmp_path / "out").exists()


def test_an_open_dimension_has_no_profile():
    config = ModelConfig(name="m", max_batch_size=4)
    config.input.add(name="x", dims=[4, -1])
    with pytest.raises(RepositoryError, match="m: x has an open dimension"):
        export.for_gpu(config, 1, Accelerator.TENSORRT)


def test_the_command_writes_it(tmp_path, monkeypatch, capsys):
    argv = ["safelight", "repository", "--target", "gpu", "--gpus", "2", "--accelerator", "plan"]
    monkeypatch.setattr(sys, "argv", [*argv, "--out", str(tmp_path / "gpu"), "--models-dir", str(MODELS)])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert not ended.value.code
    assert sorted(written(tmp_path / "gpu")) == NAMES
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"safelight: {tmp_path / 'gpu'}: exists already\n"


def test_the_plan_builder_finds_what_it_has_to_build(tmp_path):
    file = ROOT / "deploy" / "triton" / "build_plan.py"
    spec = importlib.util.spec_from_file_location("build_plan", file)
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    with pytest.raises(RepositoryError, match="no model says backend"):
        builder.plans(SOURCE, "1")
    export.write(SOURCE, tmp_path / "gpu", Target.GPU, 1, Accelerator.PLAN)
    found = builder.plans(tmp_path / "gpu", "1")
    assert [config.name for config, _ in found] == NAMES
    config, folder = found[0]
    with pytest.raises(RepositoryError, match="tensorrt"):
        builder.build(config, folder / "model.onnx", folder / "model.plan", tmp_path / "timings")


@pytest.fixture
def several_sizes(tmp_path) -> Path:
    """A folder of models like one of SDXL's with two sizes: configurations and a manifest, without networks."""
    for name in NAMES:
        text = (SOURCE / name / "config.pbtxt").read_text()
        text = re.sub(r"dims: \[32, 8, 8\]", "dims: [32, -1, -1]", text)
        text = re.sub(r"dims: \[3, 128, 128\]", "dims: [3, -1, -1]", text)
        (tmp_path / "models" / "repository" / name).mkdir(parents=True)
        (tmp_path / "models" / "repository" / name / "config.pbtxt").write_text(text)
    [path] = MODELS.glob("pipelines/icons/*/pipeline.json")
    manifest = json.loads(path.read_text())
    manifest["sizes"] = [{"width_px": 128, "height_px": 128}, {"width_px": 192, "height_px": 64}]
    manifest["family"] = "stable-diffusion-xl"
    place = tmp_path / "models" / "pipelines" / "icons" / path.parent.name
    place.mkdir(parents=True)
    (place / "pipeline.json").write_text(json.dumps(manifest))
    return tmp_path / "models" / "repository"


def test_a_plan_has_a_profile_for_each_size(several_sizes, tmp_path):
    export.write(several_sizes, tmp_path / "gpu", Target.GPU, 2, Accelerator.PLAN)
    configs = written(tmp_path / "gpu")
    denoiser = configs["icons_denoiser"]
    assert [list(group.profile) for group in denoiser.instance_group] == [["0", "1"]] * 2
    small, wide = export.profiles(denoiser)
    assert small["max"] == {"sample": (64, 32, 8, 8), "timestep": (64,), "encoder_hidden_states": (64, 32, 128)}
    assert (wide["min"]["sample"], wide["opt"]["sample"]) == ((1, 32, 4, 12), (16, 32, 4, 12))
    assert not configs["icons_text_encoder"].instance_group[0].profile
    assert len({sample.name for sample in denoiser.model_warmup}) == len(denoiser.model_warmup)


def test_in_the_onnxruntime_backend_one_profile_covers_all_sizes(several_sizes, tmp_path):
    export.write(several_sizes, tmp_path / "gpu", Target.GPU)
    config = written(tmp_path / "gpu")["icons_denoiser"]
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    for end, shape in (("min", "1x32x4x8"), ("opt", "16x32x8x8"), ("max", "64x32x8x12")):
        assert accelerator.parameters[f"trt_profile_{end}_shapes"].startswith(f"sample:{shape},timestep:")


@pytest.mark.parametrize("accelerator", [Accelerator.TENSORRT, Accelerator.PLAN])
def test_an_autoencoder_that_overflows_float16_stays_float32(several_sizes, tmp_path, accelerator):
    export.write(several_sizes, tmp_path / "gpu", Target.GPU, 1, accelerator)
    precisions = {}
    for name, config in written(tmp_path / "gpu").items():
        given = config.parameters[export.PRECISION].string_value
        for made in config.optimization.execution_accelerators.gpu_execution_accelerator:
            given = made.parameters["precision_mode"]
        precisions[name.removeprefix("icons_")] = given
    assert precisions == {role: "FP32" if role in ("decoder", "encoder") else "FP16" for role in precisions}
    assert len(precisions) == len(NAMES)


def test_what_rows_bring_for_their_conditions_is_warmed_up_at_each_size(tmp_path):
    models = models_with_conditions(tmp_path, TWO_SIZES)
    for target, accelerator in ((Target.CPU, Accelerator.TENSORRT), (Target.GPU, Accelerator.ONNXRUNTIME)):
        export.write(models / "repository", tmp_path / target, target, 1, accelerator)
        configs = written(tmp_path / target)
        denoiser = configs["conditioned_denoiser"]
        brought = {name: [] for name in ("control_images", "adapter_weights", "image_prompt_tokens")}
        for sample in denoiser.model_warmup:
            for name, shapes in brought.items():
                if (shape := tuple(sample.inputs[name].dims)) not in shapes:
                    shapes.append(shape)
        assert brought == {
            "control_images": [(2, 3, 128, 128), (2, 3, 96, 64)],
            "adapter_weights": [(6, 20)],
            "image_prompt_tokens": [(2, 3)],
        }
        encoder = configs["conditioned_image_encoder"]
        assert {tuple(sample.inputs["image"].dims) for sample in encoder.model_warmup} == {(3, 8, 8)}
        kind = ModelInstanceGroup.KIND_CPU if target is Target.CPU else ModelInstanceGroup.KIND_GPU
        assert {group.kind for config in configs.values() for group in config.instance_group} == {kind}


def test_tensorrt_takes_adapters_and_image_prompts_and_no_controls(tmp_path):
    models = models_with_conditions(tmp_path)
    for accelerator in (Accelerator.TENSORRT, Accelerator.PLAN):
        with pytest.raises(RepositoryError, match="conditioned_denoiser: its control networks"):
            export.write(models / "repository", tmp_path / "gpu", Target.GPU, 1, accelerator)
        assert not (tmp_path / "gpu").exists()
    file = models / "repository" / "conditioned_denoiser" / "config.pbtxt"
    file.write_text(re.sub(r"input { name: \"control_.*\n", "", file.read_text()))
    export.write(models / "repository", tmp_path / "gpu", Target.GPU)
    [profile] = export.profiles(written(tmp_path / "gpu")["conditioned_denoiser"])
    largest = {name: shape for name, shape in profile["max"].items() if name.startswith(("adapter", "image_prompt"))}
    assert largest == {
        "adapter_weights": (8, 6, 20),
        "adapter_scales": (8, 6),
        "image_prompt_tokens": (8, 2, 3),
        "image_prompt_scale": (8,),
    }
