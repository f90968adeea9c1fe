"""Gives a UNet room for an image prompt (IP-Adapter, Ye et al. 2023): each row brings its tokens and a factor.

The tokens are read by cross-attention of their own, with the queries of the
prompt's; the factor of a row decides how much of it is added. A row whose factor
is 0 has the bits of the UNet without it, whatever other rows bring.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from safelight_server.catalog import safetensors
from safelight_server.catalog.manifest import IMAGE_PROMPT_OUTPUTS
from safelight_server.export.image_prompts import IMAGE_ENCODER, OPTION, ImagePromptSource
from safelight_server.export.source import ExportError


class ImagePromptEncoder(nn.Module):
    """image (B, 3, S, S) in [-1, 1] -> tokens (B, T, D), negative_tokens (B, T, D).

    The negative tokens are the same for all pictures: those of an embedding of zeros, or for IP-Adapter Plus of a
    picture whose normalized values are zeros, as in diffusers' pipelines.
    """

    outputs = IMAGE_PROMPT_OUTPUTS

    def __init__(self, model: CLIPVisionModelWithProjection, projection: nn.Module) -> None:
        super().__init__()
        self.model, self.projection = model, projection
        # No buffers: the exporter rounds those to float16.
        self._mean, self._std = (torch.tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        self._negative: Tensor | None = None

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self._tokens(((image + 1) / 2 - _like(self._mean, image)) / _like(self._std, image))
        assert self._negative is not None, "see `prepare`"
        return tokens, _like(self._negative, tokens).expand(tokens.shape[0], -1, -1)

    def prepare(self) -> None:
        """Computes the negative tokens, once the weights are those that are exported."""
        edge = self.model.config.image_size
        if isinstance(self.projection, ImageProjection):
            self._negative = self.projection(torch.zeros(1, self.model.config.projection_dim))
        else:
            self._negative = self._tokens(torch.zeros(1, 3, edge, edge))

    def _tokens(self, pixel_values: Tensor) -> Tensor:
        if isinstance(self.projection, ImageProjection):
            seen = self.model(pixel_values).image_embeds
        else:
            seen = self.model(pixel_values, output_hidden_states=True).hidden_states[-2]
        tokens: Tensor = self.projection(seen)
        return tokens


class GivenImagePrompts(threading.local):
    """What the rows of the call under way bring. No module: torch must not take it for state of the network.

    Each thread has its own, because the instances of the `torch` runtime share a network.
    """

    def __init__(self) -> None:
        self.tokens: Tensor | None = None
        self.scale: Tensor | None = None


class ImagePromptAttention:
    """Cross-attention to the prompt and, beside it, to the tokens of each row's image prompt.

    What `diffusers.models.attention_processor.IPAdapterAttnProcessor2_0` computes, with a factor for each row. The
    layers `to_k_ip` and `to_v_ip` belong to the Attention module.
    """

    def __init__(self, given: GivenImagePrompts) -> None:
        self._given = given

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        assert encoder_hidden_states is not None and hidden_states.ndim == 3
        tokens, scale = self._given.tokens, self._given.scale
        assert tokens is not None and scale is not None
        residual = hidden_states
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        query = _heads(attn.to_q(hidden_states), attn.heads)
        if attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
        of_text = _attend(query, attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states), attn.heads)
        of_image = _attend(query, attn.to_k_ip(tokens), attn.to_v_ip(tokens), attn.heads)
        found = attn.to_out[0](of_text + _like(scale[:, None, None] * of_image, of_text))
        if attn.residual_connection:
            found = found + residual
        result: Tensor = found / attn.rescale_output_factor
        return result


def _like(given: Tensor, other: Tensor) -> Tensor:
    """A tensor on the device and of the dtype of another one; the same one where it is."""
    alike = given.dtype == other.dtype and given.device == other.device
    return given if alike else given.to(other.device, other.dtype)


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, H * C) -> (B, H, N, C)."""
    return x.reshape(x.shape[0], -1, heads, x.shape[-1] // heads).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Scaled dot-product attention of `query` (B, H, N, C) to keys and values (B, T, H * C): (B, N, H * C)."""
    found = functional.scaled_dot_product_attention(query, _heads(key, heads), _heads(value, heads))
    return found.transpose(1, 2).reshape(query.shape[0], -1, key.shape[-1])


class ImagePrompts:
    """A UNet that is changed to take image prompts, and the encoder that makes them.

    Attributes:
        given: what a call's rows bring.
        encoder: the exported image encoder.
    """

    def __init__(self, unet: UNet2DConditionModel, source: ImagePromptSource) -> None:
        """Changes `unet`.

        Raises:
            ExportError: the adapter does not fit the UNet, or the image encoder lacks weights.
            SafetensorsError: the adapter has weights that are no floating-point numbers.
        """
        self.given = GivenImagePrompts()
        state: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        tensors, _ = safetensors.parse(source.weights.read_bytes())
        for name, values in tensors.items():
            part, _, rest = name.partition(".")
            state.setdefault(part, {})[rest] = torch.from_numpy(values)
        if others := sorted(state.keys() - {"image_proj", "ip_adapter"}):
            raise ExportError(f"{OPTION} {source.weights.name}: has weights {others[0]}.…, which are not known")
        try:
            unet._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
        except (KeyError, RuntimeError) as error:
            why = (str(error).splitlines() or [""])[-1].strip()
            what = f"does not fit the UNet, it belongs to another base model: {why}"
            raise ExportError(f"{OPTION} {source.weights.name}: {what}") from None
        [projection] = unet.encoder_hid_proj.image_projection_layers
        unet.encoder_hid_proj = None  # the image encoder has it, so that it is computed once a picture
        processor, layers = ImagePromptAttention(self.given), 0
        for module in list(unet.modules()):  # changed on the way
            if isinstance(module, Attention) and isinstance(module.processor, IPAdapterAttnProcessor2_0):
                [module.to_k_ip], [module.to_v_ip] = module.processor.to_k_ip, module.processor.to_v_ip
                module.set_processor(processor)
                layers += 1
        if len(state["ip_adapter"]) != 2 * layers:
            raise ExportError(
                f"{OPTION} {source.weights.name}: is for {len(state['ip_adapter']) // 2} layers of cross-attention, and"
                f" the UNet has {layers}: it belongs to another base model"
            )
        self.encoder = ImagePromptEncoder(image_encoder_of(source), projection).eval()


@contextlib.contextmanager
def given_image(prompts: ImagePrompts | None, tokens: Tensor | None, scale: Tensor | None) -> Iterator[None]:
    """A block in which a UNet reads the image prompts of its call's rows; without room for them, none."""
    if prompts is None:
        yield
        return
    prompts.given.tokens, prompts.given.scale = tokens, scale
    try:
        yield
    finally:
        prompts.given.tokens = prompts.given.scale = None


def image_encoder_of(source: ImagePromptSource) -> CLIPVisionModelWithProjection:
    """The image encoder of an IP-Adapter, on the CPU in float32.

    Raises:
        ExportError: its files lack weights.
    """
    model, found = CLIPVisionModelWithProjection.from_pretrained(
        source.encoder, local_files_only=True, dtype=torch.float32, output_loading_info=True
    )
    if lacking := sorted(str(key) for key in found["missing_keys"]):
        raise ExportError(f"{IMAGE_ENCODER}: the files lack {len(lacking)} of its weights, such as {lacking[0]}")
    loaded: CLIPVisionModelWithProjection = model
    return loaded
