"""Loads and checks the pipelines below `models/`: one manifest each, on top of a Triton model repository.

`models/pipelines/<name>/<revision>/pipeline.json` names the components and
their versions, the tokenizer and the samplers of a pipeline;
`models/repository/` is a plain Triton model repository. Digests, shapes and
samplers are checked at load. Invariant: a `Pipeline` that was loaded can be run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from safelight_server.catalog import config_pbtxt, revisions
from safelight_server.catalog.tokenizer import Tokenizer, Tokens
from safelight_server.domain.component import OPTIONAL, Component
from safelight_server.domain.errors import NotFoundError
from safelight_server.sampler import VERSION as SAMPLER_VERSION
from safelight_server.sampler import NoiseSchedule, SamplerSpec, refusal

Positive = Annotated[int, Field(gt=0)]


class PromptTokenizer(Protocol):
    """Turns prompts into token ids of a fixed context length."""

    @property
    def max_tokens(self) -> int:
        """Length of the context: every prompt becomes this many token ids."""

    def encode(self, text: str) -> Tokens:
        """Token ids of `text`, (T,), cut to the context."""


class ManifestError(Exception):
    """A manifest, or a file that it names, is invalid; the message names the file and every fault."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ComponentFile(_Strict):
    """The model of a component in the Triton repository, with version and digest."""

    model: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
    version: Positive
    sha256: str


class TokenizerFile(_Strict):
    """A `tokenizers` file beside the manifest, and CLIP's special tokens."""

    file: str
    sha256: str
    max_tokens: Positive
    pad_id: int
    bos_id: int
    eos_id: int


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
    shift: float = 1.0


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


HIDDEN_STATE = "last_hidden_state"
"""The output of the text encoder that every pipeline has: the embedding (T, D), by which prompts are compared."""
ENCODER_SOURCE = "encoder:"
LATENT_SOURCE, TIMESTEP_SOURCE, SIZE_IDS_SOURCE = "latent", "timestep", "size_ids"
STABLE_DIFFUSION_INPUTS = {
    "sample": LATENT_SOURCE,
    "timestep": TIMESTEP_SOURCE,
    "encoder_hidden_states": ENCODER_SOURCE + HIDDEN_STATE,
}


class Manifest(_Strict):
    """The contents of pipeline.json. `guard` and `example_prompts` help the approximate caches and may be left out.

    Attributes:
        inputs: the inputs of the denoiser by name, each with what it is given: "latent", "timestep", "encoder:OUTPUT"
            (an output of the text encoder, by prompt), or "size_ids" (the picture's height and width, a crop of none,
            and height and width again: SDXL's micro-conditioning, Podell et al. 2023, section 2.2).
    """

    format: Literal[1]
    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,62}$")]
    revision: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,62}$")]
    description: str
    license: str
    family: Literal["stable-diffusion", "stable-diffusion-xl"]
    components: Mapping[Component, ComponentFile]
    tokenizer: TokenizerFile
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
    inputs: Mapping[str, Annotated[str, Field(pattern=r"^(latent|timestep|size_ids|encoder:[A-Za-z0-9_]+)$")]] = (
        STABLE_DIFFUSION_INPUTS
    )


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A checked manifest with what is derived from it.

    Attributes:
        digest: SHA-256 of all that decides pixels besides the request and the runtime.
        linear_weights: (C, 3 * k * k), maps a latent pixel to k x k pixels, in the order channel, row, column.
        files: the ONNX file of each component.
        max_rows: the batch bound of each component, from its config.pbtxt.
    """

    manifest: Manifest
    schedule: NoiseSchedule
    digest: str
    linear_weights: npt.NDArray[np.float32]
    linear_bias: npt.NDArray[np.float32]
    files: Mapping[Component, Path] = field(default_factory=dict)
    tokenizer: PromptTokenizer | None = None
    max_rows: Mapping[Component, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The model's id, as in "models/{name}"."""
        return self.manifest.name

    @property
    def has_preview_decoder(self) -> bool:
        """Whether TINY_DECODER previews are offered."""
        return Component.PREVIEW_DECODER in self.manifest.components

    @property
    def has_encoder(self) -> bool:
        """Whether development can start from a picture."""
        return Component.ENCODER in self.manifest.components

    @property
    def embedding_outputs(self) -> tuple[str, ...]:
        """The outputs of the text encoder that are kept of a prompt: what the denoiser is given, hidden state first."""
        sources = self.manifest.inputs.values()
        bound = [at.removeprefix(ENCODER_SOURCE) for at in sources if at.startswith(ENCODER_SOURCE)]
        return tuple(dict.fromkeys([HIDDEN_STATE, *bound]))

    def size_ids(self, latent_shape: tuple[int, int, int]) -> npt.NDArray[np.float32]:
        """The input "size_ids" of the pictures that have a latent shape, (6,)."""
        first, latent = self.manifest.sizes[0], self.manifest.latent
        size = latent_shape[1] * first.height_px // latent.height, latent_shape[2] * first.width_px // latent.width
        return np.array([*size, 0, 0, *size], np.float32)

    def latent_shape(self, width_px: int, height_px: int) -> tuple[int, int, int]:
        """(C, h, w) for a picture size that is offered."""
        first, latent = self.manifest.sizes[0], self.manifest.latent
        return (
            latent.channels,
            latent.height * height_px // first.height_px,
            latent.width * width_px // first.width_px,
        )


class Catalog:
    """All pipelines by name, one of which is the default."""

    def __init__(self, pipelines: list[Pipeline], default: str = "") -> None:
        self.pipelines = {pipeline.name: pipeline for pipeline in sorted(pipelines, key=lambda p: p.name)}
        self.default = default or next(iter(self.pipelines), "")
        if self.default not in self.pipelines:
            raise ManifestError(
                f"the default model {self.default!r} is not there; there is {', '.join(self.pipelines)}"
            )

    def get(self, name: str) -> Pipeline:
        """The pipeline of that name; empty means the default.

        Raises:
            NotFoundError: no pipeline has that name.
        """
        pipeline = self.pipelines.get(name or self.default)
        if pipeline is None:
            known = ", ".join(f"models/{known}" for known in self.pipelines)
            raise NotFoundError(f"there is no model models/{name}; there is {known}", reason="MODEL_NOT_FOUND")
        return pipeline


def load(models: Path, default: str = "") -> Catalog:
    """Loads every pipeline below `models`; of several revisions the newest (`revisions.order`).

    Raises:
        ManifestError: there is no pipeline, or one is invalid.
    """
    found = sorted(models.glob("pipelines/*/*/pipeline.json"))
    newest = {path.parent.parent.name: path for path in sorted(found, key=lambda at: revisions.order(at.parent.name))}
    if not newest:
        raise ManifestError(f"no pipelines/*/*/pipeline.json in {models}")
    return Catalog([load_pipeline(path, models / "repository") for _, path in sorted(newest.items())], default)


def load_pipeline(path: Path, repository: Path) -> Pipeline:
    """Loads one pipeline and checks its manifest and files.

    Raises:
        ManifestError: the manifest or one of its files is invalid.
    """
    try:
        manifest = Manifest.model_validate(json.loads(path.read_bytes()))
    except (ValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: {_faults(error)}") from None
    files = {
        role: repository / component.model / str(component.version) / "model.onnx"
        for role, component in manifest.components.items()
    }
    faults = [f"components: {role} is missing" for role in Component if role not in files and role not in OPTIONAL]
    for role, file in files.items():
        faults += _check_file(file, manifest.components[role].sha256)
    text = path.parent / manifest.tokenizer.file
    faults += _check_file(text, manifest.tokenizer.sha256)
    pipeline = assemble(manifest, files)
    faults += _check(pipeline)
    configs, unread = _read_configs(manifest, repository)
    faults += unread + _check_configs(pipeline, configs)
    if (manifest.name, manifest.revision) != (path.parent.parent.name, path.parent.name):
        faults.append(f"name, revision: {manifest.name}/{manifest.revision} is not the folder's")
    if faults:
        raise ManifestError(f"{path}: " + "; ".join(faults))
    at = manifest.tokenizer
    tokenizer = Tokenizer(text, at.max_tokens, at.pad_id, at.bos_id, at.eos_id)
    return replace(pipeline, tokenizer=tokenizer, max_rows={role: at.max_rows for role, at in configs.items()})


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
        include={"family", "components", "tokenizer", "latent", "prediction_type", "noise_schedule"},
    )
    if (
        dict(manifest.inputs) != STABLE_DIFFUSION_INPUTS
    ):  # else the digest is that of a manifest from before there were any
        decides["inputs"] = dict(manifest.inputs)
    canonical = json.dumps([SAMPLER_VERSION, decides], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _faults(error: ValidationError | json.JSONDecodeError | UnicodeDecodeError) -> str:
    if not isinstance(error, ValidationError):
        return f"not JSON: {error}"
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())


def _check_file(file: Path, sha256: str) -> list[str]:
    if not file.is_file():
        return [f"{file} is missing"]
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    return [] if found == sha256 else [f"{file}: sha256 is {found[:12]}…, the manifest says {sha256[:12]}…"]


def _check(pipeline: Pipeline) -> list[str]:
    manifest = pipeline.manifest
    first, latent, preview = manifest.sizes[0], manifest.latent, manifest.linear_preview
    faults = [
        f"sizes: {size.width_px}x{size.height_px} is no multiple of the latent's pixels"
        for size in manifest.sizes
        if size.width_px * latent.width % first.width_px or size.height_px * latent.height % first.height_px
    ]
    columns = 3 * preview.block**2
    if pipeline.linear_weights.shape != (latent.channels, columns) or pipeline.linear_bias.shape != (columns,):
        faults.append(f"linear_preview: weights must be {latent.channels} x {columns} and bias {columns}")
    if manifest.defaults.num_inference_steps > manifest.limits.max_num_inference_steps:
        faults.append("defaults.num_inference_steps: above the limit")
    if manifest.defaults.guidance_scale > manifest.limits.max_guidance_scale:
        faults.append("defaults.guidance_scale: above the limit")
    at = manifest.defaults.sampler
    specs = [SamplerSpec(at.name, at.spacing, at.sigma_schedule, at.eta)]
    specs += [
        SamplerSpec(cells.name, spacing, sigmas)
        for cells in manifest.samplers
        for spacing in cells.spacings
        for sigmas in cells.sigma_schedules
    ]
    for spec in specs:
        why = refusal(spec, pipeline.schedule, manifest.prediction_type, manifest.defaults.num_inference_steps)
        if why:
            faults.append(f"samplers: {why}")
    if at.name not in {cells.name for cells in manifest.samplers}:
        faults.append(f"defaults.sampler: {at.name} is not among the samplers")
    return faults


def _read_configs(manifest: Manifest, repository: Path) -> tuple[dict[Component, config_pbtxt.ModelConfig], list[str]]:
    configs, faults = {}, []
    for role, component in manifest.components.items():
        try:
            configs[role] = config_pbtxt.read(repository / component.model / "config.pbtxt")
        except config_pbtxt.ConfigError as error:
            faults.append(str(error))
    return configs, faults


def _check_configs(pipeline: Pipeline, configs: Mapping[Component, config_pbtxt.ModelConfig]) -> list[str]:
    """Checks batch bounds and shapes of the components against the manifest, at every picture size; returns faults."""
    manifest = pipeline.manifest
    faults = [
        f"components.{role}: max_batch_size must be at least 1" for role, at in configs.items() if at.max_rows < 1
    ]
    tokens = manifest.tokenizer.max_tokens
    encoder = configs.get(Component.TEXT_ENCODER)
    made = {} if encoder is None else encoder.outputs
    faults += [
        f"inputs: the text encoder has no output {name}; it has {', '.join(made)}"
        for name in pipeline.embedding_outputs
        if encoder is not None and name not in made
    ]
    for size in manifest.sizes:
        latent = pipeline.latent_shape(size.width_px, size.height_px)
        shapes = {ENCODER_SOURCE + name: shape for name, shape in made.items()}
        shapes |= {LATENT_SOURCE: latent, TIMESTEP_SOURCE: (1,), SIZE_IDS_SOURCE: (6,)}
        inputs: dict[Component, dict[str, tuple[int, ...]]] = {
            Component.TEXT_ENCODER: {"input_ids": (tokens,)},
            Component.DENOISER: {name: shapes.get(at, (tokens, -1)) for name, at in manifest.inputs.items()},
            Component.DECODER: {"latent": latent},
            Component.PREVIEW_DECODER: {"latent": latent},
            Component.ENCODER: {"image": (3, size.height_px, size.width_px)},
        }
        outputs: dict[Component, dict[str, tuple[int, ...]]] = {
            Component.TEXT_ENCODER: {"last_hidden_state": (tokens, -1)},
            Component.DENOISER: {"prediction": latent},
            Component.DECODER: {"image": (3, size.height_px, size.width_px)},
            Component.PREVIEW_DECODER: {"image": (3, -1, -1)},
            Component.ENCODER: {"mean": latent},
        }
        if Component.ENCODER in configs and "std" in configs[Component.ENCODER].outputs:
            outputs[Component.ENCODER]["std"] = latent
        denoiser = configs.get(Component.DENOISER)
        unbound = () if denoiser is None else denoiser.inputs.keys() - manifest.inputs.keys()
        faults += [f"inputs: {name} of the denoiser is bound to nothing" for name in sorted(unbound)]
        for role, at in configs.items():
            wrong = config_pbtxt.mismatches(at.inputs, inputs[role])
            wrong += config_pbtxt.mismatches(at.outputs, outputs[role])
            faults += [f"components.{role}: config.pbtxt: {fault}" for fault in wrong]
    return list(dict.fromkeys(faults))
