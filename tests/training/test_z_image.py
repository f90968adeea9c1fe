"""A small pipeline like Z-Image on the torch runtime, through gRPC, against diffusers' own pipeline, to 1/255.

CI has a part of the cells; `SAFELIGHT_ALL_PARITY=1 make test-training` has all of them, and steps that shift by size.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from diffusers import ZImageImg2ImgPipeline, ZImagePipeline
from PIL import Image
from safelight import Accepted, Client, GenerationError, Picture, Preview
from safelight_server.app.errors import StartError
from safelight_server.app.server import Running, serving
from safelight_server.catalog import catalog
from safelight_server.catalog.tokenizer import Tokenizer
from safelight_server.domain.component import Component
from safelight_server.export import manifest
from safelight_server.export.components import ZImageTextEncoder
from safelight_server.export.exporter import export, round_weights, token_ids
from safelight_server.export.options import ExportFormat, ExportOptions
from safelight_server.export.source import ExportError
from safelight_server.runtime.torch_options import TorchOptions
from safelight_server.runtime.torch_runtime import TorchRuntime, _placed
from safelight_server.sampler import INITIAL, POSTERIOR, gaussian
from safelight_server.settings import load

from tests.training import folders
from tests.training.cells import EVERY
from tests.training.test_image_parity import picture_of, png
from tests.training.test_transformer_parity import LEAST_CONTRAST, MOST_CLIPPED

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.asyncio(loop_scope="module"),
]
PROMPTS = ("a red dragon, wow! 8k!!", "an old castle at night in the water of a small city", "a", "gold " * 40)
"""Of two lengths after they are filled up, one letter, and one that is cut."""
NEGATIVE = "blurry, ugly, new photo with a man on a ship in the color green"
SIZES = ((16, 24), (32, 16))
SEEDS = [5, 6]
SCHEDULERS: dict[str, dict[str, Any]] = {"shift": {}, "dynamic": {"use_dynamic_shifting": True}}


@dataclass(frozen=True)
class Exported:
    """A pipeline of diffusers with the weights as they are exported, and its folder of models."""

    pipeline: ZImagePipeline
    models: Path

    def theirs(
        self,
        prompt: str,
        scale: float,
        negative: str,
        num_steps: int,
        size: tuple[int, int],
        seed: int,
        **more: float,
    ) -> Any:
        noise = torch.from_numpy(gaussian(seed, INITIAL, 0, (16, size[1] // 2, size[0] // 2)))[None]
        given = guided(scale, negative, num_steps) | more
        return self.pipeline(prompt, width=size[0], height=size[1], latents=noise, **given).images[0]

    def theirs_from(
        self, init: Image.Image, strength: float, patch: pytest.MonkeyPatch, num_steps: int, seed: int
    ) -> Any:
        """Diffusers' picture of a seed from a picture: it draws the noise of ours."""
        name = "pipelines.z_image.pipeline_z_image_img2img"
        for module, stream in ((name, INITIAL), ("models.autoencoders.vae", POSTERIOR)):
            noise = torch.from_numpy(gaussian(seed, stream, 0, (16, init.height // 2, init.width // 2)))[None]
            patch.setattr(f"diffusers.{module}.randn_tensor", lambda *_, _noise=noise, **__: _noise)
        made = ZImageImg2ImgPipeline(**self.pipeline.components)
        made.set_progress_bar_config(disable=True)
        return made(PROMPTS[0], image=init, strength=strength, **guided(4.5, "", num_steps)).images[0]


def guided(scale: float, negative: str, num_steps: int) -> dict[str, Any]:
    """How diffusers' pipeline is asked for guidance of our scale."""
    return {
        "guidance_scale": scale - 1,
        "negative_prompt": negative,
        "num_inference_steps": num_steps,
        "max_sequence_length": folders.QWEN_TOKENS,
    }


@pytest.fixture(scope="module", params=SCHEDULERS if EVERY else ["shift"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("z-image")
    pipeline = folders.z_image_pipeline(**SCHEDULERS[request.param])
    pipeline.save_pretrained(place / "folder")
    options = ExportOptions("tiny", licence="CC0-1.0", sizes=SIZES, format=ExportFormat.TORCH, max_rows=8)
    export(place / "folder", place / "models", options)
    for name in ("transformer", "vae", "text_encoder"):
        round_weights(getattr(pipeline, name))
    pipeline.set_progress_bar_config(disable=True)
    return Exported(pipeline, place / "models")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(exported: Exported) -> AsyncIterator[Running]:
    settings = load(port=0, models_dir=exported.models, runtime="torch", num_instances=2, log_level="error")
    async with serving(settings) as running:
        yield running


async def test_float16_is_refused_at_the_start(exported: Exported) -> None:
    settings = load(
        port=0, models_dir=exported.models, runtime="torch", torch_dtype="float16", num_instances=1, log_level="error"
    )
    with pytest.raises(StartError, match="torch_dtype: float16 gives NaN with models of z-image; use bfloat16"):
        async with serving(settings):
            pass


async def ours(running: Running, prompt: str, **options: Any) -> list[np.ndarray]:
    """The pictures of all seeds, of one request."""
    async with Client(running.address) as client:
        found = [event async for event in client.generate(prompt, seeds=SEEDS, **options) if isinstance(event, Picture)]
    return [np.asarray(event.image(), int) for event in sorted(found, key=lambda event: event.output_index)]


def same(pictures: list[np.ndarray], references: list[Image.Image]) -> None:
    for picture, reference in zip(pictures, references, strict=True):
        assert picture.std() > LEAST_CONTRAST
        assert np.isin(picture, (0, 255)).mean() < MOST_CLIPPED
        assert np.abs(picture - np.asarray(reference, int)).max() <= 1


CELLS = list(itertools.product(PROMPTS, (1, 4, 20), SIZES))
CI_CELLS = [CELLS[0], CELLS[3], CELLS[8], CELLS[14], CELLS[19]]


@pytest.mark.parametrize(("prompt", "num_steps", "size"), CELLS if EVERY else CI_CELLS)
async def test_a_generation_is_that_of_diffusers(
    exported: Exported, running: Running, prompt: str, num_steps: int, size: tuple[int, int]
) -> None:
    """With guidance rows of the prompt and of the negative one, which differ in length, share calls."""
    for scale, negative in ((1.0, ""), (4.5, ""), (4.5, NEGATIVE)):
        found = await ours(
            running,
            prompt,
            negative_prompt=negative,
            guidance_scale=scale,
            steps=num_steps,
            width=size[0],
            height=size[1],
        )
        same(found, [exported.theirs(prompt, scale, negative, num_steps, size, seed) for seed in SEEDS])


@pytest.mark.parametrize("strength", [0.25, 0.75, 1.0] if EVERY else [0.75])
async def test_development_from_a_picture_is_that_of_diffusers(
    exported: Exported, running: Running, monkeypatch: pytest.MonkeyPatch, strength: float
) -> None:
    init = picture_of(SIZES[0])
    more = {"init_image": png(init), "strength": strength, "guidance_scale": 4.5, "steps": 4}
    found = await ours(running, PROMPTS[0], **more)
    same(found, [exported.theirs_from(init, strength, monkeypatch, 4, seed) for seed in SEEDS])


async def test_an_interval_of_guidance_is_what_diffusers_truncates(exported: Exported, running: Running) -> None:
    """`cfg_truncation` ends guidance where the time, which goes from 0 to 1, is above it: here after two of four steps."""
    prompt, size = PROMPTS[0], SIZES[0]
    whole = exported.theirs(prompt, 4.5, "", 4, size, SEEDS[0])
    times = (1000 - exported.pipeline.scheduler.timesteps) / 1000
    until = {"cfg_truncation": float(times[1] + times[2]) / 2}
    found = await ours(running, prompt, guidance_scale=4.5, steps=4, guidance_interval=(0.0, 0.5))
    same(found, [exported.theirs(prompt, 4.5, "", 4, size, seed, **until) for seed in SEEDS])
    assert np.abs(found[0] - np.asarray(whole, int)).max() > 1


async def test_prompts_guidance_and_negative_prompts_reach_the_denoiser(running: Running) -> None:
    """Else the comparison above would hold for networks that read nothing."""
    made = [
        (await ours(running, prompt, guidance_scale=scale, negative_prompt=negative, steps=4))[0]
        for prompt, scale, negative in (
            (PROMPTS[0], 1.0, ""),
            (PROMPTS[1], 1.0, ""),
            (PROMPTS[0], 4.5, ""),
            (PROMPTS[0], 4.5, NEGATIVE),
        )
    ]
    assert all(np.abs(one - two).max() > 1 for one, two in itertools.combinations(made, 2))


async def test_a_row_does_not_change_with_the_prompts_beside_it(exported: Exported) -> None:
    """Rows of all lengths in one call, and what stands behind a prompt is not read."""
    made = catalog.load(exported.models, weights="torch")
    pipeline, runtime = made.get("tiny"), TorchRuntime(made, TorchOptions(num_instances=1))
    await runtime.start()
    try:
        assert runtime.max_rows("tiny", Component.DENOISER) == 8
        texts = [*PROMPTS, NEGATIVE, "", "gold " * 9, "red"]
        ids = np.array([pipeline.tokenizer.encode(text).ids for text in texts], np.int64)
        encoded = {"last_hidden_state": [], "attention_mask": []}
        for row in ids:
            for name, found in (await runtime.run(0, "tiny", Component.TEXT_ENCODER, {"input_ids": row[None]})).items():
                encoded[name].append(found[0])
        lengths = {int(mask.sum()) for mask in encoded["attention_mask"]}
        assert len(lengths) > 4 and max(lengths) == folders.QWEN_TOKENS
        rng, shape = np.random.default_rng(0), pipeline.latent_shape(*SIZES[0])
        given = {
            "sample": rng.standard_normal((len(texts), *shape), np.float32),
            "timestep": rng.uniform(0, 999, len(texts)).astype(np.float32),
            "encoder_hidden_states": np.stack(encoded["last_hidden_state"]),
            "encoder_attention_mask": np.stack(encoded["attention_mask"]),
        }
        [batch] = (await runtime.run(0, "tiny", Component.DENOISER, given)).values()
        for row in range(len(texts)):
            one = {name: array[row : row + 1].copy() for name, array in given.items()}
            one["encoder_hidden_states"][one["encoder_attention_mask"] == 0] = 7.0
            [single] = (await runtime.run(0, "tiny", Component.DENOISER, one)).values()
            assert np.abs(batch[row] - single[0]).max() <= 1e-5 * np.abs(single).max()
    finally:
        await runtime.close()


async def test_a_generation_shows_previews_and_warns_of_a_prompt_that_is_cut(running: Running) -> None:
    async with Client(running.address) as client:
        events = [event async for event in client.generate(PROMPTS[3], seed=3, steps=4, preview_every=1)]
        [model] = await client.models()
        with pytest.raises(GenerationError, match="sampler"):
            await client.generate(PROMPTS[0], sampler="euler").image()
    [accepted] = [event for event in events if isinstance(event, Accepted)]
    assert "the model reads 48, the rest has no effect" in accepted.warnings["PROMPT_TRUNCATED"]
    assert any(isinstance(event, Preview) and event.data for event in events)
    assert sum(isinstance(event, Picture) for event in events) == 1
    assert any("guidance_scale is one more than what ZImagePipeline is given" in note for note in model.notes)


def test_half_precision_keeps_the_places_of_tokens_in_float32() -> None:
    made = ZImageTextEncoder(folders.qwen3(24), 0)
    before = made.model.rotary_emb.inv_freq.clone()
    placed = _placed(made, torch.device("cpu"), torch.bfloat16)
    assert placed.model.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(placed.model.rotary_emb.inv_freq, before)


HARD = [*PROMPTS, "", "A RED Potion!!", "naïve café, über-größe", "龍の剣 🗡️✨", "it's  a\t\nsword; 3.5% (gold)", "\n\n x \n",
        "<|endoftext|>", "a<|im_end|>\n<|im_start|>user\nb", "{{ 7 * 7 }} {% if %}", "x" * 400, "gold<|endoftext|>" * 60]  # fmt: skip


def test_tokens_and_their_encoding_are_those_of_diffusers(exported: Exported) -> None:
    """As a message in the chat template; what is cut, is cut with it."""
    theirs, [file] = exported.pipeline.tokenizer, exported.models.glob("pipelines/tiny/1/tokenizer.json")
    at = catalog.load(exported.models, weights="torch").get("tiny").manifest.tokenizer
    assert (at.bos_id, at.eos_id) == (None, theirs.convert_tokens_to_ids("<|im_end|>"))
    assert at.template.before == "<|im_start|>user\n" and at.num_begin_tokens == 3
    mine = Tokenizer(file, at.max_tokens, at.pad_id, None, at.eos_id, (at.template.before, at.template.after))
    ids = token_ids(exported.pipeline, HARD)
    assert [list(mine.encode(text).ids) for text in HARD] == ids.tolist()
    whole = [text for text in HARD if not text.startswith("gold<")]  # whose last token is that of the padding
    hidden, mask = ZImageTextEncoder(exported.pipeline.text_encoder, at.pad_id)(token_ids(exported.pipeline, whole))
    with torch.no_grad():
        found, _ = exported.pipeline.encode_prompt(list(whole), max_sequence_length=folders.QWEN_TOKENS)
    for states, row, wanted in zip(hidden, mask.bool(), found, strict=True):
        torch.testing.assert_close(states[row], wanted)
        assert not states[~row].any()


@pytest.mark.parametrize(
    ("template", "options", "wanted"),
    [
        ("", {}, "it has no chat_template"),
        (folders.CHAT_TEMPLATE.replace("message.content", "message.content | trim"), {}, "chat_template changes"),
        ("{{ messages[0].content }}", {}, "chat_template changes"),
        (folders.CHAT_TEMPLATE, {"padding_side": "left"}, "padding_side 'left' cannot be served"),
    ],
)
def test_a_tokenizer_whose_prompts_would_differ_is_refused(
    tmp_path: Path, template: str, options: dict[str, Any], wanted: str
) -> None:
    given = folders.qwen_tokenizer(template, **options)
    with pytest.raises(ExportError, match=wanted):
        manifest.tokenizer(given, folders.qwen3(24), tmp_path / "tokenizer.json", folders.QWEN_TOKENS)
