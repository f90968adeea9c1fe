"""Files that people give to `safelight export` by mistake, and damaged ones: each is named, with what to do."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from safelight_server.export import weights
from safelight_server.export.source import ExportError, Findings, read, type_faults

from tests.support.adapters import matrices, safetensors

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def refusal(folder: Path) -> str:
    with pytest.raises(ExportError) as refused:
        read(folder, Findings())
    return str(refused.value)


def test_a_folder_beside_the_one_that_was_meant_is_told(tmp_path: Path) -> None:
    inner = tmp_path / "models--a--b" / "snapshots" / "04cc4abb"
    inner.mkdir(parents=True)
    (inner / "model_index.json").write_text("{}")
    assert refusal(tmp_path / "models--a--b").endswith(f"it has no model_index.json; {inner} is one")
    assert refusal(inner.parent).endswith(f"; {inner} is one")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    assert refusal(tmp_path / "unet").endswith("; it is one network, not a pipeline: give the folder of the pipeline")
    served = tmp_path / "served" / "pipelines" / "x" / "1"
    served.mkdir(parents=True)
    (served / "pipeline.json").write_text("{}")
    assert refusal(served).endswith("; it was exported already: serve it, or add --quantize")


@pytest.mark.parametrize("prefix", ["base_model.model.", "unet.", "lora_unet_"])
def test_an_adapter_is_told_from_a_model(tmp_path: Path, prefix: str) -> None:
    given_keys = {
        key if prefix != "lora_unet_" else key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): matrix
        for key, matrix in matrices(2, prefix=prefix).items()
    }
    (tmp_path / "adapter.safetensors").write_bytes(safetensors(given_keys))
    assert weights.is_adapter(tmp_path / "adapter.safetensors")
    plain = {
        "model.diffusion_model.input_blocks.0.0.weight": matrices(2).popitem()[1],
        "exploratory.weight": matrices(1).popitem()[1],
    }
    (tmp_path / "model.safetensors").write_bytes(safetensors(plain))
    assert not weights.is_adapter(tmp_path / "model.safetensors")
    (tmp_path / "model.ckpt").write_bytes(b"PK")
    assert not weights.is_adapter(tmp_path / "model.ckpt")


@pytest.mark.parametrize(
    "index", ["{", "[]", "7", '{"weight_map": 7}', '{"weight_map": {"a": []}}', "{}", "[" * 100_000]
)
def test_a_list_of_parts_that_is_none_is_a_fault(tmp_path: Path, index: str) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    findings = Findings()
    weights.find(tmp_path / "unet", "", findings)
    assert findings.faults == ["unet: diffusion_pytorch_model.safetensors.index.json is no list of files"]


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("hidden_size", None, "a whole number"),
        ("in_channels", "4", "a whole number"),
        ("num_train_timesteps", float("inf"), "a whole number"),
        ("steps_offset", -1, "a whole number"),
        ("patch_size", 0, "a whole number from 1 on"),
        ("beta_start", -0.1, "from 0 to below 1"),
        ("block_out_channels", 8, "a list of whole numbers"),
        ("block_out_channels", [], "a list of whole numbers"),
        ("axes_dims", ["a"], "a list of whole numbers"),
        ("sample_size", "64", "a whole number, or two of them"),
        ("sample_size", [64], "a whole number, or two of them"),
    ],
)
def test_a_value_of_another_type_is_named(key: str, value: object, wanted: str) -> None:
    assert type_faults("unet/config.json", {key: value}) == [
        f"unet/config.json: {key} {value!r} cannot be read: it must be {wanted}"
    ]


@given(entry=JSON)
@limits(deadline=None)
def test_a_header_of_any_form_is_judged(entry: object, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("header") / "model.safetensors"
    for header in (
        entry,
        {"x": entry},
        {"x": {"shape": [1], "data_offsets": entry}},
        {"x": {"shape": entry, "data_offsets": [0, 4]}},
    ):
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
        fault, _ = weights.check(file)
        assert isinstance(fault, str)


def test_a_file_of_weights_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")

    def denied(*given: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert weights.check(file) == ("cannot be read: Permission denied", 0)
