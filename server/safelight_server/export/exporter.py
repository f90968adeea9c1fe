"""Exports a diffusers folder, or a checkpoint in one file, as a Triton model repository and a pipeline manifest.

For the pipelines that `source.FAMILIES` lists. A folder `preview_decoder/`
(AutoencoderTiny) and the files `encoder.npz` (a linear encoder instead of the
autoencoder's own), `linear_preview.npz` and `prompts.json` beside the networks are
used where they are there.
Weights are stored as float16 and cast at load; the arithmetic is float32. For the
`torch` runtime the networks are written as safetensors (`ExportFormat`). The
same folder gives the same bytes. Nothing in the folder of models changes before
every component was written, found equal to its torch module, and loaded by the
server's own catalog.
"""

from __future__ import annotations

import gc
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderTiny,
    DiffusionPipeline,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
)
from torch import Tensor, nn
from transformers import Qwen3Model, T5EncoderModel

from safelight_server.catalog.catalog import ManifestError, WeightKind, load_pipeline
from safelight_server.catalog.digest import sha256
from safelight_server.catalog.manifest import ENCODER_MASK_INPUT, Manifest
from safelight_server.export import controls, loading, manifest, memory, plan, torch_files
from safelight_server.export.adapters import Adapters, fitting, target_names
from safelight_server.export.components import (
    Decoder,
    Denoiser,
    DenoiserXL,
    Encoder,
    FluxDenoiser,
    FluxTextEncoders,
    PatchEncoder,
    StableDiffusion3Denoiser,
    StableDiffusion3TextEncoders,
    TextEncoder,
    TextEncoders,
    ZImageDenoiser,
    ZImageTextEncoder,
    decoder_of,
)
from safelight_server.export.controls import ControlledDenoiser
from safelight_server.export.image_prompts import IMAGE_ENCODER
from safelight_server.export.ip_adapter import ImagePromptEncoder, ImagePrompts
from safelight_server.export.networks import SCHNELL_T5_TOKENS
from safelight_server.export.onnx_file import check_parity, num_values, write_onnx
from safelight_server.export.options import ExportFormat, ExportOptions
from safelight_server.export.plan import ROLES, ExportPlan
from safelight_server.export.repository import write_config
from safelight_server.export.source import FAMILIES, ExportError
from safelight_server.export.staging import staging_folder
from safelight_server.export.text_adapters import fitting_text, text_adapters_of, text_room

Report = Callable[[str], None]
ENDS = ("", "_2", "_3")
"""Of the names of text encoders and tokenizers."""
UNSHARED = ("text_encoder", "denoiser", IMAGE_ENCODER)
"""Components whose weights no other component has."""
QUANTIZED = ("denoiser_int8",)
"""What `quantize` adds to the components."""
EXAMPLES = ("a red potion", "")
WRITTEN: Mapping[ExportFormat, tuple[WeightKind, ...]] = {
    ExportFormat.ONNX: ("onnx",),
    ExportFormat.TORCH: ("torch",),
    ExportFormat.BOTH: ("onnx", "torch"),
}
EXAMPLE_ROWS = len(EXAMPLES)


def export(folder: Path, models: Path, options: ExportOptions, report: Report = lambda line: None) -> ExportPlan:
    """Judges the folder, writes the components, then the manifest that binds them.

    Args:
        folder: a diffusers folder, or a checkpoint in one file.
        models: the folder with repository/ and pipelines/.
        report: called with a line for each step of the work.

    Raises:
        ExportError: the folder cannot be exported, ONNX Runtime does not agree with torch, or another revision uses
            the files that would be overwritten.
    """
    made = plan.make(folder, options)
    if not options.replace:
        refuse_to_break(models, made)
    with staging_folder(models) as staged, warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", module="torch|copyreg")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        report("reading the weights")
        pipeline = loading.load(made)
        _write(made, pipeline, staged, report)
        _install(staged, models, made)
    return made


def _write(made: ExportPlan, pipeline: DiffusionPipeline, staged: Path, report: Report) -> None:
    """Writes everything below `staged`, laid out like a folder of models, and loads it with the server's catalog."""
    options, folder = made.options, made.source.folder
    name, revision = options.name, options.revision
    pipeline_folder = staged / "pipelines" / name / revision
    pipeline_folder.mkdir(parents=True)
    report("checking the tokenizers")
    tokenizers = _write_tokenizers(pipeline, pipeline_folder)
    torch_folder = pipeline_folder / torch_files.TORCH_FOLDER
    if options.format is not ExportFormat.ONNX:
        report("writing safetensors")
        # Before layers are changed to take adapters and image prompts, which renames weights.
        torch_files.write(pipeline, made, torch_folder)
    components = _components(pipeline, made)
    adapters, of_text = _adapters_of(components["denoiser"]), _adapters_of(components["text_encoder"])
    for module in components.values():
        round_weights(module.eval())
        if isinstance(module, ImagePromptEncoder):
            module.prepare()
    (staged / "repository").mkdir()
    bound = {}
    for number, (role, module) in enumerate(components.items(), 1):
        report(f"{role} ({number} of {len(components)}): {_count(module):,} weights")
        place = staged / "repository" / f"{name}_{role}"
        bound[role] = _export_component(role, module, pipeline, place, made, report, torch_folder)
    report("fitting the linear preview")
    whole = {
        **plan.draft(made),
        "components": bound,
        **tokenizers,
        "linear_preview": manifest.linear_preview(made, folder / "linear_preview.npz", components["decoder"]),
        **manifest.prompts(folder / "prompts.json"),
        **({} if options.format is ExportFormat.ONNX else {"torch": {"files": torch_files.digests(torch_folder)}}),
        **({} if adapters is None else {"adapters": adapters.room(made.options.adapter_rank)}),
        **({} if of_text is None else {"text_adapters": text_room(of_text, made.options.adapter_rank)}),
    }
    (pipeline_folder / "pipeline.json").write_text(manifest.readable(whole))
    if (folder / "training.json").exists():
        shutil.copy(folder / "training.json", pipeline_folder / "training.json")
    try:
        for kind in WRITTEN[options.format]:
            load_pipeline(pipeline_folder / "pipeline.json", staged / "repository", kind)
    except ManifestError as error:
        raise ExportError(f"the server would refuse what was made: {error}") from None


def _tokenizers(pipeline: DiffusionPipeline) -> list[tuple[Any, Any]]:
    """The tokenizers, each with its text encoder."""
    pairs = [
        (getattr(pipeline, f"tokenizer{end}", None), getattr(pipeline, f"text_encoder{end}", None)) for end in ENDS
    ]
    return [(tokenizer, encoder) for tokenizer, encoder in pairs if tokenizer is not None]


def _write_tokenizers(pipeline: DiffusionPipeline, folder: Path) -> dict[str, Any]:
    """Writes the tokenizers; returns what the manifest says of them."""
    keys = ("tokenizer", "second_tokenizer", "third_tokenizer")
    pairs = zip(keys, _tokenizers(pipeline), strict=False)
    made = {
        key: manifest.tokenizer(*given, folder / f"{key}.json", max_tokens(pipeline, *given)) for key, given in pairs
    }
    lengths = {entry["max_tokens"] for entry in made.values() if entry["bos_id"] is not None}  # CLIP's
    if len(lengths) > 1:
        raise ExportError(f"the tokenizers cut texts at {' and '.join(map(str, sorted(lengths)))} tokens")
    return made


def _components(pipeline: DiffusionPipeline, made: ExportPlan, given: Manifest | None = None) -> dict[str, nn.Module]:
    """The components by role.

    Args:
        given: the manifest that says which layers adapters can change; None: those that the options choose.
    """
    prompts = None if made.image_prompt is None else ImagePrompts(pipeline.unet, made.image_prompt)
    adapters, network = None, getattr(pipeline, made.source.family.denoiser)
    if made.options.adapter_rank:
        names = target_names(network, made.options.adapter_layers)
        room = None if given is None else given.adapters
        adapters = Adapters(network, names) if room is None else fitting(network, room)
    of_text = None
    if made.has_text_adapters:
        of_text = text_adapters_of(pipeline) if given is None else fitting_text(pipeline, given.text_adapters)
    components: dict[str, nn.Module] = {
        "text_encoder": text_encoder_of(pipeline, of_text),
        "denoiser": denoiser_of(pipeline, adapters, prompts),
        "decoder": decoder_of(pipeline.vae),
    }
    if made.options.controls:
        components["denoiser"] = ControlledDenoiser(components["denoiser"], loading.control_networks(made))
    if "preview_decoder" in made.roles():
        preview = AutoencoderTiny.from_pretrained(made.source.folder / "preview_decoder", local_files_only=True)
        scale = pipeline.vae.config.scaling_factor / preview.config.scaling_factor
        components["preview_decoder"] = Decoder(preview, scale, _shift(pipeline))
    components["encoder"] = _encoder(pipeline, made.source.folder / "encoder.npz")
    if prompts is not None:
        components[IMAGE_ENCODER] = prompts.encoder
    return components


def load_components(folder: Path, given: Manifest) -> dict[str, nn.Module]:
    """The components of an exported folder of safetensors by role, on the CPU in float32, as they were exported.

    Args:
        folder: `torch/` beside the manifest `given`.

    Raises:
        ExportError: the folder cannot be read, or the denoiser lacks layers that adapters change.
    """
    made = plan.make(folder, torch_files.options_of(folder, given))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", module="torch|copyreg")
        components = _components(loading.load(made), made, given)
        for module in components.values():
            round_weights(module.eval().requires_grad_(False))
            if isinstance(module, ImagePromptEncoder):
                module.prepare()
    return components


def _adapters_of(module: nn.Module) -> Adapters | None:
    found: Adapters | None = getattr(module, "adapters", None)
    return found


def text_encoder_of(pipeline: DiffusionPipeline, adapters: Adapters | None = None) -> nn.Module:
    """The text encoder of a pipeline, or all of them; `adapters`: with room for them in those that are CLIP's."""
    first, clip_tokens = pipeline.text_encoder, max_tokens(pipeline, pipeline.tokenizer, pipeline.text_encoder)
    if isinstance(pipeline, FluxPipeline):
        return FluxTextEncoders(first, pipeline.text_encoder_2, clip_tokens, adapters)
    if isinstance(pipeline, StableDiffusion3Pipeline):
        others = pipeline.text_encoder_2, pipeline.text_encoder_3
        return StableDiffusion3TextEncoders(first, *others, clip_tokens, adapters)
    if isinstance(pipeline, ZImagePipeline):
        return ZImageTextEncoder(first, pipeline.tokenizer.pad_token_id)
    if not isinstance(pipeline, StableDiffusionXLPipeline):
        return TextEncoder(first, adapters)
    empty_ids = token_ids(pipeline, [""])[0] if pipeline.config.force_zeros_for_empty_prompt else None
    return TextEncoders(first, pipeline.text_encoder_2, empty_ids, adapters)


def denoiser_of(
    pipeline: DiffusionPipeline, adapters: Adapters | None = None, prompts: ImagePrompts | None = None
) -> nn.Module:
    """The denoiser of a pipeline; `adapters`, `prompts`: with room for them, the latter where it has a UNet."""
    if isinstance(pipeline, FluxPipeline):
        return FluxDenoiser(pipeline.transformer, adapters)
    if isinstance(pipeline, StableDiffusion3Pipeline):
        return StableDiffusion3Denoiser(pipeline.transformer, adapters)
    if isinstance(pipeline, ZImagePipeline):
        return ZImageDenoiser(pipeline.transformer, adapters)
    is_sdxl = isinstance(pipeline, StableDiffusionXLPipeline)
    return (DenoiserXL if is_sdxl else Denoiser)(pipeline.unet, adapters, prompts)


def max_tokens(pipeline: DiffusionPipeline, tokenizer: Any, text_encoder: Any) -> int:
    """Length of a text encoder's context in a pipeline."""
    if not isinstance(text_encoder, T5EncoderModel | Qwen3Model):
        return manifest.max_tokens(tokenizer, text_encoder)
    is_schnell = isinstance(pipeline, FluxPipeline) and not pipeline.transformer.config.guidance_embeds
    longest = SCHNELL_T5_TOKENS if is_schnell else FAMILIES[type(pipeline).__name__].max_tokens
    return int(min(tokenizer.model_max_length, longest))


def _shift(pipeline: DiffusionPipeline) -> float:
    """What latents are shifted by before they are decoded; the pipelines with a UNet ignore it."""
    return float(pipeline.vae.config.shift_factor or 0.0) if hasattr(pipeline, "transformer") else 0.0


def _encoder(pipeline: DiffusionPipeline, given: Path) -> nn.Module:
    """The linear encoder of `given`, an npz of weight (C, 3, p, p) and bias (C,), else the autoencoder's."""
    if not given.exists():
        return Encoder(pipeline.vae)
    with np.load(given) as arrays:
        return PatchEncoder(torch.from_numpy(arrays["weight"]), torch.from_numpy(arrays["bias"]))


def _export_component(
    role: str,
    module: nn.Module,
    pipeline: DiffusionPipeline,
    place: Path,
    made: ExportPlan,
    report: Report,
    torch_folder: Path,
) -> dict[str, Any]:
    """Writes one component below `place`; returns what the manifest says of it."""
    version = made.options.version
    sizes = made.latent_sizes if role not in ("text_encoder", IMAGE_ENCODER) else made.latent_sizes[:1]
    examples = [example_inputs(role, pipeline, made, size) for size in sizes]
    adapters = _adapters_of(module)
    if adapters is not None:
        own = adapters.examples(made.options.adapter_rank, EXAMPLE_ROWS)
        examples = [{**example, **own} for example in examples]
        report(f"{place.name}: room for adapters takes {4 * own['adapter_weights'][0].numel() / 2**20:.1f} MiB a row")
    if isinstance(module, ControlledDenoiser):
        examples = [module.examples(example, made.factor) for example in examples]
    if made.options.format is not ExportFormat.ONNX:
        file = torch_folder / "configs" / f"{role}.pbtxt"
        file.parent.mkdir(exist_ok=True)
        write_config(file, place.name, made.max_rows(role), examples, module)
    if made.options.format is ExportFormat.TORCH:
        row_bytes = memory.torch_row_bytes(module, max(examples, key=num_values))
        report(f"{place.name}: {row_bytes / 2**20:.1f} MiB a row")
        return {"model": place.name, "version": version, "sha256": "", "row_bytes": row_bytes}
    target = place / str(version) / "model.onnx"
    multiple = {"denoiser": made.multiple, "encoder": made.factor}.get(role, 1)
    compared = examples
    if isinstance(module, ControlledDenoiser):
        compared = [*examples, *controls.idle(examples[0])]
        data = controls.write_controlled(module, examples, target, multiple)
    else:
        data = write_onnx(
            module, examples, module.outputs, target, multiple, made.largest_edge if role == "denoiser" else None
        )
    worst = check_parity(module, compared, module.outputs, target)
    write_config(place / "config.pbtxt", place.name, made.max_rows(role), examples, module)
    if role in UNSHARED:
        module.to("meta")  # frees the memory of weights that are not needed any more
        gc.collect()
    row_bytes = memory.row_bytes(target, max(examples, key=num_values))
    num_bytes = target.stat().st_size + (data.stat().st_size if data else 0)
    report(f"{place.name}: {num_bytes / 2**20:.2f} MiB, off by at most {worst:.1e}, {row_bytes / 2**20:.1f} MiB a row")
    entry = {"model": place.name, "version": version, "sha256": sha256(target), "row_bytes": row_bytes}
    return entry | ({"data_sha256": sha256(data)} if data else {})


def example_inputs(
    role: str, pipeline: DiffusionPipeline, made: ExportPlan, size: tuple[int, int]
) -> Mapping[str, Tensor]:
    """Example inputs of a component, two rows, without those for adapters, for a latent of (h, w)."""
    generator, rows = torch.Generator().manual_seed(0), EXAMPLE_ROWS
    latent = torch.randn(rows, made.shape[0], *size, generator=generator)
    if role == "text_encoder":
        return {"input_ids": token_ids(pipeline, EXAMPLES)}
    if role == "denoiser":
        context = torch.randn(rows, *_context_shape(pipeline), generator=generator)
        inputs = {"sample": latent, "timestep": torch.tensor([999.0, 12.0]), "encoder_hidden_states": context}
        if isinstance(pipeline, ZImagePipeline):
            inputs[ENCODER_MASK_INPUT] = torch.ones(context.shape[:2])
        elif hasattr(pipeline, "transformer"):
            pooled = pipeline.transformer.config.pooled_projection_dim
            inputs["pooled_projections"] = torch.randn(rows, pooled, generator=generator)
        if made.is_guidance_distilled:
            inputs["guidance"] = torch.tensor([3.5, 1.0])
        if made.is_inpainting:
            inputs["mask"] = torch.randint(0, 2, (rows, 1, *size), generator=generator).float()
            inputs["masked_image"] = torch.randn(latent.shape, generator=generator)
        if made.image_prompt is not None:
            tokens = made.image_prompt.num_tokens, made.image_prompt.width
            inputs["image_prompt_tokens"] = torch.randn(rows, *tokens, generator=generator)
            inputs["image_prompt_scale"] = torch.tensor([0.7, 0.0])
        if isinstance(pipeline, StableDiffusionXLPipeline):
            pooled = pipeline.text_encoder_2.config.projection_dim
            size_px = [float(made.factor * edge) for edge in size]
            inputs["text_embeds"] = torch.randn(rows, pooled, generator=generator)
            inputs["time_ids"] = torch.tensor([[*size_px, 0.0, 0.0, *size_px]] * rows)
        return inputs
    if role == IMAGE_ENCODER:
        assert made.image_prompt is not None
        edge = made.image_prompt.edge_px
        return {"image": torch.rand(rows, 3, edge, edge, generator=generator) * 2 - 1}
    if role == "encoder":
        edges = [made.factor * edge for edge in size]
        return {"image": torch.rand(rows, 3, *edges, generator=generator) * 2 - 1}
    return {"latent": latent / pipeline.vae.config.scaling_factor + _shift(pipeline)}


def _context_shape(pipeline: DiffusionPipeline) -> tuple[int, int]:
    """(T, D) of what the denoiser is given of a prompt."""
    lengths = [max_tokens(pipeline, *pair) for pair in _tokenizers(pipeline)]
    if isinstance(pipeline, FluxPipeline):
        return lengths[1], pipeline.transformer.config.joint_attention_dim
    if isinstance(pipeline, StableDiffusion3Pipeline):
        return lengths[0] + lengths[2], pipeline.transformer.config.joint_attention_dim
    if isinstance(pipeline, ZImagePipeline):
        return lengths[0], pipeline.transformer.config.cap_feat_dim
    return lengths[0], pipeline.unet.config.cross_attention_dim


def token_ids(pipeline: DiffusionPipeline, texts: Sequence[str]) -> Tensor:
    """What the text encoder is given for texts: (B, T), the ids of all tokenizers one after the other."""
    found = []
    for tokenizer, text_encoder in _tokenizers(pipeline):
        length = max_tokens(pipeline, tokenizer, text_encoder)
        cut = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        given = [manifest.as_chat(tokenizer, text) if isinstance(text_encoder, Qwen3Model) else text for text in texts]
        found.append(tokenizer(given, **cut).input_ids)
    return torch.cat(found, dim=1)


def round_weights(module: nn.Module) -> None:
    """Rounds weights to float16 values, so that exported and reference weights are the same numbers.

    Raises:
        ExportError: a weight is too large for float16, or is no number.
    """
    computed = computed_buffers(module)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point() and name not in computed:
            half = tensor.data.half()
            if not half.isfinite().all():
                raise ExportError(f"{name} has values that float16 cannot hold")
            tensor.data = half.float()


def computed_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of floats that no file has, by name: a network computes them when it is made.

    They are no weights, and half precision does not hold them: the frequencies of a rotary embedding, which are
    multiplied by the places of tokens.
    """
    saved = module.state_dict().keys()
    return {name: tensor for name, tensor in module.named_buffers() if tensor.is_floating_point() and name not in saved}


def refuse_to_break(models: Path, made: ExportPlan) -> None:
    """Checks that no other revision loses files that it names.

    Raises:
        ExportError: a revision would lose a file.
    """
    options = made.options
    if options.format is ExportFormat.TORCH:  # its files lie beside its manifest
        return
    overwritten = {f"{options.name}_{role}" for role in made.roles()}
    for path in sorted(models.glob(f"pipelines/{options.name}/*/pipeline.json")):
        used = json.loads(path.read_text())["components"].values()
        if path.parent.name != options.revision and any(
            at["sha256"] and at["model"] in overwritten and at["version"] == options.version for at in used
        ):
            raise ExportError(
                f"{path} uses the files that would be overwritten: --replace removes that revision, --version keeps it"
            )


def _install(staged: Path, models: Path, made: ExportPlan) -> None:
    """Moves everything to its place, the manifest last; no manifest ever names files that are not its own."""
    name, revision, replace = made.options.name, made.options.revision, made.options.replace
    repository, pipelines = models / "repository", models / "pipelines" / name
    shutil.rmtree(pipelines if replace else pipelines / revision, ignore_errors=True)
    for role in (*ROLES, *QUANTIZED) if replace else ():
        shutil.rmtree(repository / f"{name}_{role}", ignore_errors=True)
    for component in sorted((staged / "repository").iterdir()):
        for item in component.iterdir():
            target = repository / component.name / item.name
            if target.is_dir():
                shutil.rmtree(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            item.replace(target)
    pipelines.mkdir(parents=True, exist_ok=True)
    (staged / "pipelines" / name / revision).replace(pipelines / revision)


def _count(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.parameters())
