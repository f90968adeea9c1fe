"""Catalog, tokenizer and runtimes on the shipped models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safelight_server.app.server import build_runtime
from safelight_server.catalog import catalog
from safelight_server.catalog.manifest import ENCODER_MASK_INPUT, STABLE_DIFFUSION_INPUTS, PromptTemplate
from safelight_server.catalog.pipeline import assemble
from safelight_server.catalog.tokenizer import Tokenizer, TokenizerGroup
from safelight_server.domain.component import Component
from safelight_server.runtime import cores, onnx, verification
from safelight_server.runtime.base import CostCurve, RuntimeFailure, RuntimeStartError
from safelight_server.runtime.onnx import OnnxRuntime
from safelight_server.runtime.simulated import SimulatedRuntime, simulated_pipeline
from safelight_server.runtime.torch_options import TorchOptions
from safelight_server.settings import load

MODELS = Path(__file__).parent.parent.parent / "models"


@pytest.fixture(scope="module")
def icons():
    return catalog.load(MODELS)


def test_the_shipped_models_load_and_weigh_at_most_25_mib(icons):
    pipeline = icons.get("")
    assert pipeline.name == "icons"
    assert sum(file.stat().st_size for file in pipeline.files.values()) <= 25 * 2**20
    size = pipeline.manifest.sizes[0]
    assert pipeline.latent_shape(size.width_px, size.height_px)[0] == pipeline.manifest.latent.channels


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m["defaults"].update(num_inference_steps=0), "defaults.num_inference_steps"),
        (lambda m: m["components"].pop("decoder"), "decoder is missing"),
        (lambda m: m["components"]["decoder"].update(sha256="0" * 64), "sha256"),
        (
            lambda m: m["samplers"].append({"name": "lcm", "spacings": ["leading"], "sigma_schedules": ["default"]}),
            "lcm",
        ),
        (lambda m: m["linear_preview"].update(bias=[0.0]), "linear_preview"),
        (lambda m: m["tokenizer"].update(file="gone.json"), "gone.json is missing"),
        (lambda m: m["tokenizer"].update(max_tokens=33), "text_encoder: config.pbtxt: input_ids is"),
        (
            lambda m: m.update(second_tokenizer=m["tokenizer"] | {"max_tokens": 33}),
            "second_tokenizer.max_tokens: 33 is not the first tokenizer's",
        ),
        (lambda m: m.update(second_tokenizer=m["tokenizer"]), r"input_ids is \[32\].*\[64\]"),
        (lambda m: m.update(second_tokenizer=m["tokenizer"] | {"file": "gone.json"}), "gone.json is missing"),
        (lambda m: m.update(third_tokenizer=m["tokenizer"]), "third_tokenizer: there is no second one"),
        (lambda m: m.update(family="flux"), "second_tokenizer: flux needs one"),
        (lambda m: m.update(family="stable-diffusion-3"), "third_tokenizer: stable-diffusion-3 needs one"),
        (
            lambda m: m.update(family="flux", second_tokenizer=m["tokenizer"] | {"max_tokens": 48}),
            r"last_hidden_state is \[32, 128\], the manifest needs \[48, -1\]",
        ),
        (
            lambda m: m["noise_schedule"].update(use_dynamic_shifting=True, max_image_seq_len=256),
            "max_image_seq_len is not above base_image_seq_len",
        ),
        (
            lambda m: m.update(inputs=STABLE_DIFFUSION_INPUTS | {"guidance": "scalar:guidance"}),
            "denoiser: config.pbtxt: guidance is missing",
        ),
        (lambda m: m["latent"].update(height=16), "denoiser: config.pbtxt: sample is"),
        (lambda m: m["linear_preview"]["weights"][0].pop(), "differ in length"),
        (lambda m: m["latent"].update(scaling_factor=float("nan")), "latent.scaling_factor"),
        (lambda m: m["limits"].update(max_guidance_scale=1.0), "defaults.guidance_scale: above"),
        (lambda m: m.update(revision="2.0"), "icons/2.0 is not the folder's"),
        (lambda m: m["components"]["decoder"].update(model="../elsewhere"), "components.decoder.model"),
        (lambda m: m.update(inputs={"sample": "noise"}), "inputs.sample"),
        (
            lambda m: m.update(inputs=STABLE_DIFFUSION_INPUTS | {"text_embeds": "encoder:pooled"}),
            "inputs: the text encoder has no output pooled; it has last_hidden_state, pooled_output",
        ),
        (
            lambda m: m.update(inputs=STABLE_DIFFUSION_INPUTS | {"time_ids": "size_ids"}),
            "denoiser: config.pbtxt: time_ids is missing",
        ),
        (
            lambda m: m.update(inputs=STABLE_DIFFUSION_INPUTS | {"encoder_hidden_states": "encoder:pooled_output"}),
            r"encoder_hidden_states is \[32, 128\], the manifest needs \[128\]",
        ),
        (
            lambda m: m.update(inputs={"sample": "latent", "timestep": "timestep"}),
            "inputs: encoder_hidden_states of the denoiser is bound to nothing",
        ),
    ],
)
def test_a_manifest_that_is_not_right_says_what(tmp_path, change, named):
    shutil.copytree(MODELS, tmp_path / "models")
    [path] = (tmp_path / "models").glob("pipelines/icons/*/pipeline.json")
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(catalog.ManifestError, match=named):
        catalog.load(tmp_path / "models")


def test_inputs_decide_pixels_and_the_usual_ones_may_be_left_out(icons):
    """A manifest without named inputs has the same digest as before these existed, so that caches stay valid."""
    manifest = icons.get("").manifest
    spelled = manifest.model_copy(update={"inputs": dict(reversed(STABLE_DIFFUSION_INPUTS.items()))})
    assert assemble(spelled, {}).digest == icons.get("").digest
    other = manifest.model_copy(update={"inputs": STABLE_DIFFUSION_INPUTS | {"pooled": "encoder:pooled_output"}})
    assert assemble(other, {}).digest != icons.get("").digest
    assert assemble(other, {}).embedding_outputs == ("last_hidden_state", "pooled_output")


def test_of_several_revisions_the_newest_is_served(tmp_path):
    """1.10 is newer than 1.9."""
    shutil.copytree(MODELS, tmp_path / "models")
    [path] = (tmp_path / "models").glob("pipelines/icons/*/pipeline.json")
    for revision in ("1.9", "1.10"):
        shutil.copytree(path.parent, path.parents[1] / revision)
        manifest = json.loads(path.read_text()) | {"revision": revision}
        (path.parents[1] / revision / "pipeline.json").write_text(json.dumps(manifest))
    assert catalog.load(tmp_path / "models").get("icons").manifest.revision == "1.10"


def test_a_model_that_takes_no_batches_is_refused(tmp_path):
    shutil.copytree(MODELS, tmp_path / "models")
    config = tmp_path / "models" / "repository" / "icons_decoder" / "config.pbtxt"
    config.write_text(config.read_text().replace("max_batch_size: 16", "max_batch_size: 0"))
    with pytest.raises(catalog.ManifestError, match=r"components.decoder: max_batch_size"):
        catalog.load(tmp_path / "models")


@pytest.mark.parametrize(("text", "number"), [("max 100000\n", None), ("50000 100000\n", 1), ("100000 100000\n", 1)])
def test_instances_respect_the_quota_of_the_container(tmp_path, text, number):
    (tmp_path / "cpu.max").write_text(text)
    assert cores.num_cores(tmp_path / "cpu.max") == (number or cores.num_cores(tmp_path / "none"))


def test_batches_are_verified_up_to_the_bound_of_the_model():
    assert [verification.sizes(bound) for bound in (1, 6, 16)] == [[1], [1, 2, 4, 6], [1, 2, 4, 8, 16]]
    assert verification.sizes(1000)[-1] == verification.WARM_UP_ROWS[-1]


@pytest.mark.parametrize("behind", [1, 2])
async def test_a_runtime_that_is_answers_behind_never_has_the_right_fingerprint(behind):
    specs = [verification.InputSpec("latent", (4,))]
    queued = [{"image": np.zeros((3, 4), np.float32)}] * behind

    async def right(inputs):
        return {"image": 2 * inputs["latent"]}

    async def late(inputs):
        queued.append(await right(inputs))
        return queued.pop(0)

    expected = await verification.fingerprint(right, specs)
    for _ in range(3):  # from the second on, all that it answers are answers to the same questions
        assert await verification.fingerprint(late, specs) != expected


def test_a_broken_model_file_is_named(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"not onnx")
    with pytest.raises(catalog.ManifestError, match=r"model\.onnx"):
        onnx._session(tmp_path / "model.onnx")


def test_no_models_is_one_clear_error(tmp_path):
    with pytest.raises(catalog.ManifestError, match=r"has no model: .*set models_dir \(--models-dir, "):
        catalog.load(tmp_path)


def test_prompts_are_cut_to_the_context_and_say_so(icons):
    tokenizer = icons.get("icons").tokenizer
    short, long = tokenizer.encode("A Red potion"), tokenizer.encode("red potion " * 60)
    assert len(short.ids) == len(long.ids) == tokenizer.max_tokens
    assert not short.truncated
    assert long.truncated
    assert long.num_tokens > tokenizer.max_tokens
    assert short.ids == tokenizer.encode("a red potion").ids
    assert long.ids[0] == short.ids[0]


def test_a_second_tokenizer_decides_pixels(icons):
    manifest = icons.get("").manifest
    pair = manifest.model_copy(update={"second_tokenizer": manifest.tokenizer})
    assert assemble(pair, {}).digest != icons.get("").digest


def test_the_ids_of_two_tokenizers_stand_one_after_the_other(icons):
    """SDXL's tokenizers pad differently, and the second one pads with a real token."""
    at = icons.get("icons").manifest.tokenizer
    [file] = MODELS.glob(f"pipelines/icons/*/{at.file}")
    first = Tokenizer(file, at.max_tokens, at.pad_id, at.bos_id, at.eos_id)
    second = Tokenizer(file, at.max_tokens, 7, at.bos_id, at.eos_id)
    pair = TokenizerGroup(first, second)
    assert pair.max_tokens == at.max_tokens
    short, long = pair.encode("a red potion"), pair.encode("red potion " * 60)
    assert short.ids == first.encode("a red potion").ids + second.encode("a red potion").ids
    assert short.ids[-1] == 7
    assert (short.num_tokens, short.truncated) == (first.encode("a red potion").num_tokens, False)
    assert long.truncated


def test_of_tokenizers_with_other_contexts_the_longest_says_what_is_read(icons):
    """FLUX: CLIP reads 77 tokens and T5, which has no begin token, reads more."""
    at = icons.get("icons").manifest.tokenizer
    [file] = MODELS.glob(f"pipelines/icons/*/{at.file}")
    clip, t5 = Tokenizer(file, 6, at.pad_id, at.bos_id, at.eos_id), Tokenizer(file, 12, 7, None, at.eos_id)
    group = TokenizerGroup(clip, t5)
    words = clip.encode("red potion " * 9).ids[1:3]
    text = group.encode("red potion " * 4)
    assert text.ids == (at.bos_id, *words * 2, at.eos_id, *words * 4, at.eos_id, 7, 7, 7)
    assert (group.max_tokens, text.num_tokens, text.truncated) == (12, 9, False)
    long = group.encode("red potion " * 6)
    assert (long.num_tokens, long.truncated, long.ids[-1]) == (13, True, at.eos_id)


def test_a_template_stands_around_prompts_and_is_cut_with_them(icons):
    """Z-Image: prompts are messages to a chat model, without a begin token, and the end token is part of the template."""
    at = icons.get("icons").manifest.tokenizer
    [file] = MODELS.glob(f"pipelines/icons/*/{at.file}")
    plain = Tokenizer(file, 16, at.pad_id, at.bos_id, at.eos_id)
    before, potion, after = (plain.encode(text).ids[1] for text in ("a", "potion", "sword"))
    made = Tokenizer(file, 5, 7, None, after, ("a ", " sword"))
    assert made.encode("potion").ids == (before, potion, after, 7, 7)
    assert made.encode("").ids == (before, after, 7, 7, 7)
    full = made.encode("potion " * 3)
    assert (full.ids, full.num_tokens, full.truncated) == ((before, potion, potion, potion, after), 5, False)
    cut = made.encode("potion " * 4)
    assert (cut.ids, cut.num_tokens, cut.truncated) == ((before, potion, potion, potion, potion), 6, True)


def test_a_template_around_prompts_decides_pixels(icons):
    manifest = icons.get("").manifest
    digests = {icons.get("").digest}
    for before in ("a", "the"):
        template = PromptTemplate(before=before, after="sword", num_tokens_before=1)
        changed = manifest.tokenizer.model_copy(update={"template": template})
        digests.add(assemble(manifest.model_copy(update={"tokenizer": changed}), {}).digest)
    assert len(digests) == 3


def test_prompts_of_all_lengths_are_verified():
    """Masks of a denoiser that reads each prompt without its padding; the first prompt is as long as the context."""
    made = verification.example([verification.InputSpec(ENCODER_MASK_INPUT, (512,))], 16)[ENCODER_MASK_INPUT]
    lengths = made.sum(axis=1).astype(int)
    assert np.array_equal(made, np.arange(512) < lengths[:, None])
    assert lengths[0] == 512 and lengths.min() >= 1 and len(set(lengths)) > 8


def test_a_shift_by_size_decides_pixels_and_other_schedules_keep_their_digest(icons):
    manifest = icons.get("").manifest
    changed = {"use_dynamic_shifting": True, "max_shift": 1.2}
    other = manifest.model_copy(update={"noise_schedule": manifest.noise_schedule.model_copy(update=changed)})
    assert assemble(other, {}).digest == icons.get("").digest, "no sampler of it shifts"
    flow, shifted = (at.model_copy(update={"prediction_type": "flow"}) for at in (manifest, other))
    assert assemble(flow, {}).digest != assemble(shifted, {}).digest


async def test_rows_have_the_same_bits_in_every_verified_batch(icons):
    runtime = OnnxRuntime(icons, num_instances=2)
    await runtime.start()
    try:
        rows = runtime.max_rows("icons", Component.DENOISER)
        assert rows >= 8
        pipeline = icons.get("icons")
        rng = np.random.default_rng(3)
        size = pipeline.manifest.sizes[0]
        shape = pipeline.latent_shape(size.width_px, size.height_px)
        ids = np.tile(np.array(pipeline.tokenizer.encode("a blue sword").ids), (rows, 1))
        context = (await runtime.run(0, "icons", Component.TEXT_ENCODER, {"input_ids": ids}))["last_hidden_state"]
        inputs = {
            "sample": rng.standard_normal((rows, *shape), dtype=np.float32),
            "timestep": rng.uniform(0, 999, rows).astype(np.float32),
            "encoder_hidden_states": context,
        }
        batch = (await runtime.run(0, "icons", Component.DENOISER, inputs))["prediction"]
        for row in (0, rows // 2, rows - 1):
            single = {name: array[row : row + 1] for name, array in inputs.items()}
            alone = (await runtime.run(1, "icons", Component.DENOISER, single))["prediction"]
            assert np.array_equal(batch[row], alone[0])
        with pytest.raises(RuntimeFailure) as caught:
            await runtime.run(0, "icons", Component.DENOISER, {"sample": inputs["sample"]})
        assert not caught.value.retryable
    finally:
        await runtime.close()


async def test_the_simulated_runtime_says_so_and_keeps_its_curve():
    runtime, pipeline = SimulatedRuntime(1, 0.002, 0.001), simulated_pipeline()
    assert "simulated" in runtime.name
    assert "SIMULATED" in pipeline.manifest.description
    assert runtime.cost("simulated", Component.DENOISER).at(10) == pytest.approx(0.012)
    results = await runtime.run(0, "simulated", Component.DECODER, {"latent": np.zeros((3, 4, 16, 16), np.float32)})
    assert results["image"].shape == (3, 3, 128, 128)


def test_costs_between_and_beyond_the_measured_ones():
    curve = CostCurve((1, 2, 4), (1.0, 1.5, 2.5))
    assert [curve.at(rows) for rows in (1, 2, 3, 4, 6)] == [1.0, 1.5, 2.0, 2.5, 3.5]
    assert CostCurve((1,), (2.0,)).at(3) == 6.0


async def test_a_component_that_cannot_be_run_keeps_the_server_from_starting(icons, monkeypatch):
    def fail(_session, _inputs):
        raise RuntimeFailure("no such operator", retryable=False)

    monkeypatch.setattr(onnx, "_call", fail)
    runtime = OnnxRuntime(icons, num_instances=1)
    with pytest.raises(RuntimeStartError, match=r"model\.onnx: no such operator"):
        await runtime.start()
    await runtime.close()


async def test_a_model_with_an_open_dimension_is_refused_by_its_name(icons, monkeypatch):
    monkeypatch.setattr(
        onnx.onnxruntime.InferenceSession,
        "get_inputs",
        lambda _: [SimpleNamespace(name="sample", shape=["b", 4, "h"], type="tensor(float)")],
    )
    runtime = OnnxRuntime(icons, num_instances=1)
    with pytest.raises(RuntimeStartError, match="sample has an open dimension"):
        await runtime.start()
    await runtime.close()


async def noisy_by_rows(inputs):
    """Computes like torch: the result of a row depends on its batch, by 1e-6 of the largest value."""
    rows = len(inputs["latent"])
    return {"image": 2 * inputs["latent"] * np.float32(1 + (rows > 1) * 1e-6)}


@pytest.mark.parametrize(("tolerance", "offered"), [(0.0, (1,)), (1e-7, (1,)), (1e-5, (1, 2, 4, 8))])
async def test_batches_are_offered_that_are_within_the_tolerance_of_single_rows(tolerance, offered):
    specs = [verification.InputSpec("latent", (4,))]
    curve = await verification.warm_up_sizes(noisy_by_rows, [specs], 8, tolerance)
    assert curve is not None and curve.rows == offered


async def test_a_row_alone_must_give_the_same_bits_again_whatever_the_tolerance():
    calls = iter(range(100))

    async def drifts(inputs):
        return {"image": inputs["latent"] * np.float32(1 + 1e-6 * next(calls))}

    assert await verification.warm_up(drifts, [verification.InputSpec("latent", (4,))], 8, 0.1) is None


async def test_a_batch_that_is_no_number_is_within_no_tolerance():
    async def call(inputs):
        return {"image": inputs["latent"] * np.float32(1 if len(inputs["latent"]) == 1 else np.nan)}

    curve = await verification.warm_up(call, [verification.InputSpec("latent", (4,))], 8, 0.1)
    assert curve is not None and curve.rows == (1,)


def test_the_name_of_torchs_numerics_tells_all_that_decides_bits():
    names = [
        TorchOptions(batch_tolerance=tolerance, dtype=dtype).numerics_id(version, device)
        for tolerance in (0.0, 1e-5, 2e-5)
        for dtype in ("float32", "bfloat16")
        for version in ("2.13.0", "2.14.0")
        for device in ("cpu-avx2", "cpu-avx512f")
    ]
    assert len(set(names)) == len(names)
    assert "-exact-" in names[0]
    assert [TorchOptions(dtype=dtype).tolerance for dtype in ("float32", "float16", "bfloat16")] == [1e-5, 0.01, 0.05]


def test_a_model_without_files_for_torch_is_left_out_with_the_reason():
    reason = "exported without files for the torch runtime: export it with --format torch or both"
    with pytest.raises(catalog.ManifestError, match=reason):
        catalog.load(MODELS, weights="torch")


def test_torch_that_is_not_installed_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("torch", "diffusers") else object())
    with pytest.raises(
        RuntimeStartError,
        match=r"^torch, diffusers not installed: in a clone of Safelight, pip install -e clients/python -e '\.\[torch\]'",
    ):
        build_runtime(load(runtime="torch", models_dir=MODELS))


def test_guidance_scales_are_verified_that_half_precision_holds():
    """Times 1000, as FLUX takes them."""
    made = verification.example([verification.InputSpec(name, ()) for name in ("guidance", "timestep")], 64)
    assert np.isfinite(np.float16(1000 * made["guidance"])).all()
    assert made["guidance"].max() > 10
    assert made["timestep"].max() > 900
