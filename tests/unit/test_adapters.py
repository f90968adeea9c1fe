"""Adapters: reading their files, the models that they fit, and how long their weights are kept."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from safelight_server.catalog import adapters as module
from safelight_server.catalog.adapter_files import AdapterFileError, packed, parse
from safelight_server.catalog.adapter_names import diffusers_name
from safelight_server.catalog.adapters import AdapterLibrary, AdapterRoomError
from safelight_server.catalog.checks import check
from safelight_server.catalog.manifest import ADAPTER_INPUTS, AdapterRoom, Manifest
from safelight_server.domain.component import Component

from tests.support.adapters import (
    ROOM,
    TARGETS,
    TEXT_ROOM,
    matrices,
    safetensors,
    text_matrices,
    with_header,
    write_adapter,
)
from tests.support.pipelines import MANIFEST, small_pipeline

FITTING = AdapterRoom.model_validate(ROOM)
A, B = (f"base_model.model.down.attn1.to_q.lora_{part}.weight" for part in "AB")
FORMATS = {
    "peft": ("base_model.model.{0}.lora_A.weight", "base_model.model.{0}.lora_B.weight"),
    "diffusers": ("unet.{0}.lora_A.weight", "unet.{0}.lora_B.weight"),
    "diffusers, a transformer": ("transformer.{0}.lora_A.weight", "transformer.{0}.lora_B.weight"),
    "older diffusers": ("unet.{0}.lora.down.weight", "unet.{0}.lora.up.weight"),
    "early diffusers": ("unet.{2}_lora.down.weight", "unet.{2}_lora.up.weight"),
    "diffusers of 2023": ("unet.{0}.lora_linear_layer.down.weight", "unet.{0}.lora_linear_layer.up.weight"),
    "kohya": ("lora_unet_{1}.lora_down.weight", "lora_unet_{1}.lora_up.weight"),
    "kohya's form of a transformer": ("lora_transformer_{1}.lora_down.weight", "lora_transformer_{1}.lora_up.weight"),
}


def changed(weights: np.ndarray, x: np.ndarray, first: int, inputs: int, outputs: int) -> np.ndarray:
    """The output that weights (r, Q) add to the target whose numbers begin at `first`."""
    down, up = weights[:, first : first + inputs], weights[:, first + inputs : first + inputs + outputs]
    return x @ down.T @ up


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_weights(kind):
    down_key, up_key = FORMATS[kind]
    given, plain = {}, matrices(3)
    for name, _, _ in TARGETS:
        names = name, name.replace(".", "_"), name.replace("attn1.", "attn1.processor.").removesuffix(".0")
        given[down_key.format(*names)] = plain[f"base_model.model.{name}.lora_A.weight"]
        given[up_key.format(*names)] = plain[f"base_model.model.{name}.lora_B.weight"]
    assert np.array_equal(packed(parse(safetensors(given)), FITTING), packed(parse(safetensors(plain)), FITTING))


def test_packed_weights_add_what_the_matrices_add():
    plain = matrices(3)
    weights = packed(parse(safetensors(plain)), FITTING)
    assert weights.shape == (3, FITTING.width) == (3, 20)
    first, rng = 0, np.random.default_rng(5)
    for name, inputs, outputs in TARGETS:
        x = rng.standard_normal((5, inputs)).astype(np.float32)
        down, up = (plain[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert np.allclose(changed(weights, x, first, inputs, outputs), x @ (up @ down).T, atol=1e-5)
        first += inputs + outputs


def test_a_layer_that_is_not_changed_has_zeros_and_ranks_may_differ():
    given = matrices(3)
    del given[A], given[B]
    assert not packed(parse(safetensors(given)), FITTING)[:, :10].any()
    given |= {A: np.ones((1, 4), np.float32), B: np.ones((6, 1), np.float32)}
    weights = packed(parse(safetensors(given)), FITTING)
    assert weights[0, :10].tolist() == [1] * 10
    assert not weights[1:, :10].any()


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({}, 1),
        ({"lora_alpha": 8}, 2),
        ({"lora_alpha": 8, "use_rslora": True}, 4),
        ({"lora_alpha": 8, "alpha_pattern": {"to_q": 2}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 12}}, 3),
        ({"lora_alpha": 8, "alpha_pattern": {"other.to_q": 2}}, 2),
        ({"lora_alpha": 8, "alpha_pattern": {"n1.to_q": 2}}, 2),
        ({"lora_alpha": 8, "alpha_pattern": {"to_(k|q)": 2, "to_q": 12}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"to_q": 12, "down.*q": 2}}, 3),
    ],
)
def test_alpha_scales_as_in_peft(config, scaling):
    plain = parse(safetensors(matrices(4)))["down_attn1_to_q"]
    scaled = parse(safetensors(matrices(4)), json.dumps(config).encode())["down_attn1_to_q"]
    assert np.array_equal(scaled.up, plain.up * np.float32(scaling))
    assert np.array_equal(scaled.down, plain.down)


def test_alpha_may_be_in_the_file_by_layer_or_in_its_metadata():
    given, plain = matrices(4), parse(safetensors(matrices(4)))["down_attn1_to_q"].up
    alpha = {"base_model.model.down.attn1.to_q.alpha": np.array(2.0, np.float32)}
    assert np.array_equal(parse(safetensors(given | alpha))["down_attn1_to_q"].up, plain * np.float32(0.5))
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8, "text_encoder.lora_alpha": 99})}
    assert np.array_equal(parse(safetensors(given, metadata))["down_attn1_to_q"].up, plain * np.float32(2))


def test_alpha_of_a_transformer_is_in_the_metadata_of_diffusers():
    given = {key.replace("base_model.model", "transformer"): value for key, value in matrices(4).items()}
    plain = parse(safetensors(given))["down_attn1_to_q"].up
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8, "text_encoder.lora_alpha": 99})}
    assert np.array_equal(parse(safetensors(given, metadata))["down_attn1_to_q"].up, plain * np.float32(2))


ORIGINAL = {
    "double_blocks.3.img_attn.qkv": ("transformer_blocks_3_attn_to_", [("q", 0, 4), ("k", 4, 8), ("v", 8, 12)]),
    "double_blocks.3.txt_attn.qkv": (
        "transformer_blocks_3_attn_add_",
        [("q_proj", 0, 4), ("k_proj", 4, 8), ("v_proj", 8, 12)],
    ),
    "double_blocks.0.txt_attn.proj": ("transformer_blocks_0_attn_", [("to_add_out", 0, 12)]),
    "double_blocks.0.img_mlp.2": ("transformer_blocks_0_ff_", [("net_2", 0, 12)]),
    "double_blocks.0.txt_mod.lin": ("transformer_blocks_0_", [("norm1_context_linear", 0, 12)]),
    "single_blocks.17.linear1": (
        "single_transformer_blocks_17_",
        [("attn_to_q", 0, 2), ("attn_to_k", 2, 4), ("attn_to_v", 4, 6), ("proj_mlp", 6, 12)],
    ),
    "single_blocks.17.linear2": ("single_transformer_blocks_17_", [("proj_out", 0, 12)]),
    "single_blocks.17.modulation.lin": ("single_transformer_blocks_17_", [("norm_linear", 0, 12)]),
    "joint_blocks.3.x_block.attn.qkv": ("transformer_blocks_3_attn_to_", [("q", 0, 4), ("k", 4, 8), ("v", 8, 12)]),
    "joint_blocks.3.x_block.attn2.qkv": ("transformer_blocks_3_attn2_to_", [("q", 0, 4), ("k", 4, 8), ("v", 8, 12)]),
    "joint_blocks.3.context_block.mlp.fc2": ("transformer_blocks_3_ff_context_", [("net_2", 0, 12)]),
    "joint_blocks.3.context_block.adaLN_modulation.1": ("transformer_blocks_3_", [("norm1_context_linear", 0, 12)]),
    "layers.2.attention.qkv": ("layers_2_attention_to_", [("q", 0, 4), ("k", 4, 8), ("v", 8, 12)]),
    "context_refiner.0.attention.out": ("context_refiner_0_attention_", [("to_out_0", 0, 12)]),
    "layers.2.attention.to_q": ("layers_2_attention_", [("to_q", 0, 12)]),
}
"""Layers of 2 inputs and 12 outputs as the authors of FLUX, Stable Diffusion 3 and Z-Image name them: those of diffusers,
their outputs."""


@pytest.mark.parametrize("layer", ORIGINAL)
@pytest.mark.parametrize("is_kohya", [False, True], ids=["authors", "kohya"])
def test_a_layer_of_the_authors_of_a_model_becomes_those_of_diffusers(layer, is_kohya):
    rng = np.random.default_rng(4)
    down, up = rng.standard_normal((3, 2)).astype(np.float32), rng.standard_normal((12, 3)).astype(np.float32)
    if is_kohya:
        name = f"lora_unet_{layer.replace('.', '_')}"
        given = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": np.array(6.0, "f")}
    else:
        given = {f"diffusion_model.{layer}.lora_{part}.weight": at for part, at in (("A", down), ("B", up))}
    place, parts = ORIGINAL[layer]
    found = parse(safetensors(given))
    assert list(found) == [f"{place}{name}" for name, _, _ in parts]
    for name, first, end in parts:
        assert np.array_equal(found[f"{place}{name}"].down, down)
        assert np.array_equal(found[f"{place}{name}"].up, up[first:end] * np.float32(2 if is_kohya else 1))


def numbers(*shape: int, seed: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_the_last_block_of_stable_diffusion_3_has_shift_and_scale_the_other_way_round():
    name, up = "lora_unet_joint_blocks_23_context_block_adaLN_modulation_1", numbers(8, 3)
    given = {f"{name}.lora_down.weight": numbers(3, 4), f"{name}.lora_up.weight": up}
    [found] = parse(safetensors(given)).values()
    assert np.array_equal(found.up, np.concatenate([up[4:], up[:4]]))


X_LABS = {
    "double_blocks.0.processor.qkv_lora1": ["attn_to_q", "attn_to_k", "attn_to_v"],
    "double_blocks.0.processor.qkv_lora2": ["attn_add_q_proj", "attn_add_k_proj", "attn_add_v_proj"],
    "double_blocks.0.processor.proj_lora1": ["attn_to_out_0"],
    "double_blocks.0.processor.proj_lora2": ["attn_to_add_out"],
    "single_blocks.0.processor.qkv_lora": ["attn_to_q", "attn_to_k", "attn_to_v"],
    "single_blocks.0.processor.proj_lora": ["proj_out"],
}


@pytest.mark.parametrize("name", X_LABS)
@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_layers_of_x_labs_are_those_of_flux(name, prefix):
    down, up = numbers(3, 4), numbers(12, 3)
    found = parse(safetensors({f"{prefix}{name}.down.weight": down, f"{prefix}{name}.up.weight": up}))
    place = "single_transformer_blocks_0_" if name.startswith("single") else "transformer_blocks_0_"
    assert list(found) == [f"{place}{layer}" for layer in X_LABS[name]]
    assert np.array_equal(np.concatenate([layer.up for layer in found.values()]), up)
    assert all(np.array_equal(layer.down, down) for layer in found.values())


def test_three_adapters_that_kohya_saves_as_one_take_the_ranks_of_one():
    """`split_qkv`: the matrix B has a block for each of queries, keys and values, and zeros beside them."""
    name, down, blocks, up = (
        "lora_unet_double_blocks_0_img_attn_qkv",
        numbers(6, 4),
        numbers(12, 2),
        np.zeros((12, 6), "f"),
    )
    for part in range(3):
        up[4 * part : 4 * part + 4, 2 * part : 2 * part + 2] = blocks[4 * part : 4 * part + 4]
    given = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": np.array([3.0], "f")}
    found = list(parse(safetensors(given)).values())
    assert [layer.shape for layer in found] == [(2, 4, 4, 1)] * 3
    for part, layer in enumerate(found):
        assert np.array_equal(layer.down, down[2 * part : 2 * part + 2])
        assert np.allclose(layer.up @ layer.down, 0.5 * up[4 * part : 4 * part + 4] @ down, atol=1e-6)


def test_what_adds_nothing_needs_no_room():
    """Zeros of other kinds, and layers of zeros, which files have for text encoders that were not trained."""
    idle = {
        "lora_unet_down_attn1_to_q.diff_b": np.zeros(6, np.float32),
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight": numbers(9, 4),
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight": np.zeros((4, 9), np.float32),
    }
    assert parse(safetensors(matrices(2) | idle)).keys() == parse(safetensors(matrices(2))).keys()
    assert packed(parse(safetensors(matrices(2) | idle)), FITTING).shape == (2, FITTING.width)
    for key in idle:
        with pytest.raises(AdapterFileError, match=r"changes biases|do not go together"):
            parse(safetensors(matrices(2) | {key: idle[key] + 1}))
    assert len(parse(safetensors({A: numbers(2, 4), B: np.zeros((6, 2), np.float32)}))) == 1, (
        "one that is not trained yet"
    )


def test_a_layer_under_both_names_is_refused():
    given = matrices(2)
    for name in ("layers.0.attention.qkv", "layers.0.attention.to_k"):
        given |= {f"transformer.{name}.lora_{at}.weight": np.ones((3, 3), np.float32) for at in "AB"}
    with pytest.raises(AdapterFileError, match="changes layers_0_attention_to_k twice"):
        parse(safetensors(given))


def test_half_and_bfloat16_are_read():
    given = {A: np.array([[1.5, -2, 0.25, 3]], np.float16), B: np.ones((6, 1), np.float32)}
    assert parse(safetensors(given))["down_attn1_to_q"].down.tolist() == [[1.5, -2, 0.25, 3]]
    upper = (np.array([[1.5, -2, 0.25, 3]], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    stored = safetensors({B: given[B], A: upper}, types={A: "BF16"})
    assert parse(stored)["down_attn1_to_q"].down.tolist() == [[1.5, -2, 0.25, 3]]


def entries(*offsets: tuple[int, int]) -> dict[str, object]:
    """The entries of matrices of (1, 4) float32 that lie at these places."""
    return {
        f"unet.layer{at}.lora_A.weight": {"dtype": "F32", "shape": [1, 4], "data_offsets": list(place)}
        for at, place in enumerate(offsets)
    }


ONE = np.ones((1, 4), np.float32)
KERNEL = np.ones((1, 4, 3, 3), np.float32)
KOHYA = {
    "lora_unet_down_attn1_to_q.lora_down.weight": ONE,
    "lora_unet_down_attn1_to_q.lora_up.weight": ONE.reshape(4, 1),
}
WHOLE = safetensors(matrices(2))
REFUSED = {
    "empty": (b"", "is no safetensors file"),
    "text": (b"not a safetensors file at all", "is no safetensors file"),
    "no layers": (safetensors({}), "has no layers"),
    "cut off": (WHOLE[:-3], "is cut off: 3 bytes"),
    "header cut off": (WHOLE[:20], "is no safetensors file"),
    "one matrix twice": (
        safetensors(matrices(2) | {A.replace("base_model.model.", "unet."): np.ones((2, 4), np.float32)}),
        "has unet.down.attn1.to_q.lora_A.weight and the same matrix under another name",
    ),
    "magnitudes": (safetensors(matrices(2) | {A.replace("lora_A", "dora_scale"): ONE}), "which is not understood"),
    "three axes": (safetensors({A: np.ones((1, 4, 1), np.float32)}), "which is not understood"),
    "CP": (
        safetensors(matrices(2) | {"lora_unet_x.lora_mid.weight": KERNEL}),
        "lora_mid.* it is of a CP decomposition",
    ),
    "LoHa": (safetensors({"lora_unet_x.hada_w1_a": ONE}), "hada_w1_a .*not understood: it is of LoHa"),
    "LoKr": (safetensors({"lora_unet_x.lokr_w1": ONE}), "lokr_w1 .*not understood: it is of LoKr"),
    "DoRA": (safetensors({"lora_unet_x.dora_scale": ONE}), "dora_scale .*not understood: it is of DoRA"),
    "second kernel": (safetensors({A: KERNEL, B: np.ones((6, 1, 3, 3), np.float32)}), "that do not go together"),
    "long kernel": (safetensors({A: KERNEL[..., :1], B: np.ones((6, 1), np.float32)}), "that do not go together"),
    "no kernel": (safetensors({A: KERNEL[..., :0, :0], B: np.ones((6, 1), np.float32)}), "that do not go together"),
    "two keys": (safetensors({A: ONE, A.replace("base_model.model.", "unet."): ONE}), "the same matrix under another"),
    "two names": (safetensors(matrices(2) | KOHYA), "has a layer under two names"),
    "one half": (safetensors({A: ONE}), "that do not go together"),
    "other ranks": (safetensors(matrices(2) | {A: ONE}), "that do not go together"),
    "rank 0": (safetensors({A: np.ones((0, 4), np.float32), B: np.ones((6, 0), np.float32)}), "do not go together"),
    "integers": (safetensors({A: np.ones((1, 4), np.int64)}), "as I64; F32, F16, BF16, F64 can be read"),
    "a number in the metadata": (
        safetensors(matrices(2), {"lora_adapter_metadata": 5}),  # type: ignore[dict-item]
        "is no safetensors file",
    ),
    "a list of metadata": (with_header({"__metadata__": [], **entries((0, 16))}, bytes(16)), "is no safetensors file"),
    "a shape without end": (
        with_header({A: {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 16]}}, bytes(16)),
        "is no safetensors file",
    ),
    "shared bytes": (with_header(entries((0, 16), (0, 16)), bytes(16)), "is no safetensors file"),
    "overlapping": (with_header(entries((0, 16), (8, 24)), bytes(24)), "is no safetensors file"),
    "a hole": (with_header(entries((0, 16), (20, 36)), bytes(36)), "is no safetensors file"),
    "bytes in front": (with_header(entries((4, 20)), bytes(20)), "is no safetensors file"),
    "bytes behind": (with_header(entries((0, 16)), bytes(18)), "has 2 bytes behind its tensors"),
    "a long key": (safetensors({f"unet.{'x' * 300}.lora_A.weight": ONE}), "has a key of 319 characters"),
    "NaN": (safetensors(matrices(2) | {A: np.full((2, 4), np.nan, np.float32)}), "that are not finite"),
}


CONVOLUTIONS = AdapterRoom.model_validate(
    {
        "max_rank": 4,
        "targets": [
            {"name": "down.conv1", "inputs": 2, "outputs": 3, "kernel": 3, "padding": 1},
            {"name": "down.proj_in", "inputs": 2, "outputs": 2, "kernel": 1},
            {"name": "down.ff", "inputs": 2, "outputs": 2},
        ],
    }
)


def adapter_of(layer: str, *shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The two halves of a layer, of the shapes given, with kohya's keys and numbers of their own."""
    rng = np.random.default_rng(2)
    down, up = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return {f"lora_unet_{layer}.lora_down.weight": down, f"lora_unet_{layer}.lora_up.weight": up}


def test_a_kernel_stands_in_a_row_place_by_place():
    given = adapter_of("down_conv1", (2, 2, 3, 3), (3, 2, 1, 1))
    weights = packed(parse(safetensors(given)), CONVOLUTIONS)
    down, up = given.values()
    assert weights.shape == (2, CONVOLUTIONS.width) == (2, 2 * 9 + 3 + 4 + 4)
    for rank in range(2):
        for place in range(9):
            assert weights[rank, 2 * place : 2 * place + 2].tolist() == down[rank, :, place // 3, place % 3].tolist()
        assert weights[rank, 18:21].tolist() == up[:, rank, 0, 0].tolist()
    assert not weights[:, 21:].any()


@pytest.mark.parametrize("layer", ["down_proj_in", "down_ff"])
def test_a_kernel_of_one_place_and_a_matrix_are_the_same(layer):
    flat = adapter_of(layer, (2, 2), (2, 2))
    wanted = packed(parse(safetensors(flat)), CONVOLUTIONS)
    assert wanted.any()
    for shapes in [((2, 2, 1, 1), (2, 2, 1, 1)), ((2, 2, 1, 1), (2, 2)), ((2, 2), (2, 2, 1, 1))]:
        given = parse(safetensors(adapter_of(layer, *shapes)))
        assert np.array_equal(packed(given, CONVOLUTIONS), wanted), shapes


def test_another_kernel_than_that_of_the_model_does_not_fit(tmp_path):
    other = {
        "flat": adapter_of("down_conv1", (2, 2), (3, 2)),
        "wide": adapter_of("down_conv1", (2, 2, 5, 5), (3, 2, 1, 1)),
        "curved": adapter_of("down_ff", (2, 2, 3, 3), (2, 2, 1, 1)),
        "fitting": adapter_of("down_conv1", (2, 2, 3, 3), (3, 2, 1, 1)),
    }
    for name, given in other.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter.safetensors").write_bytes(safetensors(given))
    adapters = library(tmp_path, small=CONVOLUTIONS)
    assert list(adapters.of("small")) == ["fitting"]
    assert "changes down.conv1 as 2 to 3; the model's is 2 to 3 by 3 x 3" in adapters.misfit("small", "flat")
    assert "changes down.conv1 as 2 to 3 by 5 x 5; the" in adapters.misfit("small", "wide")
    assert "changes down.ff as 2 to 2 by 3 x 3; the model's is 2 to 2" in adapters.misfit("small", "curved")


def test_names_of_the_original_unet_are_those_of_diffusers():
    """Each kind of name once; tests/training compares whole files with diffusers."""
    named = {
        "input_blocks_0_0": "conv_in",
        "input_blocks.4.1.transformer_blocks.0.attn1.to_out.0": (
            "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"
        ),
        "input_blocks_8_0_emb_layers_1": "down_blocks_2_resnets_1_time_emb_proj",
        "input_blocks_6_0_op": "down_blocks_1_downsamplers_0_conv",
        "middle_block_2_out_layers_3": "mid_block_resnets_1_conv2",
        "middle_block_1_proj_out": "mid_block_attentions_0_proj_out",
        "output_blocks_5_2_conv": "up_blocks_1_upsamplers_0_conv",
        "output_blocks_2_1_conv": "up_blocks_0_upsamplers_0_conv",
        "output_blocks_11_0_skip_connection": "up_blocks_3_resnets_2_conv_shortcut",
        "out_2": "conv_out",
        "output_blocks_0_7_conv9": "output_blocks_0_7_conv9",
        "down_blocks.0.attentions.1.proj_in": "down_blocks.0.attentions.1.proj_in",
    }
    assert {name: diffusers_name(name) for name in named} == named


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_understood_is_refused(kind):
    data, why = REFUSED[kind]
    with pytest.raises(AdapterFileError, match=why):
        parse(data)


@pytest.mark.parametrize(
    "config",
    [
        b"{",
        b"[]",
        b'{"use_dora": true}',
        b'{"lora_alpha": "x"}',
        b'{"lora_alpha": 1' + b"0" * 400 + b"}",
        b'{"lora_alpha": 1e300}',
        b'{"lora_alpha": NaN}',
        b'{"alpha_pattern": {"(": 1}}',
        b'{"alpha_pattern": {"x{99999999999}": 1}}',
        b'{"alpha_pattern": {"to_q": 1' + b"0" * 400 + b"}}",
        b'{"alpha_pattern": [1]}',
    ],
)
def test_a_configuration_that_is_not_understood_is_refused(config):
    with pytest.raises(AdapterFileError):
        parse(WHOLE, config)


@pytest.mark.parametrize(
    "patterns",
    [
        ["(o+)+x"],
        ["(o|o)*x"],
        ["o?o?o?ooox"],
        [r"(\\+)+x"],
        ["(o|o)" * 20],
        ["o{1,9}o{1,9}x"],
        ["x" * 201 + "()"],
        [f"to_[q]{number}" for number in range(17)],
    ],
)
def test_expressions_that_may_take_years_are_refused(patterns):
    """While one is matched nothing else of the process runs."""
    config = json.dumps({"alpha_pattern": dict.fromkeys(patterns, 1)})
    with pytest.raises(AdapterFileError, match=r"may take too long to match|that are no names of layers"):
        parse(WHOLE, config.encode())


def test_each_layer_may_have_an_alpha_of_its_own():
    """As diffusers saves them: a thousand names are no thousand expressions."""
    named = {f"down.attn{number}.to_q": 3 for number in range(2, 1000)} | {"down.attn1.to_q": 8}
    config = json.dumps({"lora_alpha": 1, "alpha_pattern": named}).encode()
    plain = parse(safetensors(matrices(4)))["down_attn1_to_q"]
    assert np.array_equal(parse(safetensors(matrices(4)), config)["down_attn1_to_q"].up, plain.up * np.float32(2))


def library(folder: Path, max_bytes: int = 1 << 20, **rooms: AdapterRoom) -> AdapterLibrary:
    return AdapterLibrary(folder, rooms or {"small": FITTING}, max_bytes)


def test_new_changed_and_removed_adapters_are_found_without_a_restart(tmp_path):
    adapters = library(tmp_path / "adapters")
    assert not adapters.of("small")
    write_adapter(tmp_path / "adapters", "pixel")
    adapters.look()
    [first] = adapters.of("small").values()
    assert (first.name, first.rank, len(first.sha256)) == ("pixel", 2, 64)
    write_adapter(tmp_path / "adapters", "pixel", rank=3)
    write_adapter(tmp_path / "adapters", "glow", config={"lora_alpha": 4})
    adapters.look()
    glow, pixel = adapters.of("small").values()
    assert (glow.name, pixel.rank) == ("glow", 3)
    assert len({first.sha256, glow.sha256, pixel.sha256}) == 3, "the configuration is part of it"
    shutil.rmtree(tmp_path / "adapters" / "pixel")
    adapters.look()
    assert list(adapters.of("small")) == ["glow"]
    assert not adapters.of("other")


def test_an_adapter_is_offered_for_the_models_that_it_fits(tmp_path):
    other = {"max_rank": 6, "targets": [{"name": "down.attn1.to_q", "inputs": 4, "outputs": 6}]}
    wider = {"max_rank": 6, "targets": [*ROOM["targets"][:1], {**ROOM["targets"][1], "outputs": 5}]}
    rooms = {"small": ROOM, "other": other, "wider": wider, "narrow": ROOM | {"max_rank": 1}}
    write_adapter(tmp_path, "pixel")
    (tmp_path / "empty").mkdir()
    adapters = library(tmp_path, **{name: AdapterRoom.model_validate(room) for name, room in rooms.items()})
    assert {model for model in rooms if "pixel" in adapters.of(model)} == {"small"}
    assert "no target of the model" in adapters.misfit("other", "pixel")
    assert "changes down.attn1.to_out.0 as 6 to 4; the model's is 6 to 5" in adapters.misfit("wider", "pixel")
    assert "has rank 2; the model has room for 1" in adapters.misfit("narrow", "pixel")
    assert "must have one file" in adapters.misfit("small", "empty")
    assert not adapters.misfit("small", "pixel")
    assert not adapters.misfit("small", "unheard of")
    assert "is larger than 100 bytes" in library(tmp_path, max_bytes=100).misfit("small", "pixel")
    size = next((tmp_path / "pixel").iterdir()).stat().st_size
    sparse = AdapterRoom.model_validate(
        {"max_rank": 6, "targets": [*ROOM["targets"], {"name": "x", "inputs": 999, "outputs": 1}]}
    )
    assert "all adapters together may take" in library(tmp_path, size, small=sparse).misfit("small", "pixel")


def test_weights_are_read_once_and_given_up_when_others_need_the_room(tmp_path):
    for seed, name in enumerate(("one", "two", "three")):
        write_adapter(tmp_path, name, rank=40, seed=seed)
    wide = AdapterRoom.model_validate(ROOM | {"max_rank": 40})
    adapters = library(tmp_path, max_bytes=2 * 4 * 40 * wide.width, small=wide)  # of two of them
    shas = {name: file.sha256 for name, file in adapters.of("small").items()}

    def weights(name):
        return adapters.weights("small", name, shas[name])

    held = weights("one")
    assert weights("one") is held
    assert np.array_equal(held, packed(parse(safetensors(matrices(40, 0))), wide))
    also = weights("two")
    with pytest.raises(AdapterRoomError):
        weights("three")
    assert weights("one") is held, "what is in use is not given up"
    del also
    gc.collect()
    assert weights("three") is not None
    assert weights("one") is held


def test_what_is_in_use_outlives_its_file(tmp_path):
    place = write_adapter(tmp_path, "pixel")
    adapters = library(tmp_path)
    sha256 = adapters.of("small")["pixel"].sha256
    held = adapters.weights("small", "pixel", sha256)
    before = held.copy()
    write_adapter(tmp_path, "pixel", rank=3)  # of another size, by which it is noticed within the clock's tick
    with pytest.raises(AdapterFileError, match="not there any more"):
        adapters.weights("small", "pixel", "0" * 64)
    adapters.look()
    other = adapters.weights("small", "pixel", adapters.of("small")["pixel"].sha256)
    assert np.array_equal(held, before)
    assert len(other) == 3
    assert adapters.weights("small", "pixel", sha256) is held
    shutil.rmtree(place)


def test_a_file_that_was_replaced_since_the_last_look_is_not_taken_for_the_old_one(tmp_path):
    write_adapter(tmp_path, "pixel")
    adapters = library(tmp_path)
    sha256 = adapters.of("small")["pixel"].sha256
    write_adapter(tmp_path, "pixel", seed=1)
    with pytest.raises(AdapterFileError, match="is another file now"):
        adapters.weights("small", "pixel", sha256)


async def test_a_library_without_a_folder_or_without_models_follows_nothing(tmp_path):
    await AdapterLibrary().follow()
    await AdapterLibrary(tmp_path, {}).follow()


def test_the_room_decides_pixels_and_none_leaves_the_digest_as_it_was(tmp_path):
    """The order of the targets is that of the numbers."""
    plain, inputs = small_pipeline(tmp_path), {**Manifest.model_validate(MANIFEST).inputs, **ADAPTER_INPUTS}
    turned = {"max_rank": 6, "targets": ROOM["targets"][::-1]}
    rooms = [small_pipeline(tmp_path, adapters=room, inputs=inputs) for room in (ROOM, turned)]
    assert len({pipeline.digest for pipeline in (plain, *rooms)}) == 3
    assert small_pipeline(tmp_path, adapters=None).digest == plain.digest


def test_room_from_before_there_were_convolutions_keeps_its_digest(tmp_path):
    inputs = {**Manifest.model_validate(MANIFEST).inputs, **ADAPTER_INPUTS}
    targets = [
        {**ROOM["targets"][0], **form} for form in ({}, {"kernel": None}, {"kernel": 1}, {"kernel": 3}, {"padding": 1})
    ]
    of_linear, same, *others = [
        small_pipeline(tmp_path, adapters={"max_rank": 6, "targets": [target]}, inputs=inputs).digest
        for target in targets
    ]
    assert of_linear == same == "5cdefe1f13522a1b53769b6fce702bd0153833ffaec37be91d4b1b54914a2e04", "of before"
    assert len({of_linear, *others}) == 4


@pytest.mark.parametrize("changes", [{"adapters": ROOM}, {"inputs": dict(ADAPTER_INPUTS)}])
def test_room_and_inputs_go_together(changes):
    inputs = {**Manifest.model_validate(MANIFEST).inputs, **changes.get("inputs", {})}
    faults = check(Manifest.model_validate(MANIFEST | changes | {"inputs": inputs}))
    assert faults == ["adapters: goes with inputs of both adapter_weights and adapter_scales"]


HOSTILE = {
    "number": safetensors(matrices(2), {"lora_adapter_metadata": 5}),  # type: ignore[dict-item]
    "alpha": safetensors(matrices(2), {"lora_adapter_metadata": '{"unet.lora_alpha": 1' + "0" * 400 + "}"}),
    "surrogate": safetensors(matrices(2) | {"\ud800\x1b[31m" + "x" * 5000: ONE}),
    "many": safetensors({f"unet.{'x' * 90}{number}.lora_A.weight": ONE for number in range(20)}),
    "type": safetensors(matrices(2), types={A: "F" * 100_000}),
}


def test_hostile_files_stop_nobody_and_say_why_in_short_and_printable_words(tmp_path):
    for name, data in HOSTILE.items():
        write_adapter(tmp_path, name)
        (tmp_path / name / "adapter_model.safetensors").write_bytes(data)
    write_adapter(tmp_path, "pixel")
    adapters = library(tmp_path)
    assert set(adapters.of("small")) <= {"pixel", "alpha"}
    assert "pixel" in adapters.of("small")
    for name in HOSTILE.keys() - adapters.of("small").keys():
        why = adapters.misfit("small", name)
        assert why and why.isprintable() and len(why) <= 301, name
    write_adapter(tmp_path, "glow")
    adapters.look()
    assert "glow" in adapters.of("small")


def test_an_adapter_that_could_not_be_read_is_read_again(tmp_path, monkeypatch):
    """Its folder does not change when there are file descriptors again."""
    write_adapter(tmp_path, "pixel")
    read, reads = module.read_regular_file, []

    def without_descriptors(path, most):
        reads.append(path)
        if len(reads) == 1:
            raise OSError(errno.EMFILE, "Too many open files")
        return read(path, most)

    monkeypatch.setattr(module, "read_regular_file", without_descriptors)
    adapters = library(tmp_path)
    assert adapters.misfit("small", "pixel") == "cannot be read: Too many open files"
    adapters.look()
    assert list(adapters.of("small")) == ["pixel"]
    adapters.look()
    assert len(reads) == 2, "what is known is not read again"


def test_a_file_that_is_too_large_is_looked_at_once(tmp_path, monkeypatch):
    write_adapter(tmp_path, "pixel")
    read, reads = module.read_regular_file, []
    monkeypatch.setattr(module, "read_regular_file", lambda *given: [reads.append(1), read(*given)][1])
    adapters = library(tmp_path, max_bytes=100)
    adapters.look()
    assert "is larger than 100 bytes" in adapters.misfit("small", "pixel")
    assert len(reads) == 1


@pytest.mark.parametrize("which", ["adapters", "pixel"])
def test_a_folder_that_cannot_be_listed_ends_nothing(tmp_path, monkeypatch, which):
    folder = tmp_path / "adapters"
    for name in ("glow", "pixel"):
        write_adapter(folder, name)
    adapters, listed = library(folder), Path.iterdir

    def denied(path):
        if path.name == which:
            raise PermissionError(errno.EACCES, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", denied)
    adapters.look()
    assert list(adapters.of("small")) == ["glow", "pixel"]
    assert AdapterLibrary(folder, {"small": FITTING}).of("small").keys() >= ({"glow"} if which == "pixel" else set())
    monkeypatch.undo()
    shutil.rmtree(folder)
    adapters.look()
    assert not adapters.of("small")


async def test_what_is_in_memory_does_not_wait_for_the_files_of_others(tmp_path, monkeypatch):
    for name in ("held", "slow"):
        write_adapter(tmp_path, name, seed=len(name) + ord(name[0]))
    adapters, pack = library(tmp_path), module.packed
    held, slow = (adapters.of("small")[name].sha256 for name in ("held", "slow"))
    weights = await adapters.fetch("studio", "small", "held", held)
    going_on, begun = threading.Event(), threading.Event()

    def packed_slowly(*given):
        begun.set()
        assert going_on.wait(30)
        return pack(*given)

    monkeypatch.setattr(module, "packed", packed_slowly)
    try:
        waiting = [asyncio.create_task(adapters.fetch("studio", "small", "slow", slow)) for _ in range(20)]
        assert await asyncio.to_thread(begun.wait, 30)
        at_once = asyncio.create_task(adapters.fetch("studio", "small", "held", held))
        for _ in range(10):
            await asyncio.sleep(0)
        assert at_once.done() and at_once.result() is weights
        async with asyncio.timeout(30):
            assert await asyncio.to_thread(int, 7) == 7, "one thread waits, not one for each request"
    finally:
        going_on.set()
    [first, *others] = await asyncio.gather(*waiting)
    assert all(other is first for other in others)


def test_an_adapter_says_which_components_it_changes(tmp_path):
    write_adapter(tmp_path, "plain")
    write_adapter(tmp_path, "both", arrays=matrices(2) | text_matrices(2))
    write_adapter(tmp_path, "text", arrays=text_matrices(2))
    text_rooms = {"small": AdapterRoom.model_validate(TEXT_ROOM)}
    offered = AdapterLibrary(tmp_path, {"small": FITTING}, 1 << 20, text_rooms).of("small")
    assert {name: file.components for name, file in offered.items()} == {
        "plain": (Component.DENOISER,),
        "both": (Component.DENOISER, Component.TEXT_ENCODER),
        "text": (Component.TEXT_ENCODER,),
    }
