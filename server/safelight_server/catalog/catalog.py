"""Loads and checks the pipelines below `models/`: one manifest each, on top of a Triton model repository.

`models/pipelines/<name>/<revision>/pipeline.json` names the components and
their versions, the tokenizer and the samplers of a pipeline;
`models/repository/` is a plain Triton model repository. Digests, shapes and
samplers are checked at load. Invariant: a `Pipeline` that was loaded can be run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from safelight_server.catalog import config_pbtxt, digest, revisions
from safelight_server.catalog.adapters import AdapterLibrary, is_of_text
from safelight_server.catalog.manifest import (
    ADAPTER_INPUTS,
    ADAPTER_SCALES_SOURCE,
    ADAPTER_WEIGHTS_SOURCE,
    CONTEXT_TOKENIZERS,
    CONTROL_IMAGES_SOURCE,
    CONTROL_INPUTS,
    CONTROL_SCALES_SOURCE,
    ENCODER_SOURCE,
    GUIDANCE_SOURCE,
    HIDDEN_STATE,
    IMAGE_PROMPT_INPUTS,
    IMAGE_PROMPT_OUTPUTS,
    IMAGE_PROMPT_SCALE_SOURCE,
    IMAGE_PROMPT_TOKENS_SOURCE,
    INPAINTING_INPUTS,
    LATENT_SOURCE,
    MASK_SOURCE,
    MASKED_IMAGE_SOURCE,
    SIZE_IDS_SOURCE,
    STABLE_DIFFUSION_INPUTS,
    TIMESTEP_SOURCE,
    AdapterRoom,
    Manifest,
    TokenizerFile,
)
from safelight_server.catalog.tokenizer import Tokenizer, TokenizerGroup, Tokens
from safelight_server.domain.component import OPTIONAL, Component
from safelight_server.domain.errors import NotFoundError
from safelight_server.sampler import VERSION as SAMPLER_VERSION
from safelight_server.sampler import NoiseSchedule, SamplerSpec, refusal

DATA_FILE = "model.onnx.data"
"""The file with the weights of a model.onnx that would exceed protobuf's 2 GiB with them."""
ONLY_FLOW = (
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "patch_size",
)
"""What the noise schedule of flow matching alone has."""


WeightKind = Literal["onnx", "torch"]
"""The files in which weights lie: those of ONNX Runtime and Triton, or those of the `torch` runtime."""


class PromptTokenizer(Protocol):
    """Turns prompts into token ids of a fixed context length."""

    @property
    def max_tokens(self) -> int:
        """Length of the text encoder's context, of several the longest: what is behind it is not read."""

    def encode(self, text: str) -> Tokens:
        """Token ids of `text` as the text encoder takes them: of several tokenizers one after the other."""


class ManifestError(Exception):
    """A manifest, or a file that it names, is invalid; the message names the file and every fault."""


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


@dataclass(frozen=True, slots=True)
class UnavailablePipeline:
    """A pipeline that exists and cannot be served. Clients see `reason`, whose paths begin at the folder of models."""

    name: str
    revision: str
    reason: str


class Catalog:
    """All pipelines by name, one of which is the default, and the faulty pipelines, which are left out.

    Args:
        default: the name of the default; empty: the first by name, of those that do not only inpaint if there are any.
        require_all: whether a pipeline that cannot be served is an error.

    Attributes:
        unavailable: the pipelines that are left out, by name.
        adapters: the adapters that requests can name.
    """

    def __init__(
        self,
        pipelines: list[Pipeline],
        default: str = "",
        unavailable: Iterable[UnavailablePipeline] = (),
        *,
        require_all: bool = True,
    ) -> None:
        self.pipelines = {pipeline.name: pipeline for pipeline in sorted(pipelines, key=lambda p: p.name)}
        self.unavailable = {at.name: at for at in sorted(unavailable, key=lambda at: at.name)}
        self._wanted = default
        self._require_all = require_all
        self.adapters = AdapterLibrary()
        self.default = self._find_default()

    def leave_out(self, name: str, reason: str) -> None:
        """Stops serving the pipeline `name`. A runtime calls this while it starts.

        Raises:
            ManifestError: all are required, `name` is the default by setting, or no pipeline is left.
        """
        if self._require_all:
            raise ManifestError(reason)
        pipeline = self.pipelines.pop(name)
        self.unavailable[name] = UnavailablePipeline(name, pipeline.manifest.revision, reason)
        self.default = self._find_default()

    def _find_default(self) -> str:
        # Requests that name no model mostly bring no mask, without which a model that inpaints refuses them.
        from_text = (name for name, pipeline in self.pipelines.items() if not pipeline.manifest.is_inpainting)
        default = self._wanted or next(from_text, next(iter(self.pipelines), ""))
        if default in self.pipelines:
            return default
        if default in self.unavailable:
            raise ManifestError(f"the default model {default!r} cannot be served: {self.unavailable[default].reason}")
        if self.unavailable and not self.pipelines:
            reasons = "; ".join(f"{at.name}: {at.reason}" for at in self.unavailable.values())
            raise ManifestError(f"no model can be served: {reasons}")
        raise ManifestError(f"default_model: there is no {default!r}; there is {', '.join(self.pipelines)}")

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


def load(models: Path, default: str = "", *, require_all: bool = True, weights: WeightKind = "onnx") -> Catalog:
    """Loads every pipeline below `models`; of several revisions the newest float and the newest quantized one.

    Args:
        require_all: whether an invalid pipeline is an error. If not, it is left out, and the others are served.
        weights: which files of the weights are needed and checked.

    Raises:
        ManifestError: there is no pipeline, or one that is required is invalid.
    """
    found = sorted(models.glob("pipelines/*/*/pipeline.json"))
    ordered = sorted(found, key=lambda at: revisions.order(at.parent.name))
    newest = {revisions.served_name(path.parent.parent.name, path.parent.name): path for path in ordered}
    if not newest:
        what = f"{models} has no model: there is no {models}/pipelines/NAME/REVISION/pipeline.json"
        raise ManifestError(f"{what}; set models_dir (--models-dir, SAFELIGHT_MODELS_DIR) to the folder of the models")
    loaded, unavailable = [], []
    for name, path in sorted(newest.items()):
        try:
            loaded.append(load_pipeline(path, models / "repository", weights))
        except ManifestError as error:
            if require_all:
                raise
            unavailable.append(UnavailablePipeline(name, path.parent.name, str(error).replace(f"{models}/", "")))
    return Catalog(loaded, default, unavailable, require_all=require_all)


def load_pipeline(path: Path, repository: Path, weights: WeightKind = "onnx") -> Pipeline:
    """Loads one pipeline and checks its manifest and files.

    Args:
        weights: which files of the weights are needed and checked.

    Raises:
        ManifestError: the manifest or one of its files is invalid.
    """
    try:
        manifest = Manifest.model_validate(json.loads(path.read_bytes()))
    except (ValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: {_faults(error)}") from None
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}") from None
    roles = manifest.components
    faults = [f"components: {role} is missing" for role in Component if role not in roles and role not in OPTIONAL]
    if weights == "torch":
        files: dict[Component, Path] = {}
        configs_at = {role: path.parent / "torch" / "configs" / f"{role}.pbtxt" for role in roles}
        faults += _check_torch(manifest, path)
    else:
        files = {role: repository / at.model / str(at.version) / "model.onnx" for role, at in roles.items()}
        configs_at = {role: repository / at.model / "config.pbtxt" for role, at in roles.items()}
        faults += _check_onnx(manifest, files, path)
    for at in manifest.tokenizers:
        faults += _check_file(path.parent / at.file, at.sha256)
    pipeline = assemble(manifest, files)
    faults += check(manifest)
    configs, unread = _read_configs(configs_at)
    faults += unread + _check_configs(pipeline, configs)
    if (manifest.name, manifest.revision) != (path.parent.parent.name, path.parent.name):
        faults.append(f"name, revision: {manifest.name}/{manifest.revision} is not the folder's")
    if faults:
        raise ManifestError(f"{path}: " + "; ".join(faults))
    return replace(
        pipeline,
        tokenizer=_read_tokenizer(manifest, path.parent),
        max_rows={role: at.max_rows for role, at in configs.items()},
        torch_folder=path.parent / "torch" if weights == "torch" else None,
    )


def _check_onnx(manifest: Manifest, files: Mapping[Component, Path], path: Path) -> list[str]:
    """Checks the digests of the ONNX files.

    Raises:
        ManifestError: the pipeline has none.
    """
    if not all(at.sha256 for at in manifest.components.values()):
        what = "export it with --format onnx or both, or serve it with runtime torch"
        raise ManifestError(f"{path}: it was exported for torch alone, without ONNX files: {what}")
    faults = []
    for role, file in files.items():
        component = manifest.components[role]
        faults += _check_file(file, component.sha256)
        if component.data_sha256 is not None:
            faults += _check_file(file.with_name(DATA_FILE), component.data_sha256)
    return faults


def _check_torch(manifest: Manifest, path: Path) -> list[str]:
    """Checks the digests of the files of the `torch` runtime, and that there are no others.

    Raises:
        ManifestError: the pipeline has none.
    """
    if manifest.torch is None:
        what = "export it with --format torch or both, or serve it with runtime onnx"
        raise ManifestError(f"{path}: it was exported without files for the torch runtime: {what}")
    folder, faults = path.parent / "torch", []
    for name, sha256 in manifest.torch.files.items():
        faults += _check_file(folder / name, sha256)
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    others = sorted(found - manifest.torch.files.keys())
    return faults + [f"torch: {folder / name} is not in the manifest" for name in others]


def _read_tokenizer(manifest: Manifest, folder: Path) -> PromptTokenizer:
    opened = [_open_tokenizer(at, folder) for at in manifest.tokenizers]
    return opened[0] if len(opened) == 1 else TokenizerGroup(*opened)


def _open_tokenizer(at: TokenizerFile, folder: Path) -> Tokenizer:
    file = folder / at.file
    try:
        around = None if at.template is None else (at.template.before, at.template.after)
        return Tokenizer(file, at.max_tokens, at.pad_id, at.bos_id, at.eos_id, around)
    except Exception as error:  # noqa: BLE001  # what tokenizers raises is an Exception and nothing more
        raise ManifestError(f"{file}: {error}") from None


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


def _faults(error: ValidationError | json.JSONDecodeError | UnicodeDecodeError) -> str:
    if not isinstance(error, ValidationError):
        return f"not JSON: {error}"
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())


def _check_file(file: Path, sha256: str) -> list[str]:
    if not file.is_file():
        return [f"{file} is missing"]
    try:
        found = digest.sha256(file)
    except OSError as error:
        return [f"{file}: {error.strerror}"]
    return [] if found == sha256 else [f"{file}: sha256 is {found[:12]}…, the manifest says {sha256[:12]}…"]


def check(manifest: Manifest) -> list[str]:
    """The faults of a manifest that its types do not exclude. Each fault begins with the name of its field."""
    pipeline = assemble(manifest, {})
    first, latent, preview = manifest.sizes[0], manifest.latent, manifest.linear_preview
    faults = [
        f"sizes: {size.width_px}x{size.height_px} is no multiple of the latent's pixels"
        for size in manifest.sizes
        if size.width_px * latent.width % first.width_px or size.height_px * latent.height % first.height_px
    ]
    columns = 3 * preview.block**2
    if pipeline.linear_weights.shape != (latent.channels, columns) or pipeline.linear_bias.shape != (columns,):
        faults.append(f"linear_preview: weights must be {latent.channels} x {columns} and bias {columns}")
    sources = set(manifest.inputs.values()) & set(ADAPTER_INPUTS.values())
    if len(sources) != (0 if manifest.adapters is None else len(ADAPTER_INPUTS)):
        faults.append("adapters: goes with inputs of both adapter_weights and adapter_scales")
    faults += _check_text_adapters(manifest)
    sources = set(manifest.inputs.values()) & set(CONTROL_INPUTS.values())
    if len(sources) != (len(CONTROL_INPUTS) if manifest.controls else 0):
        faults.append("controls: goes with inputs of both control_images and control_scales")
    if len(set(manifest.controls)) < len(manifest.controls):
        faults.append("controls: has a name twice")
    prompted = (
        manifest.image_prompt is not None,
        Component.IMAGE_ENCODER in manifest.components,
        *(source in manifest.inputs.values() for source in IMAGE_PROMPT_INPUTS.values()),
    )
    if len(set(prompted)) > 1:
        both = " and ".join(IMAGE_PROMPT_INPUTS)
        faults.append(f"image_prompt: goes with a component image_encoder and inputs of {both}")
    inpainting = set(manifest.inputs.values()) & set(INPAINTING_INPUTS.values())
    if inpainting and (len(inpainting) < len(INPAINTING_INPUTS) or Component.ENCODER not in manifest.components):
        faults.append("inputs: mask and masked_image go together, and with a component encoder")
    faults += _check_tokenizers(manifest)
    if manifest.defaults.num_inference_steps > manifest.limits.max_num_inference_steps:
        faults.append("defaults.num_inference_steps: above the limit")
    if manifest.defaults.guidance_scale > manifest.limits.max_guidance_scale:
        faults.append("defaults.guidance_scale: above the limit")
    stated = manifest.quantization.scheme if manifest.quantization is not None else ""
    if revisions.scheme(manifest.revision) != stated:
        faults.append(f"revision: {manifest.revision} is the name of one that is {'not ' if stated else ''}quantized")
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


def _check_text_adapters(manifest: Manifest) -> list[str]:
    room, text_room = manifest.adapters, manifest.text_adapters
    if text_room is None:
        return []
    if room is None:
        return ["text_adapters: goes with adapters"]
    if room.max_rank != text_room.max_rank:
        return [f"text_adapters.max_rank: {text_room.max_rank} is not that of adapters, {room.max_rank}"]
    others = [target.name for target in text_room.targets if not is_of_text(target.name)]
    return [f"text_adapters.targets: {name} is no layer of a text encoder" for name in others]


def _check_tokenizers(manifest: Manifest) -> list[str]:
    second, places = manifest.second_tokenizer, CONTEXT_TOKENIZERS.get(manifest.family, (0,))
    needed = ("tokenizer", "second_tokenizer", "third_tokenizer")[: max(places) + 1]
    faults = [f"{name}: {manifest.family} needs one" for name in needed if getattr(manifest, name) is None]
    if manifest.third_tokenizer is not None and second is None:
        faults.append("third_tokenizer: there is no second one")
    if second is not None and manifest.family != "flux" and second.max_tokens != manifest.tokenizer.max_tokens:
        faults.append(f"second_tokenizer.max_tokens: {second.max_tokens} is not the first tokenizer's")
    return faults


def _read_configs(files: Mapping[Component, Path]) -> tuple[dict[Component, config_pbtxt.ModelConfig], list[str]]:
    configs, faults = {}, []
    for role, file in files.items():
        try:
            configs[role] = config_pbtxt.read(file)
        except config_pbtxt.ConfigError as error:
            faults.append(str(error))
    return configs, faults


def _check_configs(pipeline: Pipeline, configs: Mapping[Component, config_pbtxt.ModelConfig]) -> list[str]:
    """Checks batch bounds and shapes of the components against the manifest, at every picture size; returns faults."""
    manifest = pipeline.manifest
    faults = [
        f"components.{role}: max_batch_size must be at least 1" for role, at in configs.items() if at.max_rows < 1
    ]
    num_ids = sum(at.max_tokens for at in manifest.tokenizers)
    context = sum(at.max_tokens for at in manifest.context_tokenizers)
    encoder = configs.get(Component.TEXT_ENCODER)
    made = {} if encoder is None else encoder.outputs
    faults += [
        f"inputs: the text encoder has no output {name}; it has {', '.join(made)}"
        for name in pipeline.embedding_outputs
        if encoder is not None and name not in made
    ]
    of_prompts = {} if manifest.text_adapters is None else _adapter_shapes(manifest.text_adapters)
    extra = set() if encoder is None else (encoder.inputs.keys() & ADAPTER_INPUTS.keys()) - of_prompts.keys()
    faults += [f"text_adapters: {name} of the text encoder is bound to nothing" for name in sorted(extra)]
    for size in manifest.sizes:
        latent = pipeline.latent_shape(size.width_px, size.height_px)
        shapes = {ENCODER_SOURCE + name: shape for name, shape in made.items()}
        shapes |= {LATENT_SOURCE: latent, TIMESTEP_SOURCE: (1,), GUIDANCE_SOURCE: (1,), SIZE_IDS_SOURCE: (6,)}
        shapes |= {MASK_SOURCE: (1, *latent[1:]), MASKED_IMAGE_SOURCE: latent}
        if (room := manifest.adapters) is not None:
            shapes |= _adapter_shapes(room)
        if count := len(manifest.controls):
            pictures = (count, 3, size.height_px, size.width_px)
            shapes |= {CONTROL_IMAGES_SOURCE: pictures, CONTROL_SCALES_SOURCE: (count,)}
        prompt_tokens: tuple[int, ...] = ()
        edge = 0
        if (prompts := manifest.image_prompt) is not None:
            prompt_tokens, edge = (prompts.num_tokens, prompts.width), prompts.edge_px
            shapes |= {IMAGE_PROMPT_TOKENS_SOURCE: prompt_tokens, IMAGE_PROMPT_SCALE_SOURCE: (1,)}
        inputs: dict[Component, dict[str, tuple[int, ...]]] = {
            Component.TEXT_ENCODER: {"input_ids": (num_ids,), **of_prompts},
            Component.DENOISER: {name: shapes.get(at, (context, -1)) for name, at in manifest.inputs.items()},
            Component.DECODER: {"latent": latent},
            Component.PREVIEW_DECODER: {"latent": latent},
            Component.ENCODER: {"image": (3, size.height_px, size.width_px)},
            Component.IMAGE_ENCODER: {"image": (3, edge, edge)},
        }
        outputs: dict[Component, dict[str, tuple[int, ...]]] = {
            Component.TEXT_ENCODER: {"last_hidden_state": (context, -1)},
            Component.DENOISER: {"prediction": latent},
            Component.DECODER: {"image": (3, size.height_px, size.width_px)},
            Component.PREVIEW_DECODER: {"image": (3, -1, -1)},
            Component.ENCODER: {"mean": latent},
            Component.IMAGE_ENCODER: dict.fromkeys(IMAGE_PROMPT_OUTPUTS, prompt_tokens),
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


def _adapter_shapes(room: AdapterRoom) -> dict[str, tuple[int, ...]]:
    return {ADAPTER_WEIGHTS_SOURCE: (room.max_rank, room.width), ADAPTER_SCALES_SOURCE: (room.max_rank,)}
