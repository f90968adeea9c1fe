"""The contents of pipeline.json, with the rules that types can express."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from safelight_server.domain.component import Component

Positive = Annotated[int, Field(gt=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ComponentFile(_Strict):
    """The model of a component in the Triton repository, with version and digest.

    Attributes:
        sha256: digest of `model.onnx`; empty: there is none, as the pipeline was exported for torch alone.
        data_sha256: digest of `model.onnx.data`, if the weights are in a file of their own.
        row_bytes: memory of each row of a call at the largest size, measured by the exporter; 0: unknown.
    """

    model: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
    version: Positive
    sha256: str
    data_sha256: str | None = None
    row_bytes: Annotated[int, Field(ge=0)] = 0


class TorchFiles(_Strict):
    """What the `torch` runtime loads: a folder of diffusers, with a configuration of each component for Triton.

    Attributes:
        files: SHA-256 by path below `torch/` beside the manifest; there are no others.
    """

    files: Annotated[Mapping[str, str], Field(min_length=1)]


class PromptTemplate(_Strict):
    """What a text encoder that was trained as a chat model reads around a prompt.

    Attributes:
        before: the text before the prompt.
        after: the text after it. It may hold the names of special tokens, as `before` may.
        num_tokens_before: tokens of `before`.
    """

    before: str
    after: str
    num_tokens_before: Annotated[int, Field(ge=0)]


class TokenizerFile(_Strict):
    """A `tokenizers` file beside the manifest, and the special tokens around a prompt.

    Attributes:
        bos_id: null where prompts have no begin token, as for T5.
        eos_id: the token behind a prompt.
        template: text around a prompt, in place of a begin and an end token; null: there is none.
    """

    file: str
    sha256: str
    max_tokens: Positive
    pad_id: int
    bos_id: int | None
    eos_id: int
    template: PromptTemplate | None = None

    @property
    def num_begin_tokens(self) -> int:
        """Tokens that stand before those of a prompt."""
        return int(self.bos_id is not None) if self.template is None else self.template.num_tokens_before


class Latent(_Strict):
    """Latent shape at the first picture size; the decoder takes latent / scaling_factor + shift_factor."""

    channels: Positive
    height: Positive
    width: Positive
    scaling_factor: Annotated[float, Field(gt=0)]
    shift_factor: float = 0.0


class SizeOffer(_Strict):
    """A picture size in pixels that the model offers."""

    width_px: Positive
    height_px: Positive


class Noise(_Strict):
    """The noise schedule that the model was trained with (`sampler.NoiseSchedule`)."""

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: Positive = 1000
    rescale_zero_terminal_snr: bool = False
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    shift: Annotated[float, Field(gt=0)] = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: Positive = 256
    max_image_seq_len: Positive = 4096
    patch_size: Positive = 2

    @model_validator(mode="after")
    def _sloped(self) -> Self:
        if self.use_dynamic_shifting and self.base_image_seq_len >= self.max_image_seq_len:
            raise ValueError("max_image_seq_len is not above base_image_seq_len")
        return self


class SamplerCells(_Strict):
    """A sampler with the spacings and sigma schedules that it is offered with, the default first."""

    name: str
    spacings: Annotated[tuple[str, ...], Field(min_length=1)]
    sigma_schedules: Annotated[tuple[str, ...], Field(min_length=1)]


class SamplerDefault(_Strict):
    """The sampler for requests that name none (`sampler.SamplerSpec`)."""

    name: str
    spacing: str
    sigma_schedule: str = "default"
    eta: float = 0.0


class Defaults(_Strict):
    """Default values of request fields."""

    num_inference_steps: Positive
    guidance_scale: Annotated[float, Field(ge=1)]
    sampler: SamplerDefault


class ModelLimits(_Strict):
    """Largest values of request fields; requests with larger ones are refused."""

    max_num_inference_steps: Positive
    max_guidance_scale: Annotated[float, Field(ge=1)]
    max_outputs: Annotated[int, Field(gt=0, le=256)]


class LinearPreview(_Strict):
    """The linear map from a latent to preview pixels (`Pipeline.linear_weights`)."""

    block: Positive
    weights: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]

    @model_validator(mode="after")
    def _rectangular(self) -> Self:
        if len({len(row) for row in self.weights}) != 1:
            raise ValueError("the rows of weights differ in length")
        return self


class GuardWords(_Strict):
    """Words in which two prompts must agree before the picture of one may answer the other; see the approximate cache.

    Attributes:
        groups: values by group name, each with the phrases that mean it; the longest match at a word counts.
        ignored: words that do not matter to the picture.
        closed: whether all words outside the groups must agree too, except the ignored ones.
    """

    groups: Mapping[str, tuple[tuple[str, ...], ...]]
    ignored: tuple[str, ...] = ()
    closed: bool = False

    @model_validator(mode="after")
    def _unambiguous(self) -> Self:
        phrases = [phrase for values in self.groups.values() for value in values for phrase in value]
        plain = [" ".join(phrase.casefold().split()) for phrase in phrases]
        if twice := {phrase for phrase in plain if plain.count(phrase) > 1}:
            raise ValueError(f"stand for two values: {', '.join(sorted(twice))}")
        if not all(any(c.isalnum() for c in phrase) for phrase in plain):
            raise ValueError("a phrase has no word")
        return self


class QualityGate(_Strict):
    """How near pictures of a quantized denoiser come to those of the float one, and the bounds that they were held to.

    Attributes:
        num_pictures: with the same prompts and seeds, at the default settings.
        psnr_db: median over the pictures of their PSNR to the float ones; at most 100, which equal pictures have. The
            lowest median, where there are pictures of several sizes, or plain ones and ones with controls.
        least_psnr_db: of the picture that is farthest off.
        agreement: share of the judge's labels that are the same for both; None: there was no judge.
        min_psnr_db: bound of `psnr_db`.
        min_agreement: bound of `agreement`.
    """

    num_pictures: Positive
    psnr_db: float
    least_psnr_db: float
    agreement: float | None = None
    min_psnr_db: float
    min_agreement: float


class Quantization(_Strict):
    """That the denoiser computes with integers, and what that does to pictures.

    Attributes:
        of: the revision whose denoiser was quantized; all other components are its own.
        made_by: the tool with its version.
    """

    scheme: Literal["int8"]
    of: str
    made_by: str
    quality: QualityGate


HIDDEN_STATE = "last_hidden_state"
"""The output of the text encoder that every pipeline has: the embedding (T, D), by which prompts are compared."""
POOLED_OUTPUT = "pooled_output"
ATTENTION_MASK = "attention_mask"
"""(T,), 1 for the rows of the hidden state that stand for tokens of the prompt, 0 for those behind them, of padding."""
ENCODER_SOURCE = "encoder:"
LATENT_SOURCE, TIMESTEP_SOURCE, SIZE_IDS_SOURCE = "latent", "timestep", "size_ids"
ADAPTER_WEIGHTS_SOURCE, ADAPTER_SCALES_SOURCE = "adapter_weights", "adapter_scales"
ADAPTER_INPUTS = {"adapter_weights": ADAPTER_WEIGHTS_SOURCE, "adapter_scales": ADAPTER_SCALES_SOURCE}
"""What a denoiser is given beside its other inputs where its rows can have adapters."""
CONTROL_IMAGES_SOURCE, CONTROL_SCALES_SOURCE = "control_images", "control_scales"
CONTROL_INPUTS = {"control_images": CONTROL_IMAGES_SOURCE, "control_scales": CONTROL_SCALES_SOURCE}
"""What a denoiser is given beside its other inputs where it has control networks."""
IMAGE_PROMPT_TOKENS_SOURCE, IMAGE_PROMPT_SCALE_SOURCE = "image_prompt_tokens", "image_prompt_scale"
IMAGE_PROMPT_INPUTS = {
    "image_prompt_tokens": IMAGE_PROMPT_TOKENS_SOURCE,
    "image_prompt_scale": IMAGE_PROMPT_SCALE_SOURCE,
}
"""What a denoiser is given beside its other inputs where its rows can have an image prompt."""
IMAGE_PROMPT_OUTPUTS = ("tokens", "negative_tokens")
"""What the image encoder makes of a picture: for the rows with the prompt, and for those with the negative prompt."""
MASK_SOURCE, MASKED_IMAGE_SOURCE = "mask", "masked_image"
INPAINTING_INPUTS = {"mask": MASK_SOURCE, "masked_image": MASKED_IMAGE_SOURCE}
"""What a denoiser that only inpaints is given beside its other inputs."""
GUIDANCE_INPUT, GUIDANCE_SOURCE = "guidance", "scalar:guidance"
STABLE_DIFFUSION_INPUTS = {
    "sample": LATENT_SOURCE,
    "timestep": TIMESTEP_SOURCE,
    "encoder_hidden_states": ENCODER_SOURCE + HIDDEN_STATE,
}
STABLE_DIFFUSION_XL_INPUTS = {
    **STABLE_DIFFUSION_INPUTS,
    "text_embeds": ENCODER_SOURCE + POOLED_OUTPUT,
    "time_ids": SIZE_IDS_SOURCE,
}
TRANSFORMER_INPUTS = {**STABLE_DIFFUSION_INPUTS, "pooled_projections": ENCODER_SOURCE + POOLED_OUTPUT}
"""Of Stable Diffusion 3 and of FLUX; FLUX.1-dev has "guidance" as well, from `GUIDANCE_SOURCE`."""
ENCODER_MASK_INPUT = "encoder_attention_mask"
Z_IMAGE_INPUTS = {**STABLE_DIFFUSION_INPUTS, ENCODER_MASK_INPUT: ENCODER_SOURCE + ATTENTION_MASK}
"""Of a denoiser that reads prompts of different lengths, each without its padding."""
CONTEXT_TOKENIZERS = {"stable-diffusion-3": (0, 2), "flux": (1,)}
"""By family the places of the tokenizers for whose tokens the hidden state has a row each; of others the first."""
InputSource = Annotated[
    str,
    Field(
        pattern=r"^(latent|timestep|size_ids|scalar:guidance|adapter_weights|adapter_scales|control_images"
        r"|control_scales|image_prompt_tokens|image_prompt_scale|mask|masked_image|encoder:[A-Za-z0-9_]+)$"
    ),
]
ControlName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]


class ImagePromptRoom(_Strict):
    """What the denoiser is given of a picture that says what to draw (IP-Adapter, Ye et al. 2023).

    A row is given image_prompt_tokens (T, D), which its cross-attention reads beside the prompt, and
    image_prompt_scale, the factor of what it finds there; a factor of 0 is as if there were no picture.

    Attributes:
        edge_px: S; the image encoder takes a square of S x S pixels.
        num_tokens: T.
        width: D.
    """

    edge_px: Positive
    num_tokens: Positive
    width: Positive


class AdapterTarget(_Strict):
    """A layer that adapters can change: `inputs` numbers in, `outputs` numbers out.

    Attributes:
        kernel: edge of the kernel of a convolution, which has `inputs` and `outputs` channels; None: a linear layer.
        stride: of a convolution.
        padding: of a convolution, with zeros.
    """

    name: str
    inputs: Positive
    outputs: Positive
    kernel: Positive | None = None
    stride: Positive = 1
    padding: Annotated[int, Field(ge=0)] = 0

    @property
    def edge(self) -> int:
        """Of the kernel; a linear layer counts as a convolution of 1 x 1."""
        return self.kernel or 1

    @property
    def form(self) -> str:
        """Its sizes, for messages."""
        kernel = "" if self.kernel is None else f" by {self.kernel} x {self.kernel}"
        return f"{self.inputs} to {self.outputs}{kernel}"

    @property
    def num_down(self) -> int:
        """Numbers of a row of A."""
        return self.inputs * self.edge**2


class AdapterRoom(_Strict):
    """The room that each row of the denoiser, or of the text encoder, has for adapters (LoRA, Hu et al. 2021).

    A row is given adapter_weights (R, Q) and adapter_scales (R,). Each rank has the numbers of all targets side by
    side: of the first target a row of its matrix A (`inputs` numbers) and a column of its B (`outputs` numbers), then
    those of the next one. A target adds the sum over all ranks r of B[:, r] * scales[r] * (A[r] · x); a rank of zeros
    adds nothing. A row of A of a convolution has the `inputs` numbers of each place of its kernel, line by line, and
    `A[r] · x` is the convolution of x with it.

    Attributes:
        max_rank: R, for all adapters of a row together.
        targets: by their names in the denoiser, or in the pipeline ("text_encoder_2.text_model.encoder…"), in the order
            in which their numbers stand.
    """

    max_rank: Positive
    targets: Annotated[tuple[AdapterTarget, ...], Field(min_length=1)]

    @property
    def width(self) -> int:
        """Q: numbers of one rank."""
        return sum(target.num_down + target.outputs for target in self.targets)


class Manifest(_Strict):
    """The contents of pipeline.json. `guard` and `example_prompts` help the approximate caches and may be left out.

    Attributes:
        second_tokenizer: tokenizer of a second text encoder; its ids follow those of the first in `input_ids`.
        third_tokenizer: likewise, of a third text encoder, after the second's.
        torch: the files of the `torch` runtime; None: it was not exported for that.
        notes: differences from the exported pipeline: substitutes for parts that the server does not have.
        quantization: of a revision that was made from another one by `safelight export --quantize`.
        inputs: the inputs of the denoiser by name, each with its source: "latent", "timestep", "encoder:OUTPUT" (an
            output of the text encoder, by prompt), "scalar:guidance" (the request's guidance scale, for a network that
            was distilled with it), or "size_ids" (the picture's height and width, a crop of zero, and height and width
            again: SDXL's micro-conditioning, Podell et al. 2023, section 2.2).
            "adapter_weights" and "adapter_scales" are the adapters of a row (`AdapterRoom`), "image_prompt_tokens" and
            "image_prompt_scale" its image prompt (`ImagePromptRoom`). A denoiser that was trained to inpaint (Rombach
            et al. 2022, section 4.5) has "mask" (1, h, w), 1 where a picture is developed anew and 0 where it is kept,
            and "masked_image" (C, h, w), the latent of the picture without the part that is developed anew.
        adapters: the room for adapters; None: the denoiser takes none.
        text_adapters: the room for what adapters change in the text encoders; None: they change nothing there.
        controls: the names of the K control networks (ControlNet, Zhang et al. 2023) that are part of the denoiser. A
            row is given "control_images" (K, 3, H, W) in [0, 1], a picture for each, and "control_scales" (K,), the
            factors of what they add. A network whose scale is 0 changes nothing and is not run for that row.
        image_prompt: the form of image prompts; None: the denoiser takes none.
    """

    format: Literal[1]
    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,62}$")]
    revision: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,62}$")]
    description: str
    license: str
    family: Literal["stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3", "flux", "z-image"]
    components: Mapping[Component, ComponentFile]
    tokenizer: TokenizerFile
    second_tokenizer: TokenizerFile | None = None
    third_tokenizer: TokenizerFile | None = None
    torch: TorchFiles | None = None
    latent: Latent
    sizes: Annotated[tuple[SizeOffer, ...], Field(min_length=1)]
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow"]
    noise_schedule: Noise
    samplers: Annotated[tuple[SamplerCells, ...], Field(min_length=1)]
    defaults: Defaults
    limits: ModelLimits
    linear_preview: LinearPreview
    guard: GuardWords | None = None
    example_prompts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    quantization: Quantization | None = None
    inputs: Mapping[str, InputSource] = STABLE_DIFFUSION_INPUTS
    adapters: AdapterRoom | None = None
    text_adapters: AdapterRoom | None = None
    controls: tuple[ControlName, ...] = ()
    image_prompt: ImagePromptRoom | None = None

    @property
    def adapter_rooms(self) -> Mapping[Component, AdapterRoom]:
        """The rooms for adapters of the components that have one."""
        rooms = {Component.DENOISER: self.adapters, Component.TEXT_ENCODER: self.text_adapters}
        return {component: room for component, room in rooms.items() if room is not None}

    @property
    def tokenizers(self) -> tuple[TokenizerFile, ...]:
        """All tokenizers, in the order of their ids in `input_ids`."""
        return tuple(filter(None, (self.tokenizer, self.second_tokenizer, self.third_tokenizer)))

    @property
    def context_tokenizers(self) -> tuple[TokenizerFile, ...]:
        """Those for whose tokens `last_hidden_state` has rows, one each."""
        places = CONTEXT_TOKENIZERS.get(self.family, (0,))
        return tuple(at for place, at in enumerate(self.tokenizers) if place in places)

    @property
    def is_guidance_distilled(self) -> bool:
        """Whether the denoiser is given the guidance scale itself, so that a step needs no row without the prompt."""
        return GUIDANCE_SOURCE in self.inputs.values()

    @property
    def is_inpainting(self) -> bool:
        """Whether the denoiser is given a mask and what of a picture is kept, so that each request needs both."""
        return MASK_SOURCE in self.inputs.values()
