"""Judges the configurations of the networks: values that the server does not support, and unknown keys. Pure.

Most keys only shape a network, and the network is exported as diffusers builds it. A
key that is in none of the tables is refused by name, as it may mean anything.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from safelight_server.export.source import Config, Findings, Source


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


Rules = Mapping[str, tuple[tuple[Any, ...], str]]
"""By key, the values that can be exported, the default first, and what other values would need."""

UNET_SHAPE = _keys(
    """
    sample_size in_channels out_channels center_input_sample flip_sin_to_cos freq_shift down_block_types
    mid_block_type up_block_types only_cross_attention block_out_channels layers_per_block downsample_padding
    mid_block_scale_factor dropout act_fn norm_num_groups norm_eps cross_attention_dim
    transformer_layers_per_block reverse_transformer_layers_per_block attention_head_dim num_attention_heads
    dual_cross_attention use_linear_projection upcast_attention resnet_time_scale_shift resnet_skip_time_act
    resnet_out_scale_factor time_embedding_type time_embedding_dim time_embedding_act_fn timestep_post_act
    conv_in_kernel conv_out_kernel class_embeddings_concat mid_block_only_cross_attention cross_attention_norm
    addition_embed_type_num_heads addition_time_embed_dim projection_class_embeddings_input_dim
    encoder_hid_dim
    """
)
UNET_RULES: Rules = {
    "time_cond_proj_dim": ((None,), "the denoiser would need the guidance scale as an input"),
    "class_embed_type": ((None,), "the denoiser would need a class as an input"),
    "num_class_embeds": ((None,), "the denoiser would need a class as an input"),
    "addition_embed_type": ((None,), "the denoiser would need a second condition as an input"),
    "encoder_hid_dim_type": ((None,), "the denoiser would need a condition other than the prompt's"),
    "attention_type": (("default",), "the denoiser would need boxes as an input"),
}
SDXL_UNET_RULES: Rules = {
    **UNET_RULES,
    "addition_embed_type": (("text_time",), "SDXL's denoiser is given the prompt's pooled output and the size"),
}
CONTROL_SHAPE = _keys(
    """
    in_channels flip_sin_to_cos freq_shift down_block_types mid_block_type only_cross_attention block_out_channels
    layers_per_block downsample_padding mid_block_scale_factor act_fn norm_num_groups norm_eps cross_attention_dim
    transformer_layers_per_block encoder_hid_dim attention_head_dim num_attention_heads use_linear_projection
    addition_embed_type addition_time_embed_dim upcast_attention resnet_time_scale_shift
    projection_class_embeddings_input_dim controlnet_conditioning_channel_order
    conditioning_embedding_out_channels addition_embed_type_num_heads
    """
)
CONTROL_RULES: Rules = {
    "conditioning_channels": ((3,), "a picture has three channels"),
    "class_embed_type": ((None,), "the network would need a class as an input"),
    "num_class_embeds": ((None,), "the network would need a class as an input"),
    "encoder_hid_dim_type": ((None,), "the network would need a condition other than the prompt's"),
    "global_pool_conditions": ((False,), "what is added would be a mean over the picture"),
}
SHARED: Mapping[str, Any] = {
    "in_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 1280,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
}
"""What a control network has in common with its UNet, with diffusers' defaults, which are the same for both."""
FLUX_PATCH = 2
"""Pixels along an edge of what FLUX packs to a token."""
SCHNELL_T5_TOKENS = 256
Z_IMAGE_PATCH = 2
"""Pixels of a latent along an edge of a token of Z-Image."""
Z_IMAGE_TIMESTEPS = 1000
"""What diffusers' pipeline counts on, whatever the scheduler says."""
CAPTION_MULTIPLE = 32
"""Z-Image fills a prompt up to a multiple of so many tokens."""
_IN_CHANNELS = {
    "flux": 64,
    "stable-diffusion-3": 16,
    "z-image": 16,
    "stable-diffusion": 4,
    "stable-diffusion-xl": 4,
}
NUM_SIZE_IDS = 6
"""Numbers of the size that SDXL's denoiser is given; its refiner has 5, of which one is an aesthetic score."""
KL_SHAPE = _keys(
    """
    in_channels out_channels down_block_types up_block_types block_out_channels layers_per_block act_fn
    latent_channels norm_num_groups sample_size scaling_factor force_upcast use_quant_conv use_post_quant_conv
    mid_block_add_attention
    """
)
TINY_SHAPE = _keys(
    """
    in_channels out_channels encoder_block_out_channels decoder_block_out_channels act_fn upsample_fn
    latent_channels num_encoder_blocks num_decoder_blocks latent_magnitude latent_shift force_upcast
    scaling_factor block_out_channels
    """
)
VAE_RULES: Rules = {
    "latents_mean": ((None,), "the server scales latents by one factor for all channels"),
    "latents_std": ((None,), "the server scales latents by one factor for all channels"),
    "shift_factor": ((None, 0, 0.0), "StableDiffusionPipeline ignores it"),
    "upsampling_scaling_factor": ((2,), "diffusers counts on 2 when it computes sizes"),
    "out_channels": ((3,), "a picture has three channels"),
}
TEXT_SHAPE = _keys(
    """
    vocab_size hidden_size intermediate_size projection_dim num_hidden_layers num_attention_heads
    max_position_embeddings hidden_act layer_norm_eps attention_dropout dropout initializer_range
    initializer_factor pad_token_id bos_token_id eos_token_id model_type architectures torch_dtype dtype
    transformers_version output_hidden_states output_attentions return_dict chunk_size_feed_forward id2label
    label2id problem_type is_encoder_decoder tie_word_embeddings
    """
)
TEXT_RULES: Rules = {"use_attention_mask": ((None, False), "the text encoder would need the padding as an input")}
FLUX_SHAPE = _keys(
    """
    in_channels out_channels num_layers num_single_layers attention_head_dim num_attention_heads
    joint_attention_dim pooled_projection_dim guidance_embeds axes_dims_rope
    """
)
FLUX_RULES: Rules = {"patch_size": ((1,), "latents are packed by 2 x 2 pixels, and the transformer has no patches")}
SD3_SHAPE = _keys(
    """
    sample_size patch_size in_channels out_channels num_layers attention_head_dim num_attention_heads
    joint_attention_dim caption_projection_dim pooled_projection_dim pos_embed_max_size dual_attention_layers
    qk_norm
    """
)
VISION_SHAPE = _keys(
    """
    hidden_size intermediate_size projection_dim num_hidden_layers num_attention_heads num_channels image_size
    patch_size hidden_act layer_norm_eps attention_dropout dropout initializer_range initializer_factor model_type
    architectures torch_dtype dtype transformers_version output_hidden_states output_attentions return_dict
    chunk_size_feed_forward id2label label2id problem_type is_encoder_decoder tie_word_embeddings
    """
)
VISION_RULES: Rules = {"num_channels": ((3,), "a picture has three channels")}
VISION_DEFAULTS = {"hidden_size": 768, "projection_dim": 512, "image_size": 224}
T5_SHAPE = _keys(
    """
    vocab_size d_model d_kv d_ff num_layers num_decoder_layers num_heads relative_attention_num_buckets
    relative_attention_max_distance dropout_rate classifier_dropout layer_norm_epsilon initializer_factor
    feed_forward_proj dense_act_fn is_gated_act is_encoder_decoder is_decoder use_cache pad_token_id bos_token_id
    eos_token_id decoder_start_token_id tie_word_embeddings output_past scale_decoder_outputs model_type
    architectures torch_dtype dtype transformers_version n_positions task_specific_params output_hidden_states
    output_attentions return_dict chunk_size_feed_forward id2label label2id problem_type
    """
)
Z_IMAGE_SHAPE = _keys(
    """
    in_channels dim n_layers n_refiner_layers n_heads n_kv_heads norm_eps qk_norm cap_feat_dim rope_theta t_scale
    axes_dims axes_lens
    """
)
Z_IMAGE_RULES: Rules = {
    "all_patch_size": (([Z_IMAGE_PATCH],), "diffusers' pipeline takes 2 x 2 pixels of a latent for a token"),
    "all_f_patch_size": (([1],), "a latent is one picture"),
    "siglip_feat_dim": ((None,), "the denoiser would need other pictures as an input"),
}
QWEN3_SHAPE = _keys(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    hidden_act max_position_embeddings initializer_range rms_norm_eps use_cache tie_word_embeddings rope_parameters
    rope_theta rope_scaling attention_bias attention_dropout use_sliding_window sliding_window max_window_layers
    layer_types pad_token_id bos_token_id eos_token_id model_type architectures torch_dtype dtype
    transformers_version output_hidden_states output_attentions return_dict chunk_size_feed_forward id2label
    label2id problem_type is_encoder_decoder
    """
)
TRANSFORMER_VAE_RULES: Rules = {key: rule for key, rule in VAE_RULES.items() if key != "shift_factor"}


def judge(source: Source, findings: Findings) -> None:
    """Adds to `findings` what cannot be exported."""
    if source.family.name == "z-image":
        _judge_z_image(source, findings)
    elif source.family.denoiser == "transformer":
        _judge_transformer(source, findings)
    else:
        _judge_unet(source, findings)


def judge_image_encoder(file: str, config: Config, findings: Findings) -> None:
    """Judges the configuration of an IP-Adapter's image encoder, a CLIPVisionModelWithProjection."""
    if config.get("model_type") != "clip_vision_model":
        findings.faults.append(f"{file}: model_type {config.get('model_type')!r}: clip_vision_model can be exported")
        return
    _check(file, config, VISION_SHAPE, VISION_RULES, findings)
    if not isinstance(config.get("image_size", VISION_DEFAULTS["image_size"]), int):
        findings.faults.append(
            f"{file}: image_size {config['image_size']!r} is no number: pictures are cut to a square"
        )


def _judge_unet(source: Source, findings: Findings) -> None:
    """Judges a pipeline whose denoiser is a UNet."""
    configs, is_sdxl = source.configs, source.family.name == "stable-diffusion-xl"
    unet, vae = configs["unet"], configs["vae"]
    vae_shape = TINY_SHAPE if source.index["vae"][1] == "AutoencoderTiny" else KL_SHAPE
    _check("unet/config.json", unet, UNET_SHAPE, SDXL_UNET_RULES if is_sdxl else UNET_RULES, findings)
    _check("vae/config.json", vae, vae_shape, VAE_RULES, findings)
    for name in source.family.text_encoders:
        _check(f"{name}/config.json", configs[name], TEXT_SHAPE, TEXT_RULES, findings)
    latents, inputs, outputs = vae.get("latent_channels", 4), unet.get("in_channels", 4), unet.get("out_channels", 4)
    if inputs != latents and not is_inpainting(source):
        kind = "a UNet that edits pictures" if inputs == 2 * latents else "a UNet"
        findings.faults.append(
            f"unet/config.json: in_channels {inputs}: {kind}; the server gives the denoiser the {latents} channels of"
            f" the latent, and one that inpaints a mask and {latents} channels of a picture beside them"
        )
    elif outputs != latents:
        findings.faults.append(f"unet/config.json: out_channels {outputs} is not the latent's {latents}")
    hidden = [configs[name].get("hidden_size", 512) for name in source.family.text_encoders]
    width = unet.get("cross_attention_dim", 1280)
    if width != sum(hidden) and unet.get("encoder_hid_dim_type") is None:
        whose = "the text encoder's" if len(hidden) == 1 else "that of the text encoders,"
        findings.faults.append(
            f"unet/config.json: cross_attention_dim {width} is not {whose} {' + '.join(map(str, hidden))}"
        )
    if is_sdxl:
        _judge_added(unet, configs["text_encoder_2"].get("projection_dim", 512), findings)


def judge_control(source: Source, name: str, config: Config, factor: int, findings: Findings) -> None:
    """Judges a control network for the denoiser of `source`.

    Args:
        factor: pixels of a picture along one edge of a latent's pixel.
    """
    option = f"--control {name}"
    if source.family.denoiser == "transformer":
        findings.faults.append(f"{option}: only UNets take control networks; leave it out")
        return
    if (kind := config.get("_class_name")) != "ControlNetModel":
        findings.faults.append(f"{option}: config.json is that of a {kind}; what can be exported: ControlNetModel")
        return
    _check(f"{option}: config.json", config, CONTROL_SHAPE, CONTROL_RULES, findings)
    for key, default in SHARED.items():
        found, wanted, whose = config.get(key, default), source.configs["unet"].get(key, default), "UNet"
        if key == "in_channels":  # a control network is not given the mask and the picture of a UNet that inpaints
            wanted, whose = latent_channels(source), "latent"
        if found != wanted:
            findings.faults.append(f"{option}: config.json: {key} is {found}, that of the {whose} is {wanted}")
    stages = config.get("conditioning_embedding_out_channels") or (16, 32, 96, 256)
    if (shrinks := 2 ** (len(stages) - 1)) != factor:
        findings.faults.append(
            f"{option}: config.json: conditioning_embedding_out_channels shrink a picture to 1/{shrinks},"
            f" the autoencoder to 1/{factor}"
        )


def _judge_added(unet: Config, pooled: int, findings: Findings) -> None:
    """Judges what SDXL's denoiser is given beside the prompt's hidden states: the pooled output, and the size."""
    if "addition_embed_type" not in unet:
        findings.faults.append("unet/config.json: addition_embed_type is missing: SDXL's is text_time")
    time, width = unet.get("addition_time_embed_dim"), unet.get("projection_class_embeddings_input_dim")
    if not isinstance(time, int) or width != pooled + NUM_SIZE_IDS * time:
        findings.faults.append(
            f"unet/config.json: projection_class_embeddings_input_dim {width} is not the {pooled} of the pooled output"
            f" and {NUM_SIZE_IDS} times the addition_time_embed_dim {time}; a refiner, which is not served, has 5 times"
        )


def _judge_transformer(source: Source, findings: Findings) -> None:
    """Judges a pipeline whose denoiser is a diffusion transformer: Stable Diffusion 3, or FLUX."""
    configs, is_flux = source.configs, source.family.name == "flux"
    file, denoiser, vae = "transformer/config.json", configs["transformer"], configs["vae"]
    _check(file, denoiser, FLUX_SHAPE if is_flux else SD3_SHAPE, FLUX_RULES if is_flux else {}, findings)
    _judge_shifted_vae(vae, findings)
    *clips, t5 = source.family.text_encoders
    for name in clips:
        _check(f"{name}/config.json", configs[name], TEXT_SHAPE, TEXT_RULES, findings)
    _check(f"{t5}/config.json", configs[t5], T5_SHAPE, {}, findings)
    packed, latents = 4 if is_flux else 1, vae.get("latent_channels", 4)
    inputs = denoiser.get("in_channels", 64 if is_flux else 16)
    outputs = denoiser.get("out_channels", None if is_flux else 16) or inputs
    if inputs != packed * latents:
        findings.faults.append(
            f"{file}: in_channels {inputs} is not {packed * latents}: the server gives the denoiser the {latents}"
            " channels of the latent, and no picture or mask beside it"
        )
    elif outputs != inputs:
        findings.faults.append(f"{file}: out_channels {outputs} is not in_channels {inputs}")
    pooled = [configs[name].get("hidden_size" if is_flux else "projection_dim", 512) for name in clips]
    width, default = configs[t5].get("d_model", 512), 768 if is_flux else 2048
    for key, found, wanted, whose in (
        ("joint_attention_dim", denoiser.get("joint_attention_dim", 4096), width, t5),
        (
            "pooled_projection_dim",
            denoiser.get("pooled_projection_dim", default),
            sum(pooled),
            _and(clips),
        ),
    ):
        if found != wanted:
            findings.faults.append(f"{file}: {key} {found} is not that of {whose}, {wanted}")
    hidden = sum(configs[name].get("hidden_size", 512) for name in clips)
    if not is_flux and hidden > width:
        findings.faults.append(f"{t5}/config.json: d_model {width} is less than {hidden}, that of {_and(clips)}")


def _judge_shifted_vae(vae: Config, findings: Findings) -> None:
    _check("vae/config.json", vae, KL_SHAPE | {"shift_factor"}, TRANSFORMER_VAE_RULES, findings)
    if not isinstance(vae.get("shift_factor"), int | float):
        findings.faults.append("vae/config.json: shift_factor is missing: latents are shifted by it")


def _judge_z_image(source: Source, findings: Findings) -> None:
    """Judges a pipeline like Z-Image: one text encoder, a language model, and a transformer that reads its states."""
    file, denoiser, text = "transformer/config.json", source.configs["transformer"], source.configs["text_encoder"]
    _check(file, denoiser, Z_IMAGE_SHAPE, Z_IMAGE_RULES, findings)
    _judge_shifted_vae(source.configs["vae"], findings)
    _check("text_encoder/config.json", text, QWEN3_SHAPE, {}, findings)
    latents = source.configs["vae"].get("latent_channels", 4)
    if (inputs := denoiser.get("in_channels", 16)) != latents:
        findings.faults.append(f"{file}: in_channels {inputs} is not {latents}, that of the latent")
    if (found := denoiser.get("cap_feat_dim", 2560)) != (width := text.get("hidden_size", 4096)):
        findings.faults.append(f"{file}: cap_feat_dim {found} is not that of text_encoder, {width}")
    heads, dims = denoiser.get("n_heads", 30), denoiser.get("axes_dims") or [32, 48, 48]
    if (width := denoiser.get("dim", 3840)) != heads * sum(dims):
        findings.faults.append(f"{file}: dim {width} is not n_heads {heads} times the sum of axes_dims {dims}")
    lengths = _axes_lens(denoiser)
    if len(dims) != 3 or len(lengths) != 3:
        findings.faults.append(f"{file}: axes_dims {dims} and axes_lens {lengths} do not have three axes")
    longest = source.family.max_tokens
    # Tokens are counted from 1 up to a multiple of 32, and the picture stands at the next place.
    if lengths[0] < (needed := -(-longest // CAPTION_MULTIPLE) * CAPTION_MULTIPLE + 2):
        findings.faults.append(f"{file}: axes_lens {lengths}: prompts of {longest} tokens need {needed} places")
    if (found := text.get("max_position_embeddings", 32768)) < longest:
        findings.faults.append(f"text_encoder/config.json: max_position_embeddings {found} is less than {longest}")
    steps = source.configs["scheduler"].get("num_train_timesteps", Z_IMAGE_TIMESTEPS)
    if steps != Z_IMAGE_TIMESTEPS:
        findings.faults.append(
            f"scheduler: num_train_timesteps {steps} cannot be served: diffusers' pipeline counts on"
            f" {Z_IMAGE_TIMESTEPS}"
        )


def _axes_lens(denoiser: Config) -> list[int]:
    """Places of Z-Image's position embedding: of tokens, and along height and width of a picture."""
    return list(denoiser.get("axes_lens") or [1024, 512, 512])


def _and(names: Collection[str]) -> str:
    return " and ".join(names)


def is_guidance_distilled(source: Source) -> bool:
    """Whether the denoiser is given the guidance scale, as FLUX.1-dev's."""
    return bool(source.family.name == "flux" and source.configs["transformer"].get("guidance_embeds", False))


def is_inpainting(source: Source) -> bool:
    """Whether the UNet takes a mask and the latent of a picture without a part of it beside the latent."""
    if source.family.denoiser == "transformer":
        return False
    latents = source.configs["vae"].get("latent_channels", 4)
    return bool(source.configs["unet"].get("in_channels", 4) == 2 * latents + 1)


def latent_channels(source: Source) -> int:
    """Channels of a latent."""
    channels = int(source.configs[source.family.denoiser].get("in_channels", _IN_CHANNELS[source.family.name]))
    if is_inpainting(source):
        return channels // 2
    return channels // 4 if source.family.name == "flux" else channels


def latent_multiple(source: Source) -> int:
    """What the edges of a latent must be multiples of: the levels of a UNet but the last, or the patch."""
    denoiser = source.configs[source.family.denoiser]
    if source.family.name == "flux":
        return FLUX_PATCH
    if source.family.name == "z-image":
        return Z_IMAGE_PATCH
    if source.family.name == "stable-diffusion-3":
        return int(denoiser.get("patch_size", 2))
    return int(2 ** (len(denoiser.get("block_out_channels") or (0,) * 4) - 1))


def largest_edge(source: Source) -> int | None:
    """The longest edge of a latent that has a position embedding; None: there is no limit."""
    if source.family.name == "z-image":
        return min(_axes_lens(source.configs["transformer"])[1:], default=0) * Z_IMAGE_PATCH
    if source.family.name != "stable-diffusion-3":
        return None
    return int(source.configs["transformer"].get("pos_embed_max_size", 96)) * latent_multiple(source)


def latent_factor(vae: Config) -> int:
    """Pixels of a picture along one edge of a latent's pixel, as diffusers computes it."""
    channels = vae.get("block_out_channels") or vae.get("decoder_block_out_channels") or (64,) * 4
    return int(2 ** (len(channels) - 1))


def _check(file: str, config: Config, known: Collection[str], rules: Rules, findings: Findings) -> None:
    for key, value in config.items():
        if key in rules:
            values, why = rules[key]
            if value not in values:
                findings.faults.append(f"{file}: {key} {value!r} cannot be exported: {why}")
        elif key not in known and not key.startswith("_"):
            findings.faults.append(f"{file}: {key} is not known to this exporter")
