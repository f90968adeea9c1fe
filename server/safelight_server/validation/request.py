"""Whole requests, and the parts of them that later calls bring."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from safelight_server.catalog.catalog import Catalog, Pipeline
from safelight_server.domain.errors import FieldViolation, InvalidRequestError, NotFoundError
from safelight_server.domain.request import (
    Branch,
    CacheMode,
    CachePolicy,
    Notice,
    PixelEncoding,
    PreviewPolicy,
    Request,
    Spec,
)
from safelight_server.scheduler import Priority
from safelight_server.validation.delivery import disconnect_of, encoding_of, preview_of
from safelight_server.validation.draft import BranchDraft, CacheDraft, Draft, PreviewDraft, Unknown
from safelight_server.validation.spec import spec_of
from safelight_server.validation.violations import NAME, Violations, listed, shown

MAX_LABELS, MAX_LABEL_KEY, MAX_LABEL_VALUE = 16, 63, 255
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
NIL_UUID = "00000000-0000-0000-0000-000000000000"


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What the server bounds beside the model."""

    max_prompt_chars: int
    resume_grace_s: float
    max_resume_grace_s: float


def resolve_request(draft: Draft, catalog: Catalog, limits: RequestLimits) -> Request:
    """A valid request.

    Raises:
        InvalidRequestError: with all faults.
        NotFoundError: no such model.
    """
    faults, notices = Violations(), list[Notice]()
    pipeline = find_model(draft.spec.model, catalog, "spec.model")
    spec = spec_of(draft.spec, pipeline, limits.max_prompt_chars, faults, notices)
    preview = preview_of(draft.preview, pipeline, faults)
    encoding = PixelEncoding() if draft.encoding is None else encoding_of(draft.encoding, "encoding", faults)
    priority = _priority(draft.priority, faults)
    disconnect = disconnect_of(draft.disconnect, limits.resume_grace_s, limits.max_resume_grace_s, faults)
    cache = _cache(draft.cache, faults)
    branch = _branch(draft.branch, spec, cache.mode, faults)
    request_id = _request_id(draft.request_id, faults)
    _check_labels(draft.labels, faults)
    faults.done()
    if spec is None:
        raise ValueError("a spec that is not there must have left a fault")
    return Request(
        spec=spec,
        preview=preview,
        encoding=encoding,
        priority=priority,
        disconnect=disconnect,
        cache=cache,
        branch=branch,
        request_id=request_id,
        body_digest=draft.body_digest,
        labels=dict(draft.labels),
        warnings=tuple(notices),
    )


def resolve_preview(draft: PreviewDraft, pipeline: Pipeline) -> PreviewPolicy:
    """A valid preview policy; an empty draft is the default one.

    Raises:
        InvalidRequestError: with all faults.
    """
    faults = Violations()
    policy = preview_of(draft, pipeline, faults)
    faults.done()
    return policy


def resolve_priority(priority: Priority | Unknown | None) -> Priority:
    """A valid priority; absent is STANDARD.

    Raises:
        InvalidRequestError: this server does not know it.
    """
    faults = Violations()
    resolved = _priority(priority, faults)
    faults.done()
    return resolved


def resolve_name(name: str, collection: str) -> str:
    """The id in "collection/id".

    Raises:
        InvalidRequestError: it is no such name.
    """
    identifier = _identifier(name, collection)
    if not identifier:
        raise InvalidRequestError([FieldViolation("name", f"must be {collection}/ID, as the server gave it")])
    return identifier


def _identifier(name: str, collection: str) -> str:
    """The id in "collection/id"; empty where it is no such name."""
    prefix, _, identifier = name.partition("/")
    return identifier if prefix == collection and re.fullmatch(NAME, identifier) else ""


def find_model(name: str, catalog: Catalog, field: str) -> Pipeline:
    """The pipeline that "models/ID" at `field` names; empty means the default.

    Raises:
        NotFoundError: there is none; it names those that there are.
    """
    if not name:
        return catalog.get("")
    identifier = name.removeprefix("models/")
    if identifier == name or identifier not in catalog.pipelines:
        known = listed(f"models/{known}" for known in catalog.pipelines)
        what = f"there is no model {shown(name)}; there is {known}"
        raise NotFoundError(what, reason="MODEL_NOT_FOUND", violations=[FieldViolation(field, what)])
    return catalog.get(identifier)


def _priority(priority: Priority | Unknown | None, faults: Violations) -> Priority:
    if isinstance(priority, Unknown):
        names = listed(f"PRIORITY_{known.name}" for known in Priority)
        faults.add("scheduling.priority", f"must be one of {names}")
        return Priority.STANDARD
    return Priority.STANDARD if priority is None else priority


def _cache(draft: CacheDraft, faults: Violations) -> CachePolicy:
    mode = draft.mode or CacheMode.DEFAULT
    if isinstance(mode, Unknown):
        faults.add("cache.mode", f"must be one of {listed(f'MODE_{known.name}' for known in CacheMode)}")
        return CachePolicy()
    if draft.min_similarity is None:
        return CachePolicy(mode)
    if mode is not CacheMode.ALLOW_SIMILAR:
        faults.add("cache.min_similarity", "goes with MODE_ALLOW_SIMILAR only")
    faults.check(0 < draft.min_similarity <= 1, "cache.min_similarity", "must be above 0 and at most 1")
    return CachePolicy(mode, draft.min_similarity)


def _branch(draft: BranchDraft | None, spec: Spec | None, mode: CacheMode, faults: Violations) -> Branch | None:
    if draft is None or spec is None:
        return None
    identifier = _identifier(draft.generation, "generations")
    faults.check(bool(identifier), "branch.generation", "must be generations/ID, as the server gave it")
    faults.check(draft.output_index >= 0, "branch.output_index", "must be at least 0")
    last = spec.num_inference_steps - 1
    one = "one step leaves none to begin after; ask for more or leave branch out"
    faults.check(
        0 < draft.step <= last, "branch.step", f"must be from 1 to {last}, one less than the steps" if last else one
    )
    faults.check(len(spec.seeds) == 1, "branch", "is for one output")
    exact_only = mode in (CacheMode.DEFAULT, CacheMode.BYPASS)
    faults.check(exact_only, "branch", "contradicts a cache mode that starts elsewhere")
    return Branch(identifier, draft.output_index, draft.step)


def _request_id(request_id: str, faults: Violations) -> str:
    good = not request_id or (bool(UUID.fullmatch(request_id)) and request_id != NIL_UUID)
    faults.check(good, "request_id", "must be a UUID such as 6f1c0a52-9b3e-4d0f-8a55-2f0c7d1e9b64, and not all zeros")
    return request_id.lower()


def _check_labels(labels: Mapping[str, str], faults: Violations) -> None:
    if not faults.check(len(labels) <= MAX_LABELS, "labels", f"at most {MAX_LABELS} are kept"):
        return
    for key, value in labels.items():
        field = f"labels[{shown(key)}]"
        faults.check(0 < len(key) <= MAX_LABEL_KEY, field, f"a key has 1 to {MAX_LABEL_KEY} characters")
        faults.check(len(value) <= MAX_LABEL_VALUE, field, f"a value has at most {MAX_LABEL_VALUE} characters")
