"""Checks a whole GenerateRequest, and the parts of it that other calls have too."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from safelight.v1 import generation_pb2 as pb

from safelight_server.catalog.adapters import FOR_ALL
from safelight_server.catalog.catalog import Catalog
from safelight_server.catalog.pipeline import Pipeline
from safelight_server.domain.errors import FieldViolation, InvalidRequestError, NotFoundError
from safelight_server.domain.request import (
    Branch,
    CacheMode,
    CachePolicy,
    Notice,
    PixelEncoding,
    PreviewPolicy,
    QualityFloor,
    Request,
    Spec,
)
from safelight_server.sampler import guided_steps, refusal, steps_left_out
from safelight_server.scheduler import Priority
from safelight_server.validation.delivery import check_disconnect, check_encoding, check_preview
from safelight_server.validation.spec import check_spec
from safelight_server.validation.violations import NAME, Violations, listed, shown
from safelight_server.wire.enums import CACHE_MODES, PRIORITIES, from_number

MAX_LABELS, MAX_LABEL_KEY, MAX_LABEL_VALUE = 16, 63, 255
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
NIL_UUID = "00000000-0000-0000-0000-000000000000"


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The server's limits on a request, in addition to those of the model."""

    max_prompt_chars: int
    max_request_rows: int
    resume_grace_s: float
    max_resume_grace_s: float


def resolve_request(
    message: pb.GenerateRequest, catalog: Catalog, limits: RequestLimits, tenant: str = FOR_ALL
) -> Request:
    """Checks a GenerateRequest and fills in the defaults of its model.

    Args:
        tenant: the caller's, whose own adapters it may name beside those for all.

    Raises:
        InvalidRequestError: with all faults.
        NotFoundError: there is no such model, or nothing is wrong but names of adapters that are not there.
    """
    faults, notices = Violations(), list[Notice]()
    pipeline = find_model(message.spec.model, catalog, "spec.model")
    bounds = limits.max_prompt_chars, limits.max_request_rows
    spec = check_spec(message.spec, pipeline, *bounds, faults, notices, catalog.adapters, tenant)
    preview = check_preview(message.preview, pipeline, faults)
    encoding = PixelEncoding()
    if message.HasField("encoding"):
        encoding = check_encoding(message.encoding, "encoding", faults)
    priority = _priority(message.scheduling, faults)
    disconnect = check_disconnect(message.disconnect, limits.resume_grace_s, limits.max_resume_grace_s, faults)
    cache = _cache(message.cache, faults)
    branch = None
    if message.HasField("branch") and spec is not None:
        branch = _branch(message.branch, spec, cache.mode, faults)
    floor = QualityFloor()
    if message.HasField("quality_floor") and spec is not None:
        floor = _quality_floor(message, spec, pipeline, priority, cache, faults)
    request_id = _request_id(message.request_id, faults)
    _check_labels(message.labels, faults)
    faults.done()
    if spec is None:
        raise ValueError("check_spec returned no spec and left no fault")
    return Request(
        spec=spec,
        preview=preview,
        encoding=encoding,
        priority=priority,
        disconnect=disconnect,
        cache=cache,
        branch=branch,
        request_id=request_id,
        body_digest=body_digest(message),
        labels=dict(message.labels),
        warnings=tuple(notices),
        quality_floor=floor,
    )


def resolve_preview(message: pb.PreviewPolicy, pipeline: Pipeline) -> PreviewPolicy:
    """Checks the PreviewPolicy of WatchGeneration or UpdateGeneration; an empty message is the default policy.

    Raises:
        InvalidRequestError: with all faults.
    """
    faults = Violations()
    policy = check_preview(message, pipeline, faults)
    faults.done()
    return policy


def resolve_priority(message: pb.Scheduling) -> Priority:
    """Checks the priority of UpdateGeneration; an absent one is STANDARD.

    Raises:
        InvalidRequestError: this server does not know the priority.
    """
    faults = Violations()
    priority = _priority(message, faults)
    faults.done()
    return priority


def body_digest(message: pb.GenerateRequest) -> bytes:
    """SHA-256 of the request without its request id; empty for a request without a request id.

    A retry repeats the request id and the body; the digest distinguishes it from another request with the same id.
    """
    if not message.request_id:
        return b""
    body = pb.GenerateRequest()
    body.CopyFrom(message)
    body.ClearField("request_id")
    return hashlib.sha256(body.SerializeToString(deterministic=True)).digest()


def resolve_name(name: str, collection: str) -> str:
    """The id in a resource name "collection/id".

    Raises:
        InvalidRequestError: the name is malformed.
    """
    identifier = _identifier(name, collection)
    if not identifier:
        raise InvalidRequestError([FieldViolation("name", f"must be {collection}/ID, as the server gave it")])
    return identifier


def _identifier(name: str, collection: str) -> str:
    """The id in "collection/id"; "" for a malformed name."""
    prefix, _, identifier = name.partition("/")
    return identifier if prefix == collection and re.fullmatch(NAME, identifier) else ""


def find_model(name: str, catalog: Catalog, field: str) -> Pipeline:
    """The pipeline of the model name "models/ID" at the path `field`; an empty name is the default model.

    Raises:
        NotFoundError: there is no such model; the error lists the models.
    """
    if not name:
        return catalog.get("")
    identifier = name.removeprefix("models/")
    if identifier == name or identifier not in catalog.pipelines:
        known = listed(f"models/{known}" for known in catalog.pipelines)
        what = f"there is no model {shown(name)}; there is {known}"
        raise NotFoundError(what, reason="MODEL_NOT_FOUND", violations=[FieldViolation(field, what)])
    return catalog.get(identifier)


def _priority(message: pb.Scheduling, faults: Violations) -> Priority:
    priority = from_number(PRIORITIES, message.priority, default=Priority.STANDARD)
    if priority is None:
        names = listed(f"PRIORITY_{known.name}" for known in Priority)
        faults.add("scheduling.priority", f"must be one of {names}")
        return Priority.STANDARD
    return priority


def _cache(message: pb.CachePolicy, faults: Violations) -> CachePolicy:
    mode = from_number(CACHE_MODES, message.mode, default=CacheMode.DEFAULT)
    if mode is None:
        faults.add("cache.mode", f"must be one of {listed(f'MODE_{known.name}' for known in CacheMode)}")
        return CachePolicy()
    if not message.HasField("min_similarity"):
        return CachePolicy(mode)
    if mode is not CacheMode.ALLOW_SIMILAR:
        faults.add("cache.min_similarity", "goes with MODE_ALLOW_SIMILAR only")
    faults.check(0 < message.min_similarity <= 1, "cache.min_similarity", "must be above 0 and at most 1")
    return CachePolicy(mode, message.min_similarity)


def _branch(message: pb.Branch, spec: Spec, mode: CacheMode, faults: Violations) -> Branch:
    identifier = _identifier(message.generation, "generations")
    faults.check(bool(identifier), "branch.generation", "must be generations/ID, as the server gave it")
    faults.check(message.output_index >= 0, "branch.output_index", "must be at least 0")
    last = spec.num_inference_steps - 1
    single = "cannot be used with one step; set num_inference_steps higher or leave branch out"
    bounds = f"must be from 1 to {last}, one less than the steps" if last else single
    faults.check(0 < message.step <= last, "branch.step", bounds)
    faults.check(len(spec.seeds) == 1, "branch", "allows only one output; leave out the others or branch")
    exact_only = mode in (CacheMode.DEFAULT, CacheMode.BYPASS)
    faults.check(exact_only, "branch", "contradicts MODE_ALLOW_SIMILAR and MODE_ALLOW_LATENT; leave one of them out")
    return Branch(identifier, message.output_index, message.step)


def _quality_floor(
    message: pb.GenerateRequest,
    spec: Spec,
    pipeline: Pipeline,
    priority: Priority,
    cache: CachePolicy,
    faults: Violations,
) -> QualityFloor:
    floor, field = message.quality_floor, "quality_floor"
    interactive = priority is Priority.INTERACTIVE
    faults.check(not interactive, field, "goes with PRIORITY_STANDARD and PRIORITY_BATCH; leave one of them out")
    branched = message.HasField("branch")
    min_num_steps = min_similarity = None
    if floor.HasField("min_num_steps"):
        min_num_steps, at = floor.min_num_steps, f"{field}.min_num_steps"
        faults.check(not branched, at, "contradicts branch, which has the steps of what it begins from")
        most = spec.num_inference_steps
        if faults.check(1 <= min_num_steps <= most, at, f"must be from 1 to {most}, the steps of the spec"):
            why = refusal(spec.sampler, pipeline.schedule, pipeline.manifest.prediction_type, min_num_steps)
            faults.check(why is None, at, f"{why}; ask for more")
            made = range(steps_left_out(min_num_steps, spec.strength), min_num_steps)
            faults.check(bool(made), at, f"of {min_num_steps} steps strength leaves none; ask for more")
            guided = guided_steps(min_num_steps, *spec.guidance_interval)
            enough = spec.negative_token_ids is None or not made or any(step in guided for step in made)
            faults.check(enough, at, f"of {min_num_steps} steps spec.guidance_interval has none; ask for more")
            for control in spec.controls:
                acts = not made or any(step in made for step in control.steps(min_num_steps))
                what = f"of {min_num_steps} steps the control {control.name} acts in none; ask for more"
                faults.check(acts, at, what)
    if floor.HasField("min_similarity"):
        min_similarity, at = floor.min_similarity, f"{field}.min_similarity"
        faults.check(not branched, at, "contradicts branch, which begins from a step of its own choice")
        faults.check(cache.mode is not CacheMode.BYPASS, at, "contradicts MODE_BYPASS")
        faults.check(0 < min_similarity <= 1, at, "must be above 0 and at most 1")
        lower = cache.mode is not CacheMode.ALLOW_SIMILAR or min_similarity < cache.min_similarity
        faults.check(lower, at, "must be below cache.min_similarity, which allows as much without pressure")
    return QualityFloor(min_num_steps, floor.cheaper_previews, min_similarity)


def _request_id(request_id: str, faults: Violations) -> str:
    good = not request_id or (bool(UUID.fullmatch(request_id)) and request_id != NIL_UUID)
    faults.check(good, "request_id", "must be a UUID such as 6f1c0a52-9b3e-4d0f-8a55-2f0c7d1e9b64, and not all zeros")
    return request_id.lower()


def _check_labels(labels: Mapping[str, str], faults: Violations) -> None:
    too_many = f"has {len(labels)} entries; at most {MAX_LABELS} are taken"
    if not faults.check(len(labels) <= MAX_LABELS, "labels", too_many):
        return
    for key, value in labels.items():
        field = f"labels[{shown(key)}]"
        faults.check(0 < len(key) <= MAX_LABEL_KEY, field, f"a key has 1 to {MAX_LABEL_KEY} characters")
        faults.check(len(value) <= MAX_LABEL_VALUE, field, f"a value has at most {MAX_LABEL_VALUE} characters")
