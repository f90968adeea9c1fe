"""Small random pipelines of each family, as diffusers saves them, with CLIP's real vocabulary."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

START, END = "<|startoftext|>", "<|endoftext|>"
NUM_MERGES = 49152 - 256 - 2
MAX_TOKENS = 77


def clip_tokenizer(pad: str = END) -> CLIPTokenizer:
    """The tokenizer of Stable Diffusion 1.5 (SDXL's second one pads with "!"), from the file of byte pairs that the package open_clip has."""
    [package] = importlib.util.find_spec("open_clip").submodule_search_locations
    with gzip.open(Path(package) / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as stream:
        merges = [tuple(line.split()) for line in stream.read().split("\n")[1 : NUM_MERGES + 1]]
    letters = byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges), START, END]
    vocab = {word: number for number, word in enumerate(words)}
    made = CLIPTokenizer(vocab=vocab, merges=merges, unk_token=END, bos_token=START, eos_token=END, pad_token=pad)
    made.model_max_length = MAX_TOKENS
    return made


def byte_letters() -> list[str]:
    """The letters that stand for the 256 bytes, as in GPT-2: printable ones for themselves, first."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + number) for number in range(len(others))]


def unet(**changes: Any) -> UNet2DConditionModel:
    """A denoiser of 4 channels at 4 x 4, seeded."""
    torch.manual_seed(5)
    shape: dict[str, Any] = {
        "sample_size": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(shape | changes)).eval()


def control_network(unet: UNet2DConditionModel, seed: int) -> ControlNetModel:
    """A control network of a UNet's shape. What is zero in a new one is random, else it would add nothing."""
    made = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in made.named_parameters():
        if name.startswith("controlnet_"):
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return made


def vae() -> AutoencoderKL:
    """An autoencoder of factor 2, seeded."""
    torch.manual_seed(6)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
    ).eval()


def text_encoder() -> CLIPTextModel:
    """A text encoder of width 16, seeded."""
    torch.manual_seed(7)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=49406,
            eos_token_id=49407,
            pad_token_id=49407,
        )
    ).eval()


def pipeline(**parts: Any) -> StableDiffusionPipeline:
    """A whole pipeline like Stable Diffusion 1.5's, with its scheduler; `parts` replace components."""
    scheduler = PNDMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, steps_offset=1
    )
    whole: dict[str, Any] = {
        "vae": vae(),
        "text_encoder": text_encoder(),
        "tokenizer": clip_tokenizer(),
        "unet": unet(),
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    return StableDiffusionPipeline(**(whole | parts))


SDXL_SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
"""As SDXL's own folder has it: with keys of other classes, which `from_config` passes on to these."""


def inpainting_pipeline(whole: StableDiffusionPipeline) -> StableDiffusionInpaintPipeline:
    """The same networks with a UNet of 9 channels: the latent's, the mask, and those of a picture."""
    torch.manual_seed(9)
    return StableDiffusionInpaintPipeline(
        **whole.components | {"unet": unet(in_channels=9)}, requires_safety_checker=False
    )


def sdxl_text_config(width: int, projection: int) -> CLIPTextConfig:
    """Two layers, and the special tokens that SDXL's files name, which are not those of its tokenizers."""
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )


def sdxl_pipeline(latent: tuple[int, int] = (4, 4), **options: Any) -> StableDiffusionXLPipeline:
    """A whole pipeline like SDXL's, trained at a latent of (h, w), with its scheduler; `options` are its own."""
    denoiser = unet(
        sample_size=latent,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        cross_attention_dim=16 + 24,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 6 * 8,
    )
    autoencoder = vae()
    autoencoder.register_to_config(scaling_factor=0.13025, force_upcast=True)
    torch.manual_seed(7)
    return StableDiffusionXLPipeline(
        vae=autoencoder,
        text_encoder=CLIPTextModel(sdxl_text_config(16, 16)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(sdxl_text_config(24, 20)).eval(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(pad="!"),
        unet=denoiser,
        scheduler=EulerDiscreteScheduler.from_config(SDXL_SCHEDULER),
        add_watermarker=False,
        **options,
    )


WORDS = [
    "a",
    "the",
    "of",
    "in",
    "on",
    "with",
    "and",
    "red",
    "blue",
    "green",
    "old",
    "new",
    "potion",
    "dragon",
    "sword",
    "castle",
    "ship",
    "cat",
    "man",
    "city",
    "wow",
    "blurry",
    "ugly",
    "photo",
    "at",
    "night",
    "water",
    "color",
    "small",
    "sharp",
    "hidden",
    "gold",
]
FLUX_SCHEDULER = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
SCHNELL_SCHEDULER = {"shift": 1.0, "use_dynamic_shifting": False}
T5_TOKENS = 24


def t5_tokenizer() -> T5Tokenizer:
    """A tokenizer of T5's kind: pieces of a few words, and all letters alone."""
    pieces = [f"▁{word}" for word in WORDS] + [word[at:] for word in WORDS for at in (1, 2) if len(word) > at + 1]
    letters = ["▁", *map(chr, range(ord("!"), ord("~") + 1))]
    special = ["<pad>", "</s>", "<unk>"]
    vocab = [(piece, 0.0) for piece in special]
    vocab += [(piece, -3.0 - number / 100) for number, piece in enumerate(dict.fromkeys(pieces))]
    vocab += [(letter, -9.0) for letter in letters if letter not in pieces]
    made = T5Tokenizer(vocab=vocab, extra_ids=0)
    made.model_max_length = T5_TOKENS
    return made


def t5_encoder(width: int) -> T5EncoderModel:
    """An encoder of that width, seeded, with a vocabulary that has room for any example's ids."""
    torch.manual_seed(8)
    config = T5Config(
        vocab_size=512,
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        initializer_factor=0.5,
    )
    return T5EncoderModel(config).eval()


def wide_vae(**changes: Any) -> AutoencoderKL:
    """An autoencoder of 16 channels and factor 2, seeded, whose pictures have contrast."""
    torch.manual_seed(6)
    made = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **({"scaling_factor": 0.3611, "shift_factor": 0.1159} | changes),
    ).eval()
    made.decoder.conv_out.weight.data *= 1.5
    return made


def flux_pipeline(*, is_distilled: bool) -> FluxPipeline:
    """A whole pipeline like FLUX.1-dev's, or like FLUX.1-schnell's where it is not distilled for guidance."""
    clip = text_encoder()
    torch.manual_seed(9)
    denoiser = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        guidance_embeds=is_distilled,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**(FLUX_SCHEDULER if is_distilled else SCHNELL_SCHEDULER)),
        vae=wide_vae(),
        text_encoder=clip,
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(24),
        tokenizer_2=t5_tokenizer(),
        transformer=denoiser,
    )


def sd3_pipeline(**scheduler: Any) -> StableDiffusion3Pipeline:
    """A whole pipeline like Stable Diffusion 3.5's, trained at a latent of 8 x 8; `scheduler` has options of its own."""
    torch.manual_seed(9)
    denoiser = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=48,
        caption_projection_dim=32,
        pooled_projection_dim=16 + 20,
        out_channels=16,
        pos_embed_max_size=12,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()
    torch.manual_seed(7)
    return StableDiffusion3Pipeline(
        transformer=denoiser,
        scheduler=FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | scheduler)),
        vae=wide_vae(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=CLIPTextModelWithProjection(sdxl_text_config(16, 16)).eval(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(sdxl_text_config(24, 20)).eval(),
        tokenizer_2=clip_tokenizer(pad="!"),
        text_encoder_3=t5_encoder(48),
        tokenizer_3=t5_tokenizer(),
    )


QWEN_TOKENS = 48
"""More than 32, so that prompts are filled up to 32 or to 64 tokens."""
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}{%- endif %}"
)
"""What is left of Qwen3's for a message of a user."""


def qwen_tokenizer(chat_template: str = CHAT_TEMPLATE, **options: Any) -> Qwen2Tokenizer:
    """A tokenizer of Qwen's kind: all bytes, and a few words."""
    letters = byte_letters()
    vocab = {letter: number for number, letter in enumerate(letters)}
    merges = []
    for word in dict.fromkeys([*WORDS, "user", "assistant", "system"]):
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab |= {token: len(vocab) + number for number, token in enumerate(special)}
    made = Qwen2Tokenizer(
        vocab=vocab, merges=merges, eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>"], **options
    )
    made.chat_template = chat_template
    made.model_max_length = QWEN_TOKENS
    return made


def qwen3(width: int, vocab_size: int = 512) -> Qwen3Model:
    """A text encoder of that width, seeded, of three layers, the last of which is not used."""
    torch.manual_seed(8)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        initializer_range=0.3,
    )
    return Qwen3Model(config).eval()


def z_image_pipeline(**scheduler: Any) -> ZImagePipeline:
    """A whole pipeline like Z-Image's; `scheduler` has options of its own."""
    torch.manual_seed(9)
    denoiser = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 6, 6],
        axes_lens=[1536, 512, 512],
    ).eval()
    for name in ("x_pad_token", "cap_pad_token"):  # zeros in a new network, so that they would tell nothing
        getattr(denoiser, name).data = torch.randn(1, 32)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**({"shift": 6.0} | scheduler)),
        vae=wide_vae(),
        text_encoder=qwen3(24),
        tokenizer=qwen_tokenizer(),
        transformer=denoiser,
    )


def spare_encoder(folder: Path, channels: int = 4) -> None:
    """Puts a linear encoder into a saved pipeline's folder, which takes no time to export, for tests without init images."""
    weight = np.full((channels, 3, 2, 2), 0.1, np.float32)
    np.savez(folder / "encoder.npz", weight=weight, bias=np.zeros(channels, np.float32))


IP_ADAPTER = "ip-adapter.safetensors"
VISION_WIDTH, VISION_PROJECTION = 32, 20
NUM_RESAMPLER_LAYERS = 4


def ip_adapter(unet: UNet2DConditionModel, place: Path, *, is_plus: bool = False) -> Path:
    """A random IP-Adapter for a UNet, seeded, with its image encoder, in a folder as diffusers loads it."""
    torch.manual_seed(11)
    config = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=64,
        projection_dim=VISION_PROJECTION,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=24,
        patch_size=8,
        initializer_factor=4.0,
    )
    CLIPVisionModelWithProjection(config).eval().save_pretrained(place / "image_encoder")
    width = unet.config.cross_attention_dim
    made = _resampler(width) if is_plus else _projection(width)
    weights = {f"image_proj.{name}": tensor for name, tensor in made.items()}
    layers = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(layers):
        inner = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for part, size in (("to_k_ip", 1.0), ("to_v_ip", 4.0)):
            weights[f"ip_adapter.{2 * number + 1}.{part}.weight"] = size * torch.randn(inner, width) / width**0.5
    save_file(weights, place / IP_ADAPTER)
    return place


def _projection(width: int) -> dict[str, torch.Tensor]:
    return {
        "proj.weight": torch.randn(4 * width, VISION_PROJECTION),
        "proj.bias": torch.randn(4 * width),
        "norm.weight": 1 + 0.1 * torch.randn(width),
        "norm.bias": 0.1 * torch.randn(width),
    }


def _resampler(width: int, hidden: int = 16, inner: int = 64, num_tokens: int = 6) -> dict[str, torch.Tensor]:
    """As IP-Adapter's own training saves it."""

    def linear(outputs: int, inputs: int) -> torch.Tensor:
        return torch.randn(outputs, inputs) / inputs**0.5

    made = {
        "latents": torch.randn(1, num_tokens, hidden),
        "proj_in.weight": linear(hidden, VISION_WIDTH),
        "proj_out.weight": linear(width, hidden),
    }
    for name, size in (("proj_in", hidden), ("proj_out", width)):
        made[f"{name}.bias"] = 0.1 * torch.randn(size)
    norms = {"norm_out": width}
    for layer in range(NUM_RESAMPLER_LAYERS):
        at = f"layers.{layer}"
        made |= {
            f"{at}.0.to_q.weight": linear(inner, hidden),
            f"{at}.0.to_kv.weight": linear(2 * inner, hidden),
            f"{at}.0.to_out.weight": linear(hidden, inner),
            f"{at}.1.1.weight": linear(4 * hidden, hidden),
            f"{at}.1.3.weight": linear(hidden, 4 * hidden),
        }
        norms |= {f"{at}.0.norm1": hidden, f"{at}.0.norm2": hidden, f"{at}.1.0": hidden}
    for name, size in norms.items():
        made |= {f"{name}.weight": 1 + 0.1 * torch.randn(size), f"{name}.bias": 0.1 * torch.randn(size)}
    return made
