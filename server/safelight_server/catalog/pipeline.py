"""A pipeline as the server runs it: its manifest, and what follows from that, such as its digest and its shapes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from safelight_server.catalog import revisions
from safelight_server.catalog.manifest import (
    CONTEXT_TOKENIZERS,
    ENCODER_SOURCE,
    HIDDEN_STATE,
    STABLE_DIFFUSION_INPUTS,
    Manifest,
    TokenizerFile,
)
from safelight_server.catalog.tokenizer import Tokens
from safelight_server.domain.component import Component
from safelight_server.sampler import VERSION as SAMPLER_VERSION
from safelight_server.sampler import NoiseSchedule

ONLY_FLOW = (
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "patch_size",
)
"""What the noise schedule of flow matching alone has."""


class PromptTokenizer(Protocol):
    """Turns prompts into token ids of a fixed context length."""

    @property
    def max_tokens(self) -> int:
        """Length of the text encoder's context, of several the longest: what is behind it is not read."""

    def encode(self, text: str) -> Tokens:
        """Token ids of `text` as the text encoder takes them: of several tokenizers one after the other."""


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A checked manifest with values that are derived from it.

    Attributes:
        digest: SHA-256 of everything that decides pixels, apart from the request and the runtime.
        linear_weights: (C, 3 * k * k), maps a latent pixel to k x k pixels, in the order channel, row, column.
        files: the ONNX file of each component; none where it was loaded for the `torch` runtime.
        max_rows: the batch bound of each component, from its config.pbtxt.
        torch_folder: what the `torch` runtime loads; None where it was loaded for another one.
    """

    manifest: Manifest
    schedule: NoiseSchedule
    digest: str
    linear_weights: npt.NDArray[np.float32]
    linear_bias: npt.NDArray[np.float32]
    files: Mapping[Component, Path] = field(default_factory=dict)
    tokenizer: PromptTokenizer | None = None
    max_rows: Mapping[Component, int] = field(default_factory=dict)
    torch_folder: Path | None = None

    @property
    def name(self) -> str:
        """The model's id, as in "models/{name}": the manifest's, and icons@int8 of a quantized revision of icons."""
        return revisions.served_name(self.manifest.name, self.manifest.revision)

    def component_digest(self, component: Component) -> str:
        """Digest of all that decides a component's results, apart from the runtime; equal for equal components.

        An ONNX file whose weights lie beside it does not name them, and of the `torch` runtime's files none is a
        component's own: the digest is that of the pipeline then.
        """
        file = self.manifest.components[component]
        if not file.sha256:
            return self.digest
        return file.sha256 if file.data_sha256 is None else f"{file.sha256}-{file.data_sha256}"

    @property
    def precision(self) -> str:
        """What the denoiser computes with: "f32", or the scheme that it is quantized by."""
        return "f32" if self.manifest.quantization is None else self.manifest.quantization.scheme

    @property
    def has_preview_decoder(self) -> bool:
        """Whether TINY_DECODER previews are offered."""
        return Component.PREVIEW_DECODER in self.manifest.components

    @property
    def has_encoder(self) -> bool:
        """Whether development can start from a picture."""
        return Component.ENCODER in self.manifest.components

    @property
    def text_tokens(self) -> tuple[int, TokenizerFile]:
        """The tokenizer whose tokens the first rows of the hidden state stand for, and where its ids begin."""
        tokenizers, first = self.manifest.tokenizers, CONTEXT_TOKENIZERS.get(self.manifest.family, (0,))[0]
        return sum(at.max_tokens for at in tokenizers[:first]), tokenizers[first]

    @property
    def embedding_outputs(self) -> tuple[str, ...]:
        """The outputs of the text encoder that are kept of a prompt, for the denoiser; the hidden state comes first."""
        sources = self.manifest.inputs.values()
        bound = [at.removeprefix(ENCODER_SOURCE) for at in sources if at.startswith(ENCODER_SOURCE)]
        return tuple(dict.fromkeys([HIDDEN_STATE, *bound]))

    def size_ids(self, latent_shape: tuple[int, int, int]) -> npt.NDArray[np.float32]:
        """The input "size_ids" of the pictures that have a latent shape, (6,)."""
        size = self.picture_size(latent_shape)
        return np.array([*size, 0, 0, *size], np.float32)

    def picture_size(self, latent_shape: tuple[int, int, int]) -> tuple[int, int]:
        """(H, W) in pixels of the pictures that have a latent shape."""
        first, latent = self.manifest.sizes[0], self.manifest.latent
        return latent_shape[1] * first.height_px // latent.height, latent_shape[2] * first.width_px // latent.width

    def latent_shape(self, width_px: int, height_px: int) -> tuple[int, int, int]:
        """(C, h, w) for a picture size that is offered."""
        first, latent = self.manifest.sizes[0], self.manifest.latent
        return (
            latent.channels,
            latent.height * height_px // first.height_px,
            latent.width * width_px // first.width_px,
        )


def assemble(manifest: Manifest, files: Mapping[Component, Path], tokenizer: PromptTokenizer | None = None) -> Pipeline:
    """Makes a pipeline of a manifest without checking its files."""
    return Pipeline(
        manifest=manifest,
        schedule=NoiseSchedule(**manifest.noise_schedule.model_dump()),
        digest=_digest(manifest),
        linear_weights=np.array(manifest.linear_preview.weights, np.float32),
        linear_bias=np.array(manifest.linear_preview.bias, np.float32),
        files=files,
        tokenizer=tokenizer,
    )


def _digest(manifest: Manifest) -> str:
    decides = manifest.model_dump(
        mode="json",
        include={
            "family",
            "components",
            "tokenizer",
            "second_tokenizer",
            "third_tokenizer",
            "latent",
            "prediction_type",
            "noise_schedule",
        },
        exclude={"components": {"__all__": {"row_bytes"}}},
    )
    for key in ("second_tokenizer", "third_tokenizer"):  # else it is not the digest of before there were any
        if decides[key] is None:
            del decides[key]
    for key in decides.keys() & {"tokenizer", "second_tokenizer", "third_tokenizer"}:  # likewise
        if decides[key]["template"] is None:
            del decides[key]["template"]
    if manifest.torch is not None:  # likewise
        decides["torch"] = dict(manifest.torch.files)
    if manifest.prediction_type != "flow":  # likewise
        for key in ONLY_FLOW:
            del decides["noise_schedule"][key]
    for component in decides["components"].values():
        if component["data_sha256"] is None:
            del component["data_sha256"]
    if dict(manifest.inputs) != STABLE_DIFFUSION_INPUTS:  # keeps the digest of manifests that are older than this field
        decides["inputs"] = dict(manifest.inputs)
    if manifest.adapters is not None:
        decides["adapters"] = manifest.adapters.model_dump(mode="json", exclude_defaults=True)  # likewise: no kernels
    if manifest.text_adapters is not None:
        decides["text_adapters"] = manifest.text_adapters.model_dump(mode="json", exclude_defaults=True)
    if manifest.controls:  # their order is that of the networks in the denoiser
        decides["controls"] = list(manifest.controls)
    if manifest.image_prompt is not None:
        decides["image_prompt"] = manifest.image_prompt.model_dump(mode="json")
    canonical = json.dumps([SAMPLER_VERSION, decides], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
