"""Loads and checks the pipelines below `models/`: one manifest each, on top of a Triton model repository.

`models/pipelines/<name>/<revision>/pipeline.json` names the components and
their versions, the tokenizer and the samplers of a pipeline;
`models/repository/` is a plain Triton model repository. Digests, shapes and
samplers are checked at load. Invariant: a `Pipeline` that was loaded can be run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from safelight_server.catalog import config_pbtxt, digest, revisions
from safelight_server.catalog.adapters import AdapterLibrary
from safelight_server.catalog.checks import check, check_configs
from safelight_server.catalog.manifest import Manifest, TokenizerFile
from safelight_server.catalog.pipeline import Pipeline, PromptTokenizer, assemble
from safelight_server.catalog.tokenizer import Tokenizer, TokenizerGroup
from safelight_server.domain.component import OPTIONAL, Component
from safelight_server.domain.errors import NotFoundError

DATA_FILE = "model.onnx.data"
"""The file with the weights of a model.onnx that would exceed protobuf's 2 GiB with them."""

WeightKind = Literal["onnx", "torch"]
"""The files in which weights lie: those of ONNX Runtime and Triton, or those of the `torch` runtime."""


class ManifestError(Exception):
    """A manifest, or a file that it names, is invalid; the message names the file and every fault."""


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
    faults += unread + check_configs(pipeline, configs)
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


def _read_configs(files: Mapping[Component, Path]) -> tuple[dict[Component, config_pbtxt.ModelConfig], list[str]]:
    configs, faults = {}, []
    for role, file in files.items():
        try:
            configs[role] = config_pbtxt.read(file)
        except config_pbtxt.ConfigError as error:
            faults.append(str(error))
    return configs, faults
