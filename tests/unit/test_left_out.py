"""A pipeline that cannot be served is reported with its reason, and the others are served; a setting makes it fatal."""

from __future__ import annotations

from pathlib import Path

import pytest
from safelight_server.catalog import catalog
from safelight_server.catalog.catalog import ManifestError
from safelight_server.domain.component import Component
from safelight_server.runtime import memory, verification
from safelight_server.runtime.base import RuntimeStartError
from safelight_server.runtime.onnx import OnnxRuntime
from safelight_server.runtime.verification import InputSpec

from tests.support.models_folder import add_pipeline, copy_models
from tests.support.pipelines import small_pipeline

BAD = {"defaults": {"num_inference_steps": 0, "guidance_scale": 1, "sampler": {"name": "ddim", "spacing": "trailing"}}}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return copy_models(tmp_path)


def test_a_bad_manifest_leaves_its_pipeline_out(models: Path) -> None:
    add_pipeline(models, "bad", **BAD)
    found = catalog.load(models, require_all=False)
    assert list(found.pipelines) == ["icons"]
    assert found.default == "icons", "not the first by name: that one is not served"
    reason = found.unavailable["bad"].reason
    assert reason.startswith("pipelines/bad/1/pipeline.json: defaults.num_inference_steps")
    assert str(models) not in reason


def test_all_may_be_required(models: Path) -> None:
    add_pipeline(models, "bad", **BAD)
    with pytest.raises(ManifestError, match=r"defaults\.num_inference_steps"):
        catalog.load(models)


def test_no_other_model_takes_the_place_of_the_default(models: Path) -> None:
    add_pipeline(models, "bad", **BAD)
    with pytest.raises(ManifestError, match=r"the default model 'bad' cannot be served: .*num_inference_steps"):
        catalog.load(models, "bad", require_all=False)


def test_nothing_left_is_an_error(models: Path) -> None:
    [manifest] = (models / "pipelines" / "icons").glob("*/pipeline.json")
    manifest.write_text("{")
    with pytest.raises(ManifestError, match=r"no model can be served: icons: .*not JSON"):
        catalog.load(models, require_all=False)


def test_a_tokenizer_that_is_none_leaves_its_pipeline_out(models: Path) -> None:
    path = add_pipeline(models, "bad")
    (path.parent / "tokenizer.json").write_text("{}")
    found = catalog.load(models, require_all=False)
    assert "tokenizer.json: sha256" in found.unavailable["bad"].reason


@pytest.mark.parametrize("require_all", [False, True])
async def test_a_network_that_cannot_be_loaded_leaves_its_pipeline_out(
    models: Path, monkeypatch: pytest.MonkeyPatch, require_all: bool
) -> None:
    async def nothing(*_: object) -> None:
        """Leaves out the warm-up, which takes seconds."""

    monkeypatch.setattr(OnnxRuntime, "_warm_up", nothing)
    add_pipeline(models, "bad", network=b"not a network")
    found = catalog.load(models, require_all=require_all)
    runtime = OnnxRuntime(found, num_instances=1)
    try:
        if require_all:
            with pytest.raises(RuntimeStartError, match=r"bad_denoiser/1/model\.onnx"):
                await runtime.start()
        else:
            await runtime.start()
            assert list(found.pipelines) == ["icons"]
            reason = found.unavailable["bad"].reason
            assert "bad_denoiser/1/model.onnx" in reason and str(models) not in reason
    finally:
        await runtime.close()


def test_a_batch_is_only_as_large_as_memory_allows() -> None:
    free = int(100 / memory.CALL_SHARE) + 1
    assert memory.bound_rows(64, 10, 2, free) == 5
    assert memory.bound_rows(4, 10, 2, free) == 4
    assert memory.bound_rows(64, 0, 2, free) == 64, "nobody has measured it"
    with pytest.raises(RuntimeStartError, match=r"a row does not fit: 2 instances x .* a row, and .* are free"):
        memory.bound_rows(64, 60, 2, free)


def test_weights_that_do_not_fit_are_refused_with_the_arithmetic(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"0" * 100)
    memory.check_load(file, 300)
    with pytest.raises(RuntimeStartError, match=r"loading takes 0 MiB \(3 x 0 MiB of weights\)"):
        memory.check_load(file, 299)
    file.with_name("model.onnx.data").write_bytes(b"0" * 100)
    with pytest.raises(RuntimeStartError):
        memory.check_load(file, 300)


def test_the_memory_of_the_cgroup_counts_where_it_is_less(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9999 kB\nMemAvailable:    1000 kB\n")
    assert memory.available_bytes(meminfo, tmp_path) == 1000 << 10
    for name, text in {
        "memory.max": "5000\n",
        "memory.current": "2000\n",
        "memory.stat": "inactive_file 500\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert memory.available_bytes(meminfo, tmp_path) == 3500
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes(meminfo, tmp_path) == 1000 << 10
    assert memory.available_bytes(tmp_path / "none", tmp_path / "none") is None


def test_open_axes_are_those_of_each_size(tmp_path: Path) -> None:
    pipeline = small_pipeline(tmp_path)  # 64x64 and 64x96, latents of 8 and 12
    latent, ids = InputSpec("sample", (4, -1, -1)), InputSpec("input_ids", (8,), True)
    assert [[spec.shape for spec in one] for one in verification.at_sizes([latent, ids], pipeline)] == [
        [(4, 8, 8), (8,)],
        [(4, 12, 8), (8,)],
    ]
    [[image], _] = verification.at_sizes([InputSpec("image", (3, -1, -1))], pipeline)
    assert image.shape == (3, 64, 64)
    assert verification.at_sizes([ids], pipeline) == [[ids]]
    with pytest.raises(ManifestError, match="context has an open dimension"):
        verification.at_sizes([InputSpec("context", (-1,))], pipeline)


async def test_a_batch_is_offered_if_it_is_bit_equal_at_every_size() -> None:
    async def call(inputs: dict) -> dict:
        sample = inputs["sample"]
        drift = sample.shape[2] == 12 and len(sample) > 4  # as if large batches used another kernel
        return {"prediction": sample + (1 if drift else 0)}

    inputs = [[InputSpec("sample", (4, 8, 8))], [InputSpec("sample", (4, 12, 8))]]
    curve = await verification.warm_up_sizes(call, inputs, 16)
    assert curve is not None
    assert curve.rows == (1, 2, 4)
    assert len(curve.seconds) == 3


def test_what_a_row_takes_is_no_part_of_what_a_pipeline_is(models: Path) -> None:
    [path] = (models / "pipelines" / "icons").glob("*/pipeline.json")
    before = catalog.load(models).get("icons").digest
    path.write_text(path.read_text().replace('"version": 1,', '"version": 1, "row_bytes": 4096,'))
    after = catalog.load(models).get("icons")
    assert after.manifest.components[Component.DENOISER].row_bytes == 4096
    assert after.digest == before
