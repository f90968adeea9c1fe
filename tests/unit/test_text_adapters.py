"""Adapters that change the text encoder: their files, the room for them, and the embeddings that depend on them."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safelight_server.cache.namespaces import Namespaces
from safelight_server.cache.prompts import Prompts
from safelight_server.catalog.adapter_files import AdapterFileError, packed, parse
from safelight_server.catalog.adapters import AdapterLibrary, joined_room
from safelight_server.catalog.catalog import Catalog
from safelight_server.catalog.checks import check
from safelight_server.catalog.manifest import ADAPTER_INPUTS, AdapterRoom, Manifest
from safelight_server.domain.component import Component
from safelight_server.domain.errors import InvalidRequestError, NotFoundError, UnavailableError
from safelight_server.engine.adapters import PromptAdapter, RowAdapter
from safelight_server.engine.batches import Batches
from safelight_server.engine.jobs import Job, prompt_name
from safelight_server.generations.adapters import load_adapters
from safelight_server.runtime.base import StableRows
from safelight_server.sampler import SamplerSpec, compile_table
from safelight_server.scheduler import Batch, Kind, Priority, Row
from safelight_server.storage.keyring import Keyring
from safelight_server.storage.memory import MemoryStore
from safelight_server.storage.purge import EntryOwner
from safelight_server.storage.sealed import Sealer
from safelight_server.storage.tiers import Tier, Tiers
from safelight_server.validation.request import resolve_request

from tests.support.adapters import ROOM, TEXT_ROOM, TEXT_TARGETS, matrices, safetensors, text_matrices
from tests.support.adapters import write_adapter as write
from tests.support.pipelines import MANIFEST, small_pipeline
from tests.support.stores import Numbers
from tests.unit.test_validation import LIMITS, request

OF_DENOISER, OF_TEXT = AdapterRoom.model_validate(ROOM), AdapterRoom.model_validate(TEXT_ROOM)
BOTH = joined_room(OF_DENOISER, OF_TEXT)
INPUTS = {**Manifest.model_validate(MANIFEST).inputs, **ADAPTER_INPUTS}
LAYER, INPUT_SIZE, _ = TEXT_TARGETS[0]
INNER = LAYER.removeprefix("text_encoder.text_model.")
A, B = (f"{LAYER}.lora_{part}.weight" for part in "AB")

KEYS = {
    "diffusers": "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_{A}.weight",
    "diffusers, without text_model": "text_encoder.encoder.layers.0.mlp.fc1.lora_{A}.weight",
    "older diffusers": "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora.{down}.weight",
    "diffusers of 2023": "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.{down}.weight",
    "ComfyUI": "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_{down}.weight",
    "kohya": "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_{down}.weight",
    "kohya, SDXL": "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_{down}.weight",
    "peft": "base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_{A}.weight",
    "peft, without text_model": "base_model.model.encoder.layers.0.mlp.fc1.lora_{A}.weight",
}


def named(pattern: str, given: dict[str, Any]) -> dict[str, Any]:
    """The matrices of `text_matrices` under other keys."""
    return {pattern.format(A="A", down="down"): given[A], pattern.format(A="B", down="up"): given[B]}


@pytest.mark.parametrize("kind", KEYS)
def test_every_format_gives_the_same_weights(kind):
    given = text_matrices(3, seed=2)
    found = packed(parse(safetensors(matrices(3) | named(KEYS[kind], given))), BOTH)
    assert np.array_equal(found[:, : OF_DENOISER.width], packed(parse(safetensors(matrices(3))), OF_DENOISER))
    assert np.array_equal(found[:, OF_DENOISER.width :], np.concatenate([given[A], given[B].T], axis=1))


def test_each_text_encoder_of_sdxl_has_its_own_layers():
    """diffusers' names and kohya's; the third one's are not taken for another's."""
    of = {"text_encoder_2": ("lora_te2", "clip_g"), "text_encoder_3": ("lora_te3", "t5xxl")}
    for name, (short, comfy) in of.items():
        keys = (
            f"{name}.text_model.encoder.layers.0.mlp.fc1.lora_{{A}}.weight",
            f"{short}_text_model_encoder_layers_0_mlp_fc1.lora_{{down}}.weight",
            f"text_encoders.{comfy}.transformer.text_model.encoder.layers.0.mlp.fc1.lora_{{down}}.weight",
        )
        layers = [parse(safetensors(named(key, text_matrices(2)))) for key in keys]
        assert [list(found) for found in layers] == [[f"{name}_text_model_encoder_layers_0_mlp_fc1"]] * 3


def test_the_attention_of_a_text_encoder_has_other_names_in_early_files():
    place = "text_encoder.text_model.encoder.layers.0.self_attn"
    for early, name in (("to_q", "q_proj"), ("to_out", "out_proj")):
        found = parse(safetensors(named(f"{place}.{early}_lora.{{down}}.weight", text_matrices(2))))
        assert list(found) == [f"{place}.{name}".replace(".", "_")]


def test_t5_has_no_room_and_the_error_says_so(tmp_path):
    """Of the three text encoders of Stable Diffusion 3, and of the two of FLUX."""
    for key in (
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_{down}.weight",
        "text_encoder_2.encoder.block.0.layer.1.DenseReluDense.wo.lora_{A}.weight",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.o.lora_{down}.weight",
    ):
        write(tmp_path, "t5", arrays=text_matrices(2) | named(key, text_matrices(2)))
        why = library(tmp_path).misfit("small", "t5")
        assert "which is no target of the model (of text encoders the layers of CLIP have room)" in why, key


@pytest.mark.parametrize(
    ("config", "metadata", "extra", "scaling"),
    [
        ({}, {}, {}, 1),
        ({"lora_alpha": 8}, {}, {}, 2),
        ({}, {"text_encoder.lora_alpha": 8, "unet.lora_alpha": 99, "text_encoder_2.lora_alpha": 77}, {}, 2),
        ({}, {"unet.lora_alpha": 99}, {}, 1),
        ({}, {"text_encoder.lora_alpha": 1, "text_encoder.alpha_pattern": {f"text_model.{INNER}": 8}}, {}, 2),
        ({}, {"text_encoder.lora_alpha": 1, "text_encoder.alpha_pattern": {f"^{INNER}": 8}}, {}, 2),
        ({}, {"text_encoder.lora_alpha": 8, "text_encoder.use_rslora": True}, {}, 4),
        ({}, {}, {f"{LAYER}.alpha": np.array(8.0, np.float32)}, 2),
        ({}, {}, {"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": np.array(8.0, np.float32)}, 2),
    ],
)
def test_alpha_scales_as_in_peft(config, metadata, extra, scaling):
    given = text_matrices(4)
    if any(key.startswith("lora_te") for key in extra):
        given = named(KEYS["kohya"], given)
    told = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None
    [found] = parse(safetensors(given | extra, told), json.dumps(config).encode() if config else b"").values()
    assert np.array_equal(found.up, text_matrices(4)[B] * np.float32(scaling))


ONE = np.ones((2, INPUT_SIZE), np.float32)
REFUSED = {
    "DoRA": ({**text_matrices(2), f"{LAYER}.dora_scale": ONE}, "which is not understood"),
    "one half": ({A: ONE}, "that do not go together"),
    "a layer under two names": (text_matrices(2) | named(KEYS["kohya, SDXL"], text_matrices(2)), "under two names"),
    "NaN": (text_matrices(2) | {A: ONE * np.nan}, "that are not finite"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_understood_is_refused(kind):
    arrays, why = REFUSED[kind]
    with pytest.raises(AdapterFileError, match=why):
        parse(safetensors(arrays))


def library(folder: Path, text_room: AdapterRoom | None = OF_TEXT, max_bytes: int = 1 << 20) -> AdapterLibrary:
    rooms = {} if text_room is None else {"small": text_room}
    return AdapterLibrary(folder, {"small": OF_DENOISER}, max_bytes, rooms)


def write_all(folder: Path) -> None:
    """An adapter of each kind, all of rank 2."""
    write(folder, "both", arrays=matrices(2, 1) | text_matrices(2, 1))
    write(folder, "style", arrays=matrices(2, 2))
    write(folder, "word", arrays=text_matrices(2, 3))


def test_an_adapter_of_the_text_encoder_needs_room_there(tmp_path):
    """A model that was exported before there was room refuses it as ever, and offers all others."""
    write_all(tmp_path)
    assert list(library(tmp_path).of("small")) == ["both", "style", "word"]
    older = library(tmp_path, None)
    assert list(older.of("small")) == ["style"]
    for name in ("both", "word"):
        why = f"changes the text encoder ({LAYER.replace('.', '_')}); the model was exported without room for that"
        assert older.misfit("small", name) == why
    other = AdapterRoom.model_validate({"max_rank": 6, "targets": [{**TEXT_ROOM["targets"][0], "outputs": 9}]})
    assert "changes text_encoder.text_model" in library(tmp_path, other).misfit("small", "both")
    assert "as 3 to 5; the model's is 3 to 9" in library(tmp_path, other).misfit("small", "both")
    renamed = AdapterRoom.model_validate({"max_rank": 6, "targets": [{**TEXT_ROOM["targets"][0], "name": f"{LAYER}x"}]})
    assert "which is no target of the model" in library(tmp_path, renamed).misfit("small", "word")


def test_only_what_changes_the_text_encoder_takes_memory_for_it(tmp_path):
    write_all(tmp_path)
    adapters = library(tmp_path)
    found = {name: adapters.weights("small", name, file.sha256) for name, file in adapters.of("small").items()}
    widths = {name: weights.shape[1] for name, weights in found.items()}
    assert widths == {"both": BOTH.width, "style": OF_DENOISER.width, "word": BOTH.width}
    assert not found["word"][:, : OF_DENOISER.width].any()
    assert np.array_equal(found["both"], packed(parse(safetensors(matrices(2, 1) | text_matrices(2, 1))), BOTH))


def test_a_request_whose_adapter_has_no_room_is_told_why(tmp_path):
    write(tmp_path / "adapters", "word", arrays=text_matrices(2))
    catalog = Catalog([small_pipeline(tmp_path, adapters=ROOM, inputs=INPUTS)])
    catalog.adapters = library(tmp_path / "adapters", None)
    with pytest.raises(
        InvalidRequestError, match="has no adapter 'word'; the one in the folder changes the text encoder"
    ):
        resolve_request(request(adapters=[{"name": "word"}]), catalog, LIMITS)


def test_the_room_decides_pixels(tmp_path):
    plain = small_pipeline(tmp_path, adapters=ROOM, inputs=INPUTS)
    roomy = small_pipeline(tmp_path, adapters=ROOM, text_adapters=TEXT_ROOM, inputs=INPUTS)
    assert len({plain.digest, roomy.digest, small_pipeline(tmp_path).digest}) == 3
    assert small_pipeline(tmp_path, adapters=ROOM, text_adapters=None, inputs=INPUTS).digest == plain.digest


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"text_adapters": TEXT_ROOM}, "text_adapters: goes with adapters"),
        (
            {"adapters": ROOM, "text_adapters": TEXT_ROOM | {"max_rank": 2}},
            "text_adapters.max_rank: 2 is not that of adapters, 6",
        ),
        (
            {"adapters": ROOM, "text_adapters": ROOM},
            "text_adapters.targets: down.attn1.to_q is no layer of a text encoder",
        ),
    ],
)
def test_a_manifest_s_faults_are_named(changes, fault):
    inputs = INPUTS if "adapters" in changes else MANIFEST.get("inputs", Manifest.model_validate(MANIFEST).inputs)
    assert fault in check(Manifest.model_validate(MANIFEST | changes | {"inputs": inputs}))


# --- embeddings ---


async def test_the_parts_of_an_adapter_go_to_the_networks_that_they_change(tmp_path):
    write_all(tmp_path / "adapters")
    pipeline = small_pipeline(tmp_path, adapters=ROOM, text_adapters=TEXT_ROOM, inputs=INPUTS)
    catalog = Catalog([pipeline])
    catalog.adapters = library(tmp_path / "adapters")
    uses = [{"name": name, "scale": 0.5} for name in ("both", "style", "word")]
    spec = resolve_request(request(adapters=uses), catalog, LIMITS).spec
    both, style, word = await load_adapters(catalog, spec, "studio")
    assert [at.weights.shape for at in (both, style, word)] == [(2, OF_DENOISER.width)] * 3
    assert both.text is not None and word.text is not None and style.text is None
    whole = packed(parse(safetensors(matrices(2, 1) | text_matrices(2, 1))), BOTH)
    assert np.array_equal(np.concatenate([both.weights, both.text.weights], axis=1), whole)
    assert (both.text.scale, both.text.sha256) == (0.5, spec.adapters[0].sha256)


async def test_a_replica_whose_model_has_no_room_does_not_find_an_adapter(tmp_path):
    """Another replica, which has one, may have accepted the generation."""
    write_all(tmp_path / "adapters")
    roomy = Catalog([small_pipeline(tmp_path, adapters=ROOM, text_adapters=TEXT_ROOM, inputs=INPUTS)])
    roomy.adapters = library(tmp_path / "adapters")
    spec = resolve_request(request(adapters=[{"name": "both"}]), roomy, LIMITS).spec
    for room in (None, ROOM):
        other = Catalog([small_pipeline(tmp_path, adapters=room, inputs=INPUTS if room else {})])
        other.adapters = library(tmp_path / "adapters", None) if room else AdapterLibrary()
        with pytest.raises(NotFoundError, match="the adapter both is not there any more"):
            await load_adapters(other, spec, "studio")


async def test_what_either_network_is_given_keeps_the_weights_in_memory(tmp_path):
    """The memory is bounded for both together: here there is room for one adapter alone."""
    wide, text_wide = ROOM | {"max_rank": 40}, TEXT_ROOM | {"max_rank": 40}
    catalog = Catalog([small_pipeline(tmp_path, adapters=wide, text_adapters=text_wide, inputs=INPUTS)])
    for seed, name in enumerate(("one", "two")):
        write(tmp_path / "adapters", name, arrays=matrices(40, seed) | text_matrices(40, seed))
    rooms = [{"small": AdapterRoom.model_validate(room)} for room in (wide, text_wide)]
    catalog.adapters = AdapterLibrary(tmp_path / "adapters", rooms[0], 6 * 40 * BOTH.width, rooms[1])

    async def loaded(name: str) -> RowAdapter:
        [found] = await load_adapters(
            catalog, resolve_request(request(adapters=[{"name": name}]), catalog, LIMITS).spec, "studio"
        )
        return found

    held = await loaded("one")
    of_prompt = held.text
    del held
    gc.collect()
    with pytest.raises(UnavailableError):
        await loaded("two")
    assert of_prompt is not None
    del of_prompt
    gc.collect()
    assert (await loaded("two")).text is not None


def of_text(value: float, scale: float = 1.0, rank: int = 2) -> RowAdapter:
    """An adapter that changes both networks; equal values have equal digests."""
    of_prompt = PromptAdapter(np.full((rank, OF_TEXT.width), value, np.float32), scale, f"{value:g}")
    return RowAdapter(np.full((rank, OF_DENOISER.width), value, np.float32), scale, of_prompt)


STYLE = RowAdapter(np.ones((2, OF_DENOISER.width), np.float32), 1.0)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    pipeline = small_pipeline(tmp_path, adapters=ROOM, text_adapters=TEXT_ROOM, inputs=INPUTS)
    table = compile_table(SamplerSpec("ddim"), pipeline.schedule, "v_prediction", 10, 0)
    return Job(1, "a/b", Priority.STANDARD, pipeline, (4, 8, 8), table, 7, 3.0, ((4, 5), (4, 6)))


def test_a_prompt_is_encoded_once_for_all_who_have_the_same_adapters(job):
    """Both prompts depend on them: diffusers changes the text encoder for the negative prompt too."""
    plain = job.conditioning
    assert plain == tuple(prompt_name(job.pipeline, ids) for ids in job.token_ids)
    assert replace(job, adapters=(STYLE,)).conditioning == plain, "the denoiser alone is another"
    assert set(replace(job, adapters=(STYLE,)).encoder_inputs.values()) == set(job.token_ids)
    kinds = [(of_text(1),), (of_text(2),), (of_text(1, 0.5),), (of_text(1), of_text(2)), (of_text(2), of_text(1))]
    names = [replace(job, adapters=adapters).conditioning for adapters in kinds]
    assert len({name for pair in (plain, *names) for name in pair}) == 2 * (1 + len(kinds))
    assert replace(job, adapters=(STYLE, of_text(1))).conditioning == names[0]


def gather(job: Job, *jobs: Job) -> dict[str, np.ndarray]:
    """The text encoder's inputs of one batch for the prompts of all of them."""
    batches, names = Batches(4), []
    for one in (job, *jobs):
        batches.encoder_inputs.update(one.encoder_inputs)
        names += one.conditioning
    key = batches.key(job.pipeline, Component.TEXT_ENCODER, job.latent_shape)
    rows = tuple(Row(-1, conditioning_id=name) for name in names)
    inputs = batches.gather(Batch(1, Kind.ENCODE, key, 0, rows)).inputs
    return {name: at.array() if isinstance(at, StableRows) else at for name, at in inputs.items()}


def test_prompts_of_a_batch_bring_their_adapters(job):
    mixed = replace(job, adapters=(of_text(5, 0.5), STYLE, of_text(7, -2, rank=1)))
    inputs = gather(job, mixed)
    assert inputs["input_ids"].tolist() == [[4, 5], [4, 6]] * 2
    assert inputs["adapter_weights"].shape == (4, 6, OF_TEXT.width)
    assert inputs["adapter_weights"][:, :, 0].tolist() == [[0] * 6] * 2 + [[5, 5, 7, 0, 0, 0]] * 2
    assert (inputs["adapter_weights"] == inputs["adapter_weights"][:, :, :1]).all()
    assert inputs["adapter_scales"].tolist() == [[0] * 6] * 2 + [[0.5, 0.5, -2, 0, 0, 0]] * 2
    assert {at.dtype for name, at in inputs.items() if name != "input_ids"} == {np.dtype(np.float32)}


def test_a_text_encoder_without_room_is_given_token_ids_alone(tmp_path, job):
    pipeline = small_pipeline(tmp_path, adapters=ROOM, inputs=INPUTS)
    assert gather(replace(job, pipeline=pipeline, adapters=(STYLE,))).keys() == {"input_ids"}


async def encode(*_):
    raise AssertionError("it was cached")


async def test_cached_embeddings_of_other_adapters_are_not_found(tmp_path):
    keyring = Keyring.random()
    tiers = Tiers([Tier(MemoryStore(1 << 20))], Sealer(keyring), Numbers().metrics)
    prompts, namespace = Prompts(tiers, encode, lambda _: "n", 60.0), Namespaces(keyring, {}).of("ann")
    pipeline = small_pipeline(tmp_path, adapters=ROOM, text_adapters=TEXT_ROOM, inputs=INPUTS)
    tokens, owner = (1, 4, 6, 2), EntryOwner("x/", bytes(8), bytes(8))
    changes = [(), (("a", 1.0),), (("a", 0.5),), (("b", 1.0),), (("a", 1.0), ("b", 1.0)), (("b", 1.0), ("a", 1.0))]
    for number, change in enumerate(changes):
        assert await prompts.known(namespace, pipeline, tokens, change) is None
        embedding = {"last_hidden_state": np.full((4, 3), number, np.float32)}
        assert await prompts.keep(namespace, pipeline, tokens, embedding, owner, change)
    for number, change in enumerate(changes):
        found = await prompts.known(namespace, pipeline, tokens, change)
        assert found is not None and (found["last_hidden_state"] == number).all()
    assert (await prompts.get(namespace, pipeline, tokens, owner))["last_hidden_state"][0, 0] == 0
