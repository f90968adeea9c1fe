"""Checks the parameters of requests for pictures, and makes a GenerateRequest of them.

The parameters are those of OpenAI's API and, with names that Safelight adds,
`seed`, `num_inference_steps`, `guidance_scale`, `guidance_rescale`,
`guidance_interval`, `negative_prompt` and `adapters`; edits have `strength` too.
Parameters that the models do not support are refused by name, never ignored. The GenerateRequest is
then checked like any other; `in_parameters` names the faults found there by the
parameters. Pure apart from random seeds.
"""

from __future__ import annotations

import hashlib
import math
import re
import secrets
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from google.rpc import code_pb2, error_details_pb2, status_pb2
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails
from safelight.v1 import generation_pb2 as pb
from starlette.datastructures import Headers

from safelight_server.catalog.catalog import Catalog
from safelight_server.catalog.pipeline import Pipeline
from safelight_server.domain.errors import FieldViolation, InvalidRequestError
from safelight_server.http.form import Form
from safelight_server.sampler import steps_left_out
from safelight_server.validation import default_strength, find_model
from safelight_server.validation.violations import Violations, listed, shown
from safelight_server.wire.statuses import status_of

SEED_BITS = 53
"""Random seeds have so many bits, as many as JavaScript's numbers represent exactly."""
MAX_SEED = 2**64 - 1
MAX_INT32 = 2**31 - 1
MAX_USER_CHARS = 255
MAX_NAME_CHARS = 64
"""Characters of an unknown parameter's name that an error shows."""
KEY_HEADER, MAX_KEY_CHARS = "idempotency-key", 255
REQUEST_IDS = uuid.UUID("5d1f6c4e-8a0b-5f57-9e55-3f0f6a2f4b71")
"""Namespace of the request ids that are made of idempotency keys (UUIDs of version 5)."""
NO_QUALITY = "a model has one quality; leave it out, or choose num_inference_steps"
TO_EDITS = "goes with POST /v1/images/edits, which makes pictures from pictures"
UNSUPPORTED: Mapping[str, str] = {
    "style": "models have no styles; leave it out, and describe the style in the prompt",
    "input_fidelity": "leave it out; strength, of POST /v1/images/edits, sets how much of the picture may change",
    "image": TO_EDITS,
    "mask": TO_EDITS,
    "strength": TO_EDITS,
}
"""Parameters of OpenAI's API that are refused, with what to do instead."""
ONLY: Mapping[str, str] = {
    "quality": f"must be auto or standard: {NO_QUALITY}",
    "background": "must be auto or opaque: pictures have no transparency",
    "moderation": "must be auto: the server filters nothing",
    "response_format": "must be b64_json: pictures are sent in the answer and not kept under a URL",
    "output_format": "must be png, jpeg or webp",
    "size": 'must be auto or WIDTHxHEIGHT, such as "64x64"',
}
"""The error of a parameter with another value than the few that it allows."""
PARAMETERS: Mapping[str, str] = {
    "spec.prompts[0].text": "negative_prompt",
    "spec.guidance_interval.start": "guidance_interval",
    "spec.guidance_interval.end": "guidance_interval",
    "spec.width_px": "size",
    "spec.height_px": "size",
    "spec.sampler": "num_inference_steps",
    "spec.outputs": "n",
    "spec.init_image": "image",
    "encoding.quality": "output_compression",
    "labels": "user",
}
"""The parameter for a path in a GenerateRequest, if its name is not the last part of the path."""
ADAPTER_SCALE = re.compile(r"spec\.adapters\[([0-9]+)\]\.scale")
"""The path of a fault of an adapter's factor, which does not say which adapter."""
ENTRY = re.compile(r"(adapters)\[(.+)\]", re.DOTALL)
"""How a form names an entry of an object, as OpenAI's packages write it: adapters[pixel]."""


class ImageParameters(BaseModel):
    """The parameters of a request. An explicit null means the same as an absent parameter."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    prompt: str
    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    size: Annotated[str, Field(pattern=r"^(auto|[0-9]{1,6}x[0-9]{1,6})$")] | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto"] | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    user: Annotated[str, Field(max_length=MAX_USER_CHARS)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=MAX_INT32)] | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    guidance_interval: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    negative_prompt: str | None = None
    adapters: dict[str, float] | None = None

    @property
    def format(self) -> str:
        """The encoding of the pictures: png, jpeg or webp."""
        return self.output_format or "png"


class EditParameters(ImageParameters):
    """The parameters of an edit, without its pictures."""

    strength: float | None = None


@dataclass(frozen=True, slots=True)
class ImageEdit:
    """A request for pictures from a picture: its parameters, and the files of the picture and of its mask."""

    parameters: EditParameters
    image: bytes
    mask: bytes | None


def parse(body: bytes) -> ImageParameters:
    """Reads the body of a request for pictures.

    Raises:
        InvalidRequestError: with every parameter that is unknown, of the wrong type or out of its bounds.
    """
    faults = Violations()
    try:
        parameters = ImageParameters.model_validate_json(body)
    except ValidationError as error:
        _add(error, faults)
        faults.done()
        raise
    _check_together(parameters, faults)
    faults.done()
    return parameters


def parse_edit(form: Form) -> ImageEdit:
    """Reads the form of a request for pictures from a picture.

    Raises:
        InvalidRequestError: as `parse`.
    """
    faults = Violations()
    texts = {name: values[0] for name, values in form.texts.items() if name not in ("image", "image[]", "mask")}
    for name, values in form.texts.items():
        shown = name[:MAX_NAME_CHARS]
        if name not in texts:
            faults.add(shown.removesuffix("[]"), "must be a file, with a filename")
        elif len(values) > 1:
            faults.add(shown, f"occurs {len(values)} times; send it once")
    files = dict(form.files)
    images = [*files.pop("image", ()), *files.pop("image[]", ())]
    masks = files.pop("mask", ())
    for name in files:
        known = name in EditParameters.model_fields
        what = "must be a text, without a filename" if known else "is no parameter of this server; leave it out"
        faults.add(name[:MAX_NAME_CHARS], what)
    if not {"image", "image[]"} & form.texts.keys():
        many = f"occurs {len(images)} times; send one picture to start from"
        faults.check(bool(images), "image", "is missing: send the file of the picture to start from")
        faults.check(len(images) < 2, "image", many)
    faults.check(len(masks) < 2, "mask", f"occurs {len(masks)} times; send it once")
    parameters = None
    try:
        parameters = EditParameters.model_validate_strings(_with_objects(texts))
    except ValidationError as error:
        _add(error, faults)
    else:
        _check_together(parameters, faults)
    faults.done()
    if parameters is None:
        raise ValueError("the parameters were refused and left no fault")
    return ImageEdit(parameters, images[0], masks[0] if masks else None)


def _with_objects(texts: Mapping[str, str]) -> Mapping[str, str | dict[str, str]]:
    """The texts of a form, with those that are entries of an object gathered in it."""
    gathered: dict[str, str | dict[str, str]] = {}
    for name, text in texts.items():
        entry = ENTRY.fullmatch(name)
        if entry is None:
            gathered[name] = text
        elif isinstance(inner := gathered.setdefault(entry[1], {}), dict):
            inner[entry[2]] = text
    return gathered


def _add(error: ValidationError, faults: Violations) -> None:
    for fault in error.errors(include_url=False, include_input=False):
        faults.add(*_named(fault))


def _check_together(parameters: ImageParameters, faults: Violations) -> None:
    """Checks parameters that depend on each other."""
    faults.check(parameters.stream is True or not parameters.partial_images, "partial_images", "only with stream: true")
    lossy = parameters.output_compression is None or parameters.format != "png"
    faults.check(lossy, "output_compression", "png has none; leave it out, or choose jpeg or webp")


def idempotency_key(headers: Headers) -> str:
    """The Idempotency-Key of a request; "" if it has none.

    Raises:
        InvalidRequestError: the key is empty or too long.
    """
    key = headers.get(KEY_HEADER)
    if key is None:
        return ""
    if not 0 < len(key) <= MAX_KEY_CHARS:
        what = f"must have 1 to {MAX_KEY_CHARS} characters, such as a UUID; or leave it out"
        raise InvalidRequestError([FieldViolation(f"header {KEY_HEADER}", what)])
    return key


def generate_request(
    parameters: ImageParameters, catalog: Catalog, key: str = ""
) -> tuple[pb.GenerateRequest, Pipeline]:
    """The GenerateRequest of the parameters, and the pipeline of its model.

    A client that disconnects cannot come back to its generation, which is therefore cancelled at once. With an
    idempotency key it can: the key gives the request id and the seeds, so that the same request makes the same message
    when it is sent again.

    Raises:
        NotFoundError: there is no such model.
    """
    pipeline = _pipeline(parameters.model or "", catalog)
    request = pb.GenerateRequest()
    spec = request.spec
    spec.model, spec.prompt = f"models/{pipeline.name}", parameters.prompt
    if parameters.negative_prompt is not None:
        spec.prompts.add(role=pb.Prompt.ROLE_NEGATIVE, text=parameters.negative_prompt)
    if parameters.size not in (None, "auto"):
        spec.width_px, spec.height_px = map(int, parameters.size.split("x"))
    if parameters.num_inference_steps is not None:
        spec.num_inference_steps = parameters.num_inference_steps
    if parameters.guidance_scale is not None:
        spec.guidance_scale = parameters.guidance_scale
    if parameters.guidance_rescale is not None:
        spec.guidance_rescale = parameters.guidance_rescale
    if parameters.guidance_interval is not None:
        spec.guidance_interval.start, spec.guidance_interval.end = parameters.guidance_interval
    for name, scale in (parameters.adapters or {}).items():
        spec.adapters.add(name=name, scale=scale)
    first = parameters.seed
    too_many = pipeline.manifest.limits.max_outputs + 1  # enough to be refused, and bounds the loop
    for index in range(min(parameters.n or 1, too_many)):
        seed = _chosen_seed(key, index) if first is None else (first + index) % (MAX_SEED + 1)
        spec.outputs.add(seed=seed)
    request.encoding.media_type = f"image/{parameters.format}"
    if parameters.output_compression is not None:
        request.encoding.quality = max(1, parameters.output_compression)
    _set_previews(request, parameters, pipeline)
    if key:
        request.request_id = str(uuid.uuid5(REQUEST_IDS, key))
    else:
        request.disconnect.resume_grace.SetInParent()
    if parameters.user:
        request.labels["user"] = parameters.user
    return request, pipeline


def edit_request(parameters: EditParameters, catalog: Catalog, key: str = "") -> tuple[pb.GenerateRequest, Pipeline]:
    """The GenerateRequest of an edit without its pictures, and the pipeline of its model.

    Raises:
        NotFoundError: there is no such model.
        InvalidRequestError: the model cannot start from pictures.
    """
    request, pipeline = generate_request(parameters, catalog, key)
    if not pipeline.has_encoder:
        able = listed(name for name, other in catalog.pipelines.items() if other.has_encoder)
        what = f"{pipeline.name} cannot start from a picture: it has no encoder; " + (
            f"{able} can" if able else "no model of this server can"
        )
        raise InvalidRequestError([FieldViolation("model", what)])
    if parameters.strength is not None:
        request.spec.strength = parameters.strength
    return request, pipeline


def _chosen_seed(key: str, index: int) -> int:
    """A seed for a request that names none: random, or derived from the idempotency key."""
    if not key:
        return secrets.randbits(SEED_BITS)
    digest = hashlib.sha256(f"{index} {key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - SEED_BITS)


def _set_previews(request: pb.GenerateRequest, parameters: ImageParameters, pipeline: Pipeline) -> None:
    """Requests previews: the first after the first step, the others evenly over the rest, encoded as the picture."""
    if not parameters.partial_images:
        request.preview.method = pb.PREVIEW_METHOD_NONE
        return
    num_steps = parameters.num_inference_steps or pipeline.manifest.defaults.num_inference_steps
    if isinstance(parameters, EditParameters):  # an edit skips its first steps
        strength = default_strength(pipeline) if parameters.strength is None else parameters.strength
        num_steps -= steps_left_out(num_steps, min(1.0, max(0.0, strength)))
    request.preview.every_n_steps = max(1, math.ceil(num_steps / parameters.partial_images))
    request.preview.accept.append(request.encoding)


def _pipeline(name: str, catalog: Catalog) -> Pipeline:
    """The pipeline of a model's id or of its resource name; an empty name is the default."""
    full = f"models/{name}" if name and not name.startswith("models/") else name
    return find_model(full, catalog, "model")


def in_parameters(status: status_pb2.Status, message: pb.GenerateRequest) -> status_pb2.Status:
    """The status with the names of parameters instead of paths in the GenerateRequest.

    Args:
        message: the request. An error about its request id, which was made of an idempotency key, names the key
            instead.
    """
    bad = error_details_pb2.BadRequest()
    if message.request_id and message.request_id in status.message:
        renamed = status_pb2.Status()
        renamed.CopyFrom(status)
        renamed.message = status.message.replace(f"request_id {message.request_id}", "this Idempotency-Key")
        return renamed
    detail = next((detail for detail in status.details if detail.Unpack(bad)), None)
    if detail is None:
        return status
    faults = [_in_parameter(fault, message) for fault in bad.field_violations]
    if status.code == code_pb2.INVALID_ARGUMENT:
        return status_of(InvalidRequestError(faults))
    for fault, named in zip(bad.field_violations, faults, strict=True):
        fault.field, fault.description = named.field, named.description
    detail.Pack(bad)
    return status


def _in_parameter(fault: error_details_pb2.BadRequest.FieldViolation, message: pb.GenerateRequest) -> FieldViolation:
    field, what = fault.field, fault.description
    if (scale := ADAPTER_SCALE.fullmatch(field)) is not None:
        what = f"{shown(message.spec.adapters[int(scale[1])].name)} {what}"
    if field == "spec.outputs":
        what = what.replace("have at most", "be at most").removesuffix(" entries")
    if field.startswith("spec.adapters"):
        return FieldViolation("adapters", what)
    return FieldViolation(PARAMETERS.get(field) or field.rpartition(".")[2], what)


def _named(fault: ErrorDetails) -> tuple[str, str]:
    """The name of the parameter of a pydantic error, and what to change."""
    loc, kind = fault["loc"], fault["type"]
    name = str(loc[0])[:MAX_NAME_CHARS] if loc else "body"
    if name == "adapters":
        if len(loc) > 1:
            return name, f"the factor of {shown(str(loc[1]))} must be a number"
        return name, 'must be an object of names and factors, {"pixel": 0.8}; in a form a part adapters[pixel]'
    if kind == "extra_forbidden":
        return name, UNSUPPORTED.get(name, "is no parameter of this server; leave it out")
    if kind in ("literal_error", "string_pattern_mismatch"):
        return name, ONLY[name]
    if kind in ("too_short", "too_long") and name == "guidance_interval":
        return name, "must be two numbers, [start, end]"
    if kind == "string_too_long":
        return name, f"must have at most {fault['ctx']['max_length']} characters"
    if kind == "missing":
        return name, "must say what the picture shows"
    return name, fault["msg"].replace("Input should", "must")
