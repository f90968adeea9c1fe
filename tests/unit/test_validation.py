"""Validation: each fault names its field and what to change; absent fields get the model's defaults."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safelight.v1 import generation_pb2 as pb
from safelight_server.catalog.catalog import Catalog
from safelight_server.catalog.manifest import GUIDANCE_SOURCE, STABLE_DIFFUSION_INPUTS
from safelight_server.domain.errors import InvalidRequestError, NotFoundError
from safelight_server.domain.request import (
    AdapterUse,
    ControlUse,
    DisconnectPolicy,
    MediaType,
    PixelEncoding,
    PreviewMethod,
    PreviewPolicy,
    Request,
    Spec,
)
from safelight_server.sampler import SamplerSpec, refusal
from safelight_server.scheduler import Priority
from safelight_server.validation import (
    RequestLimits,
    find_model,
    resolve_name,
    resolve_preview,
    resolve_priority,
    resolve_request,
)
from safelight_server.validation.violations import MAX_FAULTS

from tests.support.pipelines import BOS, EOS, MANIFEST, MAX_TOKENS, PAD, adapted_catalog, small_catalog, small_pipeline

LIMITS = RequestLimits(max_prompt_chars=100, max_request_rows=131_072, resume_grace_s=30.0, max_resume_grace_s=600.0)
RAW = "application/x-raw-rgba8"
ALL_MEDIA = "image/jpeg, image/webp, image/png, application/x-raw-rgba8, image/ktx2"
UUID = "6F1C0A52-9b3e-4d0f-8a55-2f0c7d1e9b64"


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return small_catalog(tmp_path_factory.mktemp("small"))


def request(**spec: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(spec=pb.GenerationSpec(**{"prompt": "red potion", **spec}))


def prompts(*entries: tuple[int, str], prompt: str = "") -> pb.GenerateRequest:
    return request(prompt=prompt, prompts=[pb.Prompt(role=role, text=text) for role, text in entries])


def encoding(**given: object) -> pb.GenerateRequest:
    message = request()
    message.encoding.CopyFrom(pb.PixelEncoding(**given))
    return message


def preview(**given: object) -> pb.GenerateRequest:
    message = request()
    message.preview.CopyFrom(pb.PreviewPolicy(**given))
    return message


def cache(mode: int, min_similarity: float, branch: pb.Branch | None = None) -> pb.GenerateRequest:
    policy = pb.CachePolicy(mode=mode, min_similarity=min_similarity)
    return pb.GenerateRequest(spec=pb.GenerationSpec(prompt="red"), cache=policy, branch=branch)


def branch(**changes: object) -> pb.GenerateRequest:
    message = pb.Branch(**({"generation": "generations/1", "step": 4} | changes))
    return pb.GenerateRequest(spec=pb.GenerationSpec(prompt="red"), branch=message)


def floored(given: pb.QualityFloor, message: pb.GenerateRequest | None = None, **spec: object) -> pb.GenerateRequest:
    message = message or request(**spec)
    message.quality_floor.CopyFrom(given)
    return message


def interactive() -> pb.GenerateRequest:
    scheduling = pb.Scheduling(priority=pb.PRIORITY_INTERACTIVE)
    return pb.GenerateRequest(spec=pb.GenerationSpec(prompt="red"), scheduling=scheduling)


def bypassing() -> pb.GenerateRequest:
    return pb.GenerateRequest(
        spec=pb.GenerationSpec(prompt="red"), cache=pb.CachePolicy(mode=pb.CachePolicy.MODE_BYPASS)
    )


def disconnect(**given: object) -> pb.GenerateRequest:
    message = request()
    message.disconnect.CopyFrom(pb.DisconnectPolicy(**given))
    return message


def labelled(**labels: str) -> pb.GenerateRequest:
    message = request()
    message.labels.update(labels)
    return message


def sampler(**given: object) -> pb.GenerateRequest:
    return request(sampler=pb.SamplerSpec(**given))


def interval(start: float | None = None, end: float | None = None, **changes: object) -> pb.GenerateRequest:
    return request(guidance_interval=pb.GuidanceInterval(start=start, end=end), **changes)


DISTILLED = "the model has its guidance from training and draws one row a step; leave it out"
POSITIVE, NEGATIVE = pb.Prompt.ROLE_POSITIVE, pb.Prompt.ROLE_NEGATIVE
STEPS = "must be from 1 to 50"
GUIDANCE = "must be a number from 1 (without guidance) to 20"
SIZES = "models/small makes 64x64, 64x96"
ONLY_RAW = f"only {RAW} has it; leave it out"
IMAGE = f"images/{'ab' * 32}"
NOT_AN_IMAGE = (
    "must be images/SHA256 with 64 hexadecimal digits, as UploadImage returns it, or generations/ID/outputs/INDEX"
)
STRENGTH = "must be above 0 and at most 1"
ALONE = "goes with init_image: give that too, or leave this out"
FROM = "must be from 0 to below 1, a share of the steps"
TO = "must be above 0 and at most 1, a share of the steps"
NOT_UUID = "must be a UUID such as 6f1c0a52-9b3e-4d0f-8a55-2f0c7d1e9b64, and not all zeros"
FLOOR_STEPS = "must be from 1 to 20, the steps of the spec"
SIMILARITY = "must be above 0 and at most 1"
GRACE = "must be a Duration from 0 to 600 s"
INTERVAL = "must be a Duration of more than 0"

FAULTS: list[tuple[str, pb.GenerateRequest, str, str]] = [
    ("no prompt", request(prompt=""), "spec.prompt", "must say what the picture shows"),
    ("blank prompt", request(prompt=" \t\n "), "spec.prompt", "must not be blank"),
    ("invisible prompt", request(prompt="\u200b\ufeff"), "spec.prompt", "must not be blank"),
    ("long prompt", request(prompt="x" * 101), "spec.prompt", "has 101 characters; at most 100 are taken"),
    ("NUL", request(prompt="red\0potion"), "spec.prompt", "has the control character U+0000; take it out"),
    ("escape", request(prompt="\x1b[31mred"), "spec.prompt", "has the control character U+001B; take it out"),
    ("C1", request(prompt="red\x9b"), "spec.prompt", "has the control character U+009B; take it out"),
    ("only negative", prompts((NEGATIVE, "blue")), "spec.prompt", "must say what the picture shows"),
    (
        "prompt twice",
        prompts((POSITIVE, "red"), prompt="red"),
        "spec.prompt",
        "there is a ROLE_POSITIVE entry in spec.prompts as well; keep one of them",
    ),
    (
        "positive twice",
        prompts((POSITIVE, "red"), (POSITIVE, "blue")),
        "spec.prompts[1].role",
        "there is a ROLE_POSITIVE entry before it; keep one of them",
    ),
    (
        "negative twice",
        prompts((NEGATIVE, "red"), (NEGATIVE, "red"), prompt="red"),
        "spec.prompts[1].role",
        "there is a ROLE_NEGATIVE entry before it; keep one of them",
    ),
    ("no role", prompts((0, "blue"), prompt="red"), "spec.prompts[0].role", "must be ROLE_POSITIVE or ROLE_NEGATIVE"),
    ("role 9", prompts((9, "blue"), prompt="red"), "spec.prompts[0].role", "must be ROLE_POSITIVE or ROLE_NEGATIVE"),
    ("blank positive", prompts((POSITIVE, " ")), "spec.prompts[0].text", "must not be blank"),
    (
        "control character in a negative prompt",
        prompts((NEGATIVE, "\x7f"), prompt="red"),
        "spec.prompts[0].text",
        "has the control character U+007F; take it out",
    ),
    ("width", request(width_px=63), "spec.width_px", SIZES),
    ("width 0", request(width_px=0), "spec.width_px", SIZES),
    ("height", request(height_px=-64), "spec.height_px", SIZES),
    ("size", request(width_px=64, height_px=2**31 - 1), "spec.height_px", SIZES),
    ("steps 0", request(num_inference_steps=0), "spec.num_inference_steps", STEPS),
    ("steps -1", request(num_inference_steps=-1), "spec.num_inference_steps", STEPS),
    ("steps 51", request(num_inference_steps=51), "spec.num_inference_steps", STEPS),
    ("guidance NaN", request(guidance_scale=math.nan), "spec.guidance_scale", GUIDANCE),
    ("guidance infinite", request(guidance_scale=math.inf), "spec.guidance_scale", GUIDANCE),
    ("guidance 0", request(guidance_scale=0.0), "spec.guidance_scale", GUIDANCE),
    ("guidance 0.99", request(guidance_scale=0.99), "spec.guidance_scale", GUIDANCE),
    ("guidance -3", request(guidance_scale=-3.0), "spec.guidance_scale", GUIDANCE),
    ("guidance 20.5", request(guidance_scale=20.5), "spec.guidance_scale", GUIDANCE),
    ("rescale 1.1", request(guidance_rescale=1.1), "spec.guidance_rescale", "must be from 0 (none) to 1"),
    ("rescale -0.1", request(guidance_rescale=-0.1), "spec.guidance_rescale", "must be from 0 (none) to 1"),
    ("rescale NaN", request(guidance_rescale=math.nan), "spec.guidance_rescale", "must be from 0 (none) to 1"),
    (
        "rescale of nothing",
        request(guidance_rescale=0.7, guidance_scale=1.0),
        "spec.guidance_rescale",
        "goes with guidance; leave it out, or ask for a guidance_scale above 1",
    ),
    ("interval from 1", interval(start=1.0), "spec.guidance_interval.start", FROM),
    ("interval from -0.1", interval(start=-0.1), "spec.guidance_interval.start", FROM),
    ("interval from NaN", interval(start=math.nan), "spec.guidance_interval.start", FROM),
    ("interval to 0", interval(end=0.0), "spec.guidance_interval.end", TO),
    ("interval to 1.1", interval(end=1.1), "spec.guidance_interval.end", TO),
    ("interval to NaN", interval(end=math.nan), "spec.guidance_interval.end", TO),
    (
        "interval backwards",
        interval(start=0.8, end=0.2),
        "spec.guidance_interval",
        "must end after it starts; 0.8 to 0.2 is empty",
    ),
    (
        "interval of nothing",
        interval(end=0.5, guidance_scale=1.0),
        "spec.guidance_interval",
        "goes with guidance; leave it out, or ask for a guidance_scale above 1",
    ),
    (
        "interval within a step",
        interval(start=0.51, end=0.54),
        "spec.guidance_interval",
        "leaves none of 20 steps with guidance; widen it, or set guidance_scale to 1 and leave it out",
    ),
    (
        "interval before the first step that is made",
        interval(end=0.5, init_image=IMAGE, strength=0.5),
        "spec.guidance_interval",
        "leaves none of 10 steps with guidance; widen it, or set guidance_scale to 1 and leave it out",
    ),
    ("outputs", request(outputs=[pb.OutputSpec()] * 5), "spec.outputs", "must have at most 4 entries"),
    (
        "sampler unknown",
        sampler(name="heun"),
        "spec.sampler.name",
        "models/small has no 'heun'; it has ddim, euler, dpmpp_2m",
    ),
    (
        "sampler not offered",
        sampler(name="euler_ancestral"),
        "spec.sampler.name",
        "models/small has no 'euler_ancestral'; it has ddim, euler, dpmpp_2m",
    ),
    (
        "spacing",
        sampler(name="euler", spacing=pb.TIMESTEP_SPACING_LEADING),
        "spec.sampler.spacing",
        "euler is offered with trailing only",
    ),
    ("spacing 9", sampler(spacing=9), "spec.sampler.spacing", "ddim is offered with trailing, leading only"),
    (
        "sigma schedule",
        sampler(sigma_schedule=pb.SIGMA_SCHEDULE_KARRAS),
        "spec.sampler.sigma_schedule",
        "ddim is offered with default only",
    ),
    (
        "sigma schedule 9",
        sampler(name="euler", sigma_schedule=9),
        "spec.sampler.sigma_schedule",
        "euler is offered with default, karras only",
    ),
    ("no image name", request(init_image="photo.png"), "spec.init_image", NOT_AN_IMAGE),
    ("image name in capitals", request(init_image=IMAGE.upper()), "spec.init_image", NOT_AN_IMAGE),
    ("mask name", request(init_image=IMAGE, mask="images/1"), "spec.mask", NOT_AN_IMAGE),
    ("a whole generation", request(init_image="generations/x"), "spec.init_image", NOT_AN_IMAGE),
    ("output without a number", request(init_image="generations/x/outputs/"), "spec.init_image", NOT_AN_IMAGE),
    ("output in a folder", request(init_image="generations/x/y/outputs/0"), "spec.init_image", NOT_AN_IMAGE),
    ("mask alone", request(mask=IMAGE), "spec.mask", ALONE),
    ("strength alone", request(strength=0.5), "spec.strength", ALONE),
    ("strength 0", request(init_image=IMAGE, strength=0.0), "spec.strength", STRENGTH),
    ("strength 1.1", request(init_image=IMAGE, strength=1.1), "spec.strength", STRENGTH),
    ("strength NaN", request(init_image=IMAGE, strength=math.nan), "spec.strength", STRENGTH),
    (
        "no step left",
        request(init_image=IMAGE, strength=0.04),
        "spec.strength",
        "leaves none of 20 steps; must be at least 0.05",
    ),
    ("eta", sampler(name="euler", eta=0.0), "spec.sampler.eta", "only ddim has it, euler has not; leave it out"),
    ("eta 1.5", sampler(eta=1.5), "spec.sampler.eta", "must be from 0 to 1"),
    ("eta -0.1", sampler(eta=-0.1), "spec.sampler.eta", "must be from 0 to 1"),
    ("eta NaN", sampler(eta=math.nan), "spec.sampler.eta", "must be from 0 to 1"),
    (
        "refused cell",
        request(
            num_inference_steps=30, sampler=pb.SamplerSpec(name="dpmpp_2m", sigma_schedule=pb.SIGMA_SCHEDULE_KARRAS)
        ),
        "spec.sampler",
        "the first two of 30 steps fall on one timestep; use another sampler or number of steps",
    ),
    (
        "encoding",
        encoding(media_type="image/gif"),
        "encoding.media_type",
        f"'image/gif' is not offered; there is {ALL_MEDIA}",
    ),
    ("encoding empty", encoding(), "encoding.media_type", f"'' is not offered; there is {ALL_MEDIA}"),
    (
        "quality of PNG",
        encoding(media_type="image/png", quality=80),
        "encoding.quality",
        "image/png has none; leave it out or use image/jpeg, image/webp",
    ),
    ("quality 0", encoding(media_type="image/jpeg", quality=0), "encoding.quality", "must be from 1 to 100"),
    ("quality 101", encoding(media_type="image/webp", quality=101), "encoding.quality", "must be from 1 to 100"),
    (
        "alignment of JPEG",
        encoding(media_type="image/jpeg", row_alignment_bytes=4),
        "encoding.row_alignment_bytes",
        ONLY_RAW,
    ),
    *(
        (
            f"alignment {alignment}",
            encoding(media_type=RAW, row_alignment_bytes=alignment),
            "encoding.row_alignment_bytes",
            "must be a power of two from 4 to 4096",
        )
        for alignment in (0, -4, 2, 12, 8192)
    ),
    (
        "row order of PNG",
        encoding(media_type="image/png", row_order=pb.PixelEncoding.ROW_ORDER_TOP_DOWN),
        "encoding.row_order",
        f"only {RAW}, image/ktx2 have it; leave it out",
    ),
    (
        "texture format of PNG",
        encoding(media_type="image/png", texture_format=pb.PixelEncoding.TEXTURE_FORMAT_BC1),
        "encoding.texture_format",
        "only image/ktx2 has it; leave it out",
    ),
    (
        "texture format 9",
        encoding(media_type="image/ktx2", texture_format=9),
        "encoding.texture_format",
        "must be TEXTURE_FORMAT_BC1 or TEXTURE_FORMAT_BC7",
    ),
    (
        "alignment of a texture",
        encoding(media_type="image/ktx2", row_alignment_bytes=4),
        "encoding.row_alignment_bytes",
        ONLY_RAW,
    ),
    (
        "row order 9",
        encoding(media_type=RAW, row_order=9),
        "encoding.row_order",
        "must be ROW_ORDER_TOP_DOWN or ROW_ORDER_BOTTOM_UP",
    ),
    (
        "nothing accepted",
        preview(accept=[pb.PixelEncoding(media_type="image/avif"), pb.PixelEncoding()]),
        "preview.accept",
        f"none of these is offered; there is {ALL_MEDIA}",
    ),
    (
        "a texture that takes long, of previews",
        preview(accept=[pb.PixelEncoding(media_type="image/ktx2", texture_format=pb.PixelEncoding.TEXTURE_FORMAT_BC7)]),
        "preview.accept[0].texture_format",
        "takes too long to make for previews; use TEXTURE_FORMAT_BC1",
    ),
    (
        "faulty second choice",
        preview(accept=[pb.PixelEncoding(media_type=RAW), pb.PixelEncoding(media_type="image/jpeg", quality=0)]),
        "preview.accept[1].quality",
        "must be from 1 to 100",
    ),
    ("edge", preview(max_edge_px=7), "preview.max_edge_px", "must be at least 8"),
    ("every 0 steps", preview(every_n_steps=0), "preview.every_n_steps", "must be at least 1"),
    ("every -1 steps", preview(every_n_steps=-1), "preview.every_n_steps", "must be at least 1"),
    ("interval 0", preview(min_interval={"seconds": 0}), "preview.min_interval", INTERVAL),
    ("interval -1", preview(min_interval={"seconds": -1}), "preview.min_interval", INTERVAL),
    ("interval of mixed signs", preview(min_interval={"seconds": 2, "nanos": -1}), "preview.min_interval", INTERVAL),
    ("budget", preview(max_bytes_per_second=1023), "preview.max_bytes_per_second", "must be at least 1024"),
    (
        "method 9",
        preview(method=9),
        "preview.method",
        "9 is unknown; use one of Model.preview_methods",
    ),
    (
        "tiny decoder",
        preview(method=pb.PREVIEW_METHOD_TINY_DECODER),
        "preview.method",
        "models/small has no PREVIEW_METHOD_TINY_DECODER; use another or AUTO",
    ),
    (
        "none with others",
        preview(method=pb.PREVIEW_METHOD_NONE, min_interval={"seconds": 1}, accept=[pb.PixelEncoding(media_type=RAW)]),
        "preview.method",
        "PREVIEW_METHOD_NONE contradicts accept, min_interval",
    ),
    (
        "priority 9",
        pb.GenerateRequest(spec=pb.GenerationSpec(prompt="red"), scheduling=pb.Scheduling(priority=9)),
        "scheduling.priority",
        "must be one of PRIORITY_INTERACTIVE, PRIORITY_STANDARD, PRIORITY_BATCH",
    ),
    (
        "cache mode 9",
        pb.GenerateRequest(spec=pb.GenerationSpec(prompt="red"), cache=pb.CachePolicy(mode=9)),
        "cache.mode",
        "must be one of MODE_DEFAULT, MODE_BYPASS, MODE_ALLOW_LATENT, MODE_ALLOW_SIMILAR",
    ),
    ("similarity 0", cache(4, 0.0), "cache.min_similarity", "must be above 0 and at most 1"),
    ("similarity 1.1", cache(4, 1.1), "cache.min_similarity", "must be above 0 and at most 1"),
    ("similarity nan", cache(4, math.nan), "cache.min_similarity", "must be above 0 and at most 1"),
    ("similarity of exact", cache(1, 0.9), "cache.min_similarity", "goes with MODE_ALLOW_SIMILAR only"),
    ("branch of nothing", branch(generation=""), "branch.generation", "must be generations/ID, as the server gave it"),
    ("branch at 0", branch(step=0), "branch.step", "must be from 1 to 19, one less than the steps"),
    ("branch at the end", branch(step=20), "branch.step", "must be from 1 to 19, one less than the steps"),
    ("branch of output -1", branch(output_index=-1), "branch.output_index", "must be at least 0"),
    (
        "branch of similar",
        cache(4, 0.9, branch().branch),
        "branch",
        "contradicts MODE_ALLOW_SIMILAR and MODE_ALLOW_LATENT; leave one of them out",
    ),
    (
        "floor of what is waited for",
        floored(pb.QualityFloor(cheaper_previews=True), interactive()),
        "quality_floor",
        "goes with PRIORITY_STANDARD and PRIORITY_BATCH; leave one of them out",
    ),
    ("floor of 0 steps", floored(pb.QualityFloor(min_num_steps=0)), "quality_floor.min_num_steps", FLOOR_STEPS),
    ("floor of 21 steps", floored(pb.QualityFloor(min_num_steps=21)), "quality_floor.min_num_steps", FLOOR_STEPS),
    (
        "floor of steps that strength leaves out",
        floored(pb.QualityFloor(min_num_steps=4), init_image=IMAGE, strength=0.2),
        "quality_floor.min_num_steps",
        "of 4 steps strength leaves none; ask for more",
    ),
    (
        "floor of steps without guidance",
        floored(
            pb.QualityFloor(min_num_steps=2),
            guidance_scale=5.0,
            guidance_interval=pb.GuidanceInterval(start=0.3, end=0.4),
        ),
        "quality_floor.min_num_steps",
        "of 2 steps spec.guidance_interval has none; ask for more",
    ),
    (
        "floor of steps of a branch",
        floored(pb.QualityFloor(min_num_steps=4), branch()),
        "quality_floor.min_num_steps",
        "contradicts branch, which has the steps of what it begins from",
    ),
    ("floor of similarity 0", floored(pb.QualityFloor(min_similarity=0.0)), "quality_floor.min_similarity", SIMILARITY),
    (
        "floor of similarity NaN",
        floored(pb.QualityFloor(min_similarity=math.nan)),
        "quality_floor.min_similarity",
        SIMILARITY,
    ),
    (
        "floor of similarity of a branch",
        floored(pb.QualityFloor(min_similarity=0.9), branch()),
        "quality_floor.min_similarity",
        "contradicts branch, which begins from a step of its own choice",
    ),
    (
        "floor of similarity without a cache",
        floored(pb.QualityFloor(min_similarity=0.9), bypassing()),
        "quality_floor.min_similarity",
        "contradicts MODE_BYPASS",
    ),
    (
        "floor of similarity that is allowed",
        floored(pb.QualityFloor(min_similarity=0.9), cache(4, 0.9)),
        "quality_floor.min_similarity",
        "must be below cache.min_similarity, which allows as much without pressure",
    ),
    ("action 9", disconnect(action=9), "disconnect.action", "must be ACTION_CANCEL or ACTION_DETACH"),
    ("grace -1", disconnect(resume_grace={"seconds": -1}), "disconnect.resume_grace", GRACE),
    ("grace 601", disconnect(resume_grace={"seconds": 601}), "disconnect.resume_grace", GRACE),
    ("grace invalid", disconnect(resume_grace={"nanos": 10**9}), "disconnect.resume_grace", GRACE),
    (
        "grace when detached",
        disconnect(action=pb.DisconnectPolicy.ACTION_DETACH, resume_grace={"seconds": 1}),
        "disconnect.resume_grace",
        "has no meaning with ACTION_DETACH; leave one of them out",
    ),
    ("request id", pb.GenerateRequest(spec=request().spec, request_id="1"), "request_id", NOT_UUID),
    (
        "request id in braces",
        pb.GenerateRequest(spec=request().spec, request_id="{" + UUID + "}"),
        "request_id",
        NOT_UUID,
    ),
    (
        "nil request id",
        pb.GenerateRequest(spec=request().spec, request_id="00000000-0000-0000-0000-000000000000"),
        "request_id",
        NOT_UUID,
    ),
    ("labels", labelled(**{f"k{n}": "" for n in range(17)}), "labels", "has 17 entries; at most 16 are taken"),
    ("label key empty", labelled(**{"": "v"}), "labels['']", "a key has 1 to 63 characters"),
    ("label key", labelled(**{"k" * 64: ""}), f"labels['{'k' * 64}']", "a key has 1 to 63 characters"),
    ("label value", labelled(k="v" * 256), "labels['k']", "a value has at most 255 characters"),
]


@pytest.mark.parametrize(
    ("message", "field", "description"), [case[1:] for case in FAULTS], ids=[case[0] for case in FAULTS]
)
def test_a_fault_names_its_field_and_what_to_change(
    catalog: Catalog, message: pb.GenerateRequest, field: str, description: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        resolve_request(message, catalog, LIMITS)
    assert [(fault.field, fault.description) for fault in refused.value.violations] == [(field, description)]
    assert refused.value.message == f"{field}: {description}"


def test_all_faults_are_named_at_once(catalog: Catalog) -> None:
    message = request(prompt="", num_inference_steps=0, guidance_scale=math.nan, width_px=1)
    message.encoding.media_type = "image/gif"
    message.preview.every_n_steps = 0
    message.request_id = "x"
    with pytest.raises(InvalidRequestError) as refused:
        resolve_request(message, catalog, LIMITS)
    assert {fault.field for fault in refused.value.violations} == {
        "spec.prompt",
        "spec.num_inference_steps",
        "spec.guidance_scale",
        "spec.width_px",
        "encoding.media_type",
        "preview.every_n_steps",
        "request_id",
    }
    assert refused.value.message.endswith("; and 4 more")


def test_faults_are_bounded_however_many_there_are(catalog: Catalog) -> None:
    message = pb.GenerateRequest(request_id="x", spec=pb.GenerationSpec(num_inference_steps=0, guidance_scale=0))
    message.encoding.media_type = "image/gif"
    message.labels.update({"k" * 64 + str(index): "v" * 256 for index in range(16)})
    with pytest.raises(InvalidRequestError) as refused:
        resolve_request(message, catalog, LIMITS)
    assert len(refused.value.violations) == MAX_FAULTS
    assert refused.value.violations[-1].description.endswith("(and 21 faults more)")


def test_a_flood_of_entries_is_one_fault_each(catalog: Catalog) -> None:
    many = 2570
    message = prompts(*[(0, "")] * many, prompt="red")
    message.spec.outputs.extend([pb.OutputSpec()] * many)
    message.preview.accept.extend([pb.PixelEncoding()] * many)
    message.labels.update({str(index): "" for index in range(many)})
    with pytest.raises(InvalidRequestError) as refused:
        resolve_request(message, catalog, LIMITS)
    fields = [fault.field for fault in refused.value.violations if not fault.field.startswith("spec.prompts[")]
    assert fields == ["spec.prompts", "spec.outputs", "preview.accept", "labels"]


@pytest.mark.parametrize("name", ["models/icons", "small", "models/", "models/small/x", "x" * 10_000, "models/\0"])
def test_an_unknown_model_is_not_found_and_the_others_are_named(catalog: Catalog, name: str) -> None:
    with pytest.raises(NotFoundError) as refused:
        resolve_request(request(model=name, num_inference_steps=0), catalog, LIMITS)
    (fault,) = refused.value.violations
    assert fault.field == "spec.model"
    assert fault.description.endswith("; there is models/small")
    assert len(fault.description) < 200
    assert refused.value.reason == "MODEL_NOT_FOUND"


def test_what_is_absent_gets_the_models_default(catalog: Catalog) -> None:
    resolved = resolve_request(request(), catalog, LIMITS)
    spec = resolved.spec
    assert (spec.model, spec.revision, spec.prompt, spec.negative_prompt) == ("small", "r1", "red potion", "")
    assert (spec.width_px, spec.height_px, spec.num_inference_steps, spec.guidance_scale) == (64, 64, 20, 3.0)
    assert spec.token_ids == (BOS, 4, 6, EOS, *[PAD] * 4)
    assert spec.negative_token_ids == (BOS, EOS, *[PAD] * 6)
    assert spec.sampler == SamplerSpec("ddim", "trailing", "default", 0.0)
    assert resolved.preview == PreviewPolicy()
    assert resolved.preview.encoding == PixelEncoding(MediaType.JPEG, quality=85)
    assert resolved.encoding == PixelEncoding(MediaType.PNG)
    assert resolved.priority is Priority.STANDARD
    assert resolved.disconnect == DisconnectPolicy(detach=False, resume_grace_s=30.0)
    assert (resolved.request_id, resolved.labels, resolved.warnings) == ("", {}, ())


def test_what_is_given_is_taken(catalog: Catalog) -> None:
    message = prompts((POSITIVE, "blue\nsword"), (NEGATIVE, "red"))
    message.spec.MergeFrom(
        pb.GenerationSpec(
            model="models/small",
            height_px=96,
            num_inference_steps=5,
            guidance_scale=2.5,
            sampler=pb.SamplerSpec(name="dpmpp_2m", sigma_schedule=pb.SIGMA_SCHEDULE_KARRAS),
            outputs=[pb.OutputSpec(seed=0), pb.OutputSpec(seed=2**64 - 1), pb.OutputSpec()],
        )
    )
    message.encoding.CopyFrom(
        pb.PixelEncoding(media_type=RAW, row_alignment_bytes=256, row_order=pb.PixelEncoding.ROW_ORDER_BOTTOM_UP)
    )
    message.scheduling.priority = pb.PRIORITY_BATCH
    message.disconnect.action = pb.DisconnectPolicy.ACTION_DETACH
    message.request_id = UUID
    message.labels["who"] = "me"
    resolved = resolve_request(message, catalog, LIMITS)
    spec = resolved.spec
    assert (spec.prompt, spec.negative_prompt) == ("blue\nsword", "red")
    assert spec.negative_token_ids == (BOS, 4, EOS, *[PAD] * 5)
    assert (spec.width_px, spec.height_px, spec.num_inference_steps, spec.guidance_scale) == (64, 96, 5, 2.5)
    assert spec.sampler == SamplerSpec("dpmpp_2m", "trailing", "karras", 0.0)
    assert spec.seeds[:2] == (0, 2**64 - 1)
    assert len(spec.seeds) == 3
    assert resolved.encoding == PixelEncoding(MediaType.RAW_RGBA8, row_alignment_bytes=256, bottom_up=True)
    assert resolved.priority is Priority.BATCH
    assert resolved.disconnect.detach
    assert resolved.request_id == UUID.lower()
    assert resolved.labels == {"who": "me"}


def test_the_first_preview_encoding_that_is_offered_is_taken(catalog: Catalog) -> None:
    accept = [pb.PixelEncoding(media_type="image/avif", quality=1000), pb.PixelEncoding(media_type=RAW)]
    policy = resolve_preview(pb.PreviewPolicy(accept=accept), catalog.get(""))
    assert policy.encoding == PixelEncoding(MediaType.RAW_RGBA8)


def test_a_preview_policy_is_resolved_field_by_field(catalog: Catalog) -> None:
    message = pb.PreviewPolicy(
        max_edge_px=8,
        min_interval={"nanos": 250_000_000},
        method=pb.PREVIEW_METHOD_LINEAR,
        max_bytes_per_second=1024,
    )
    policy = resolve_preview(message, catalog.get(""))
    expected = PreviewPolicy(method=PreviewMethod.LINEAR, max_edge_px=8, min_interval_s=0.25, max_bytes_per_second=1024)
    assert policy == expected
    only_none = resolve_preview(pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE), catalog.get(""))
    assert only_none.method is PreviewMethod.NONE
    with pytest.raises(InvalidRequestError, match=r"preview\.every_n_steps"):
        resolve_preview(pb.PreviewPolicy(every_n_steps=0), catalog.get(""))


def test_the_tiny_decoder_is_taken_where_there_is_one(tmp_path: Path) -> None:
    decoder = {"model": "small_preview_decoder", "version": 1, "sha256": "0" * 64}
    pipeline = small_pipeline(tmp_path, components={**MANIFEST["components"], "preview_decoder": decoder})
    policy = resolve_preview(pb.PreviewPolicy(method=pb.PREVIEW_METHOD_TINY_DECODER), pipeline)
    assert policy.method is PreviewMethod.TINY_DECODER


def test_a_priority_is_resolved_alone() -> None:
    assert resolve_priority(pb.Scheduling()) is Priority.STANDARD
    assert resolve_priority(pb.Scheduling(priority=pb.PRIORITY_INTERACTIVE)) is Priority.INTERACTIVE
    with pytest.raises(InvalidRequestError, match=r"scheduling\.priority"):
        resolve_priority(pb.Scheduling(priority=77))


def test_without_guidance_there_is_one_row_and_a_negative_prompt_is_told_to_be_unused(catalog: Catalog) -> None:
    message = prompts((NEGATIVE, "blue"), prompt="red")
    message.spec.guidance_scale = 1.0
    resolved = resolve_request(message, catalog, LIMITS)
    assert (resolved.spec.negative_token_ids, resolved.spec.negative_prompt) == (None, "")
    assert [notice.reason for notice in resolved.warnings] == ["NEGATIVE_PROMPT_UNUSED"]


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """A model whose denoiser has the guidance scale as an input, like FLUX.1-dev."""
    inputs = {**STABLE_DIFFUSION_INPUTS, "guidance": GUIDANCE_SOURCE}
    return small_catalog(tmp_path_factory.mktemp("distilled"), inputs=inputs)


def test_a_model_distilled_for_guidance_has_one_row_a_step(distilled: Catalog) -> None:
    message = prompts((NEGATIVE, "blue"), prompt="red")
    message.spec.guidance_scale = 4.5
    resolved = resolve_request(message, distilled, LIMITS)
    assert resolved.spec.guidance_scale == 4.5
    assert resolved.spec.token_ids_by_row == (resolved.spec.token_ids,)
    assert resolved.spec.negative_prompt == ""
    [notice] = resolved.warnings
    assert (notice.reason, notice.message) == (
        "NEGATIVE_PROMPT_UNUSED",
        "a negative prompt has no effect with this model",
    )


@pytest.mark.parametrize(
    ("message", "field", "description"),
    [
        (request(guidance_rescale=0.5), "spec.guidance_rescale", DISTILLED),
        (interval(end=0.5), "spec.guidance_interval", DISTILLED),
        (request(guidance_scale=0.5), "spec.guidance_scale", "must be a number from 1 to 20"),
    ],
)
def test_what_a_model_distilled_for_guidance_cannot_do_is_refused(
    distilled: Catalog, message: pb.GenerateRequest, field: str, description: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        resolve_request(message, distilled, LIMITS)
    assert [(fault.field, fault.description) for fault in refused.value.violations] == [(field, description)]


def test_an_empty_negative_prompt_is_none(catalog: Catalog) -> None:
    message = prompts((NEGATIVE, ""), prompt="red")
    message.spec.guidance_scale = 1.0
    assert resolve_request(message, catalog, LIMITS).warnings == ()


def test_a_prompt_longer_than_the_context_is_cut_with_a_warning(catalog: Catalog) -> None:
    fits, long = " ".join(["red"] * (MAX_TOKENS - 2)), " ".join(["red"] * (MAX_TOKENS - 1))
    assert resolve_request(request(prompt=fits), catalog, LIMITS).warnings == ()
    resolved = resolve_request(prompts((NEGATIVE, long), prompt=long), catalog, LIMITS)
    assert resolved.spec.token_ids == (BOS, *[4] * (MAX_TOKENS - 2), EOS)
    assert [notice.reason for notice in resolved.warnings] == ["PROMPT_TRUNCATED"] * 2
    assert resolved.warnings[0].message == "the prompt has 9 tokens; the model reads 8, the rest has no effect"


def test_seeds_that_are_absent_are_chosen_afresh(catalog: Catalog) -> None:
    chosen = {resolve_request(request(), catalog, LIMITS).spec.seeds for _ in range(8)}
    assert len(chosen) == 8
    assert all(len(seeds) == 1 and 0 <= seeds[0] < 2**64 for seeds in chosen)


@pytest.mark.parametrize("name", ["", "generations/", "generations/a/b", "models/a", "a", "generations/" + "a" * 65])
def test_a_resource_name_has_its_form(name: str) -> None:
    with pytest.raises(InvalidRequestError, match="name: must be generations/ID"):
        resolve_name(name, "generations")


def test_a_resource_name_gives_its_id() -> None:
    assert resolve_name("generations/abc-1", "generations") == "abc-1"


def test_an_empty_model_name_is_the_default(catalog: Catalog) -> None:
    assert find_model("", catalog, "spec.model").name == "small"


TEXT = st.text(max_size=120) | st.sampled_from(["red", "", " ", "x" * 101])
INTS = st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 130)
FLOATS = st.floats(width=32) | st.floats(0, 30, width=32)
ENUMS = st.integers(0, 6) | st.integers(-(2**31), 2**31 - 1)
DURATIONS = st.builds(
    Duration,
    seconds=st.integers(-1, 700) | st.integers(-(2**63), 2**63 - 1),
    nanos=st.just(0) | st.integers(-(2**31), 2**31 - 1),
)


def maybe(values: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.none() | values


def merged(first: pb.PreviewPolicy, second: pb.PreviewPolicy) -> pb.PreviewPolicy:
    first.MergeFrom(second)
    return first


ENCODINGS = st.builds(
    pb.PixelEncoding,
    media_type=st.sampled_from([*MediaType, "image/gif", ""]),
    quality=maybe(INTS),
    row_alignment_bytes=maybe(INTS | st.sampled_from([4, 256, 4096])),
    row_order=ENUMS,
)
SPECS = st.builds(
    pb.GenerationSpec,
    model=st.sampled_from(["", "models/small", "models/x", "small"]),
    prompt=TEXT,
    prompts=st.lists(st.builds(pb.Prompt, role=ENUMS, text=TEXT), max_size=3),
    width_px=maybe(INTS | st.just(64)),
    height_px=maybe(INTS | st.just(96)),
    num_inference_steps=maybe(INTS),
    guidance_scale=maybe(FLOATS),
    guidance_rescale=maybe(FLOATS),
    guidance_interval=maybe(st.builds(pb.GuidanceInterval, start=maybe(FLOATS), end=maybe(FLOATS))),
    sampler=st.builds(
        pb.SamplerSpec,
        name=st.sampled_from(["", "ddim", "euler", "dpmpp_2m", "lcm", "x" * 1000]),
        sigma_schedule=ENUMS,
        spacing=ENUMS,
        eta=maybe(FLOATS),
    ),
    outputs=st.lists(st.builds(pb.OutputSpec, seed=maybe(st.integers(0, 2**64 - 1))), max_size=6),
    adapters=st.lists(st.builds(pb.Adapter, name=st.text(max_size=80), scale=maybe(FLOATS)), max_size=6),
    controls=st.lists(
        st.builds(
            pb.Control,
            name=st.sampled_from(["edges", "depth", "x"]),
            image=st.sampled_from([IMAGE, "x"]),
            scale=maybe(FLOATS),
            start=maybe(FLOATS),
            end=maybe(FLOATS),
        ),
        max_size=3,
    ),
    image_prompt=maybe(st.builds(pb.ImagePrompt, image=st.sampled_from(["", IMAGE, "x"]), scale=maybe(FLOATS))),
)
PREVIEWS = st.builds(
    pb.PreviewPolicy,
    accept=st.lists(ENCODINGS, max_size=3),
    max_edge_px=maybe(INTS),
    method=ENUMS,
    max_bytes_per_second=maybe(st.integers(-(2**63), 2**63 - 1)),
)
CADENCES = st.builds(pb.PreviewPolicy, every_n_steps=maybe(INTS)) | st.builds(pb.PreviewPolicy, min_interval=DURATIONS)
FLOORS = st.builds(pb.QualityFloor, min_num_steps=maybe(INTS), min_similarity=maybe(st.floats(width=32)))
REQUESTS = st.builds(
    pb.GenerateRequest,
    spec=SPECS,
    preview=st.builds(merged, PREVIEWS, CADENCES),
    encoding=maybe(ENCODINGS),
    scheduling=st.builds(pb.Scheduling, priority=ENUMS),
    disconnect=st.builds(pb.DisconnectPolicy, action=ENUMS, resume_grace=maybe(DURATIONS)),
    cache=st.builds(pb.CachePolicy, mode=ENUMS, min_similarity=maybe(st.floats(width=32))),
    branch=maybe(st.builds(pb.Branch, generation=st.sampled_from(["", "generations/1"]), output_index=INTS, step=INTS)),
    quality_floor=maybe(FLOORS),
    request_id=st.sampled_from(["", UUID, "x", UUID + "\n"]),
    labels=st.dictionaries(st.text(max_size=70), st.text(max_size=260), max_size=18),
)


@given(message=REQUESTS)
@example(message=pb.GenerateRequest(spec=pb.GenerationSpec(prompt="red")))
@settings(deadline=None)
def test_any_message_is_a_request_within_limits_or_is_refused(catalog: Catalog, message: pb.GenerateRequest) -> None:
    try:
        resolved = resolve_request(message, catalog, LIMITS)
    except NotFoundError as error:
        assert message.spec.model not in ("", "models/small")
        assert len(error.message) < 300
    except InvalidRequestError as error:
        assert 0 < len(error.violations) <= MAX_FAULTS
        assert sum(len(f.field.encode()) + len(f.description.encode()) for f in error.violations) < 5000
        assert all(fault.field and fault.description for fault in error.violations)
    else:
        check_within_limits(resolved, catalog)


def check_within_limits(resolved: Request, catalog: Catalog) -> None:
    pipeline, spec = catalog.get(resolved.spec.model), resolved.spec
    limits = pipeline.manifest.limits
    assert spec.prompt.strip()
    assert len(spec.prompt) <= LIMITS.max_prompt_chars
    assert 1 <= spec.num_inference_steps <= limits.max_num_inference_steps
    assert 1 <= spec.guidance_scale <= limits.max_guidance_scale
    assert (spec.negative_token_ids is None) == (spec.guidance_scale == 1)
    assert 0 <= spec.guidance_rescale <= 1
    assert spec.guidance_interval[0] < spec.guidance_interval[1]
    assert range(spec.num_inference_steps)[spec.guided_steps.start : spec.guided_steps.stop]
    assert 1 <= len(spec.seeds) <= limits.max_outputs
    assert (spec.width_px, spec.height_px) in ((64, 64), (64, 96))
    assert len(spec.token_ids) == MAX_TOKENS
    assert refusal(spec.sampler, pipeline.schedule, "v_prediction", spec.num_inference_steps) is None
    for encoded in (resolved.encoding, resolved.preview.encoding):
        assert 1 <= encoded.quality <= 100
        assert encoded.row_alignment_bytes in {2**n for n in range(2, 13)}
    preview_policy = resolved.preview
    assert preview_policy.every_n_steps >= 1
    assert preview_policy.min_interval_s >= 0
    assert preview_policy.method is not PreviewMethod.TINY_DECODER
    assert preview_policy.max_edge_px is None or preview_policy.max_edge_px >= 8
    assert 0 <= resolved.disconnect.resume_grace_s <= LIMITS.max_resume_grace_s
    assert len(resolved.labels) <= 16
    least = resolved.quality_floor.min_num_steps
    if least is not None:
        assert 1 <= least <= spec.num_inference_steps
        assert refusal(spec.sampler, pipeline.schedule, "v_prediction", least) is None
        assert replace(spec, num_inference_steps=least).first_step < least
    assert 0 < (resolved.quality_floor.min_similarity or 1) <= 1


@given(data=st.binary(max_size=200))
def test_whatever_protobuf_parses_has_an_answer(catalog: Catalog, data: bytes) -> None:
    try:
        message = pb.GenerateRequest.FromString(data)
    except DecodeError:
        return
    with contextlib.suppress(InvalidRequestError, NotFoundError):
        resolve_request(message, catalog, LIMITS)


JUDGED_ELSEWHERE = {
    "spec.model",  # NotFoundError
    "spec.adapters",  # ADAPTER_FAULTS
    "spec.controls",  # CONTROL_FAULTS
    "spec.image_prompt",  # IMAGE_PROMPT_FAULTS
    "spec.outputs.seed",  # any number of a uint64 is a seed
    "preview.accept",  # its fields are those of encoding
    "quality_floor.cheaper_previews",  # either is good
}


def test_every_field_of_the_contract_has_a_fault_of_its_own() -> None:
    """A new field of the API must not be ignored silently."""
    seen = {re.sub(r"\[.*?\]", "", field) for _, _, field, _ in FAULTS}
    missing = {path for path in leaves(pb.GenerateRequest.DESCRIPTOR, "") if path not in seen}
    missing = {path for path in missing if not any(path.startswith(known) for known in JUDGED_ELSEWHERE)}
    assert missing == set()


def leaves(message: Descriptor, prefix: str) -> Iterator[str]:
    for field in message.fields:
        inner = field.message_type
        is_leaf = inner is None or inner.GetOptions().map_entry or inner.file != message.file
        if is_leaf:
            yield prefix + field.name
        else:
            yield from leaves(inner, f"{prefix}{field.name}.")


@pytest.mark.parametrize(("strength", "left_out"), [(0.7, 3), (0.3, 7), (0.1, 9), (1.0, 0), (None, 2), (0.58, 5)])
def test_strength_is_the_share_of_the_steps_as_it_was_meant(catalog: Catalog, strength: float, left_out: int) -> None:
    """0.7 as a float32 is less than 0.7, by which 10 steps would become 6."""
    message = request(init_image=IMAGE, strength=strength, num_inference_steps=10)
    assert resolve_request(message, catalog, LIMITS).spec.first_step == left_out


def test_steps_that_are_left_out_cost_no_rows(catalog: Catalog) -> None:
    few = replace(LIMITS, max_request_rows=10)
    message = request(init_image=IMAGE, strength=0.5, num_inference_steps=10, guidance_scale=3)
    assert resolve_request(message, catalog, few).spec.first_step == 5
    message.spec.strength = 0.6
    with pytest.raises(InvalidRequestError, match="costs 12 denoiser rows"):
        resolve_request(message, catalog, few)


def test_a_model_without_an_encoder_starts_from_no_picture(tmp_path: Path) -> None:
    without = {role: at for role, at in MANIFEST["components"].items() if role != "encoder"}
    with pytest.raises(InvalidRequestError, match=r"spec\.init_image: models/small cannot start from a picture"):
        resolve_request(request(init_image=IMAGE), small_catalog(tmp_path, components=without), LIMITS)


@pytest.mark.parametrize(
    ("start", "end", "steps", "guided"),
    [
        (0.2, 0.8, 10, range(2, 8)),
        (0.7, None, 10, range(7, 10)),
        (None, 0.3, 10, range(3)),
        (0.25, 0.75, 5, range(1, 3)),
        (0.0, 1.0, 7, range(7)),
        (None, None, 7, range(7)),
        (0.99, 1.0, 50, range(49, 50)),
    ],
)
def test_an_interval_is_counted_in_whole_steps(
    catalog: Catalog, start: float | None, end: float | None, steps: int, guided: range
) -> None:
    """As in diffusers, and with 0.7 as the client wrote it, not as a float32."""
    spec = resolve_request(interval(start, end, num_inference_steps=steps), catalog, LIMITS).spec
    assert spec.guided_steps == guided
    assert (spec == replace(plain_spec(catalog, steps), seeds=spec.seeds)) == (guided == range(steps))


def plain_spec(catalog: Catalog, steps: int) -> Spec:
    return resolve_request(request(num_inference_steps=steps), catalog, LIMITS).spec


def test_what_says_nothing_of_guidance_may_be_said_without_guidance(catalog: Catalog) -> None:
    message = interval(0.0, 1.0, guidance_rescale=0.0, guidance_scale=1.0)
    assert resolve_request(message, catalog, LIMITS).spec.negative_token_ids is None


def test_steps_outside_of_the_interval_cost_one_row(catalog: Catalog) -> None:
    few = replace(LIMITS, max_request_rows=32)
    message = interval(0.2, 0.8, num_inference_steps=10, outputs=[pb.OutputSpec(), pb.OutputSpec()])
    assert resolve_request(message, catalog, few).spec.guided_steps == range(2, 8)
    message.spec.guidance_interval.end = 0.9
    with pytest.raises(InvalidRequestError, match="with 2 outputs costs 34 denoiser rows"):
        resolve_request(message, catalog, few)


def adapters(*given: str | tuple[str, float]) -> pb.GenerateRequest:
    entries = [(one, None) if isinstance(one, str) else one for one in given]
    return request(adapters=[pb.Adapter(name=name, scale=scale) for name, scale in entries])


ADAPTER_SCALE = "must be from -10 to 10"
ADAPTER_FAULTS = [
    (
        adapters("pixel", "broken"),
        "[1].name",
        "models/small has no adapter 'broken'; the one in the folder must have one",
    ),
    (adapters("pixel", "pixel"), "[1].name", "'pixel' is there twice; keep one of them"),
    (adapters(("pixel", 10.1)), "[0].scale", ADAPTER_SCALE),
    (adapters(("pixel", -math.inf)), "[0].scale", ADAPTER_SCALE),
    (adapters("ink", ("pixel", math.nan)), "[1].scale", ADAPTER_SCALE),
    (adapters("pixel", "ink", "glow", "wash"), "", "have ranks of 8 together; models/small has room for 6: name fewer"),
    (adapters(*"abcde"), "", "has 5 entries; at most 4 are taken"),
]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    folder = tmp_path_factory.mktemp("adapted")
    (folder / "adapters" / "broken").mkdir(parents=True)
    return adapted_catalog(folder, "pixel", "ink", "glow", "wash")


@pytest.mark.parametrize(("message", "field", "what"), ADAPTER_FAULTS)
def test_a_fault_of_an_adapter_is_named(adapted: Catalog, message: pb.GenerateRequest, field: str, what: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        resolve_request(message, adapted, LIMITS)
    [fault] = refused.value.violations
    assert fault.field == f"spec.adapters{field}"
    assert fault.description.startswith(what)


@pytest.mark.parametrize("name", ["unheard of", ""])
def test_an_adapter_that_is_not_there_is_not_found(adapted: Catalog, name: str) -> None:
    with pytest.raises(NotFoundError, match="has no adapter") as refused:
        resolve_request(adapters(name), adapted, LIMITS)
    assert refused.value.reason == "ADAPTER_NOT_FOUND"
    [fault] = refused.value.violations
    assert fault.field == "spec.adapters[0].name"
    assert fault.description == f"models/small has no adapter {name!r}; it has glow, ink, pixel, wash"


def test_beside_other_faults_an_adapter_that_is_not_there_is_one_of_them(adapted: Catalog) -> None:
    message = adapters(("pixel", 10.1), "unheard of")
    with pytest.raises(InvalidRequestError) as refused:
        resolve_request(message, adapted, LIMITS)
    assert [fault.field for fault in refused.value.violations] == ["spec.adapters[0].scale", "spec.adapters[1].name"]


def test_a_model_without_room_takes_no_adapters(catalog: Catalog) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        resolve_request(adapters("pixel"), catalog, LIMITS)
    [fault] = refused.value.violations
    assert fault.field == "spec.adapters"
    assert fault.description.startswith("models/small takes no adapters")


def test_adapters_are_resolved_to_their_content_in_one_order(adapted: Catalog) -> None:
    sha256 = {name: file.sha256 for name, file in adapted.adapters.of("small").items()}
    expected = (AdapterUse("glow", 1.0, sha256["glow"]), AdapterUse("pixel", 0.8, sha256["pixel"]))
    for given_ in (("glow", ("pixel", 0.8)), (("pixel", 0.8), ("ink", 0.0), ("glow", 1.0))):
        assert resolve_request(adapters(*given_), adapted, LIMITS).spec.adapters == expected
    assert resolve_request(adapters(("pixel", 0.0)), adapted, LIMITS).spec.adapters == ()


def test_a_factor_of_0_takes_no_room(adapted: Catalog) -> None:
    spec = resolve_request(adapters("pixel", "ink", "glow", ("wash", -0.0)), adapted, LIMITS).spec
    assert [adapter.name for adapter in spec.adapters] == ["glow", "ink", "pixel"]


def controls(*given: dict[str, object], **spec: object) -> pb.GenerateRequest:
    return request(controls=[pb.Control(**({"name": "edges", "image": IMAGE} | entry)) for entry in given], **spec)


CONTROL_SCALE = "must be from 0 to 10"
CONTROL_FAULTS = [
    (controls({"name": "pose"}), "[0].name", "models/small has no control 'pose'; it has edges, depth"),
    (controls({"name": ""}), "[0].name", "models/small has no control ''; it has edges, depth"),
    (controls({}, {"scale": 0}), "[1].name", "'edges' is there twice; keep one of them"),
    (controls(*[{}] * 3), "", "has 3 entries; at most one of each is taken, of edges, depth"),
    (controls({"image": "photo.png"}), "[0].image", "must be images/SHA256 with 64 hexadecimal digits"),
    (controls({"image": "", "scale": 0}), "[0].image", "must be images/SHA256 with 64 hexadecimal digits"),
    (controls({"scale": -0.1}), "[0].scale", CONTROL_SCALE),
    (controls({"scale": 10.1}), "[0].scale", CONTROL_SCALE),
    (controls({"scale": math.nan}), "[0].scale", CONTROL_SCALE),
    (controls({"start": -0.1}), "[0].start", "must be from 0 to below 1, a share of the steps"),
    (controls({"start": 1}), "[0].start", "must be from 0 to below 1, a share of the steps"),
    (controls({"end": 0}), "[0].end", "must be above 0 and at most 1, a share of the steps"),
    (controls({"name": "depth"}, {"end": math.nan}), "[1].end", "must be above 0 and at most 1"),
    (controls({"start": 0.8, "end": 0.2}), "[0]", "must end after it starts; 0.8 to 0.2 is empty"),
    (controls({"start": 0.96}), "[0]", "from 0.96 to 1 it acts in none of 20 steps; widen it"),
    (
        controls({"end": 0.5}, init_image=IMAGE, strength=0.25),
        "[0]",
        "from 0 to 0.5 it acts in none of 5 steps; widen it",
    ),
]


@pytest.mark.parametrize(("message", "field", "what"), CONTROL_FAULTS)
def test_a_fault_of_a_control_is_named(adapted: Catalog, message: pb.GenerateRequest, field: str, what: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        resolve_request(message, adapted, LIMITS)
    [fault] = refused.value.violations
    assert fault.field == f"spec.controls{field}"
    assert fault.description.startswith(what)


def test_a_model_without_control_networks_takes_no_controls(catalog: Catalog) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        resolve_request(controls({}), catalog, LIMITS)
    [fault] = refused.value.violations
    assert fault.field == "spec.controls"
    assert fault.description.startswith("models/small takes no controls: it was exported without control networks")


def test_controls_stand_in_the_order_of_their_names_without_those_of_no_effect(adapted: Catalog) -> None:
    depth, edges = ControlUse("depth", "ab" * 32, 1.0, 0.2), ControlUse("edges", "ab" * 32, 0.7)
    given_ = [{"scale": 0.7}, {"name": "depth", "start": 0.2}]
    for order in (given_, given_[::-1]):
        assert resolve_request(controls(*order), adapted, LIMITS).spec.controls == (depth, edges)
    assert resolve_request(controls({"scale": 0}, given_[1]), adapted, LIMITS).spec.controls == (depth,)
    assert edges.steps(20) == range(20)
    assert depth.steps(20) == range(4, 20)


def test_a_picture_of_another_generation_may_be_a_control(adapted: Catalog) -> None:
    name = f"generations/{'0' * 32}/outputs/1"
    spec = resolve_request(controls({"image": name}, {"name": "depth"}), adapted, LIMITS).spec
    assert spec.named_outputs == {"controls[edges].image": name}
    kept = spec.with_images({"controls[edges].image": "cd" * 32})
    assert [control.image for control in kept.controls] == ["ab" * 32, "cd" * 32]
    assert kept.named_outputs == {}


def test_a_floor_must_leave_a_step_for_every_control(adapted: Catalog) -> None:
    message = floored(pb.QualityFloor(min_num_steps=4), controls({"start": 0.8}, {"name": "depth"}))
    with pytest.raises(InvalidRequestError) as refused:
        resolve_request(message, adapted, LIMITS)
    [fault] = refused.value.violations
    assert fault.field == "quality_floor.min_num_steps"
    assert fault.description == "of 4 steps the control edges acts in none; ask for more"
    message.quality_floor.min_num_steps = 5
    assert resolve_request(message, adapted, LIMITS).quality_floor.min_num_steps == 5


@given(message=REQUESTS)
def test_whatever_is_asked_of_a_model_with_everything_has_an_answer(
    adapted: Catalog, message: pb.GenerateRequest
) -> None:
    with contextlib.suppress(InvalidRequestError, NotFoundError):
        spec = resolve_request(message, adapted, LIMITS).spec
        for control in spec.controls:
            assert any(step >= spec.first_step for step in control.steps(spec.num_inference_steps))


def image_prompt(image: str, scale: float | None = None) -> pb.GenerateRequest:
    return request(image_prompt=pb.ImagePrompt(image=image, scale=scale))


IMAGE_PROMPT_FAULTS = [
    (image_prompt(""), "image", "must be images/SHA256 with 64 hexadecimal digits"),
    (image_prompt("photo.png"), "image", "must be images/SHA256 with 64 hexadecimal digits"),
    (image_prompt(IMAGE, -0.1), "scale", "must be from 0 (no effect) to 2"),
    (image_prompt(IMAGE, 2.1), "scale", "must be from 0 (no effect) to 2"),
    (image_prompt(IMAGE, math.nan), "scale", "must be from 0 (no effect) to 2"),
]


@pytest.mark.parametrize(("message", "field", "what"), IMAGE_PROMPT_FAULTS)
def test_a_fault_of_an_image_prompt_is_named(
    adapted: Catalog, message: pb.GenerateRequest, field: str, what: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        resolve_request(message, adapted, LIMITS)
    [fault] = refused.value.violations
    assert fault.field == f"spec.image_prompt.{field}"
    assert fault.description.startswith(what)


def test_a_model_without_an_ip_adapter_takes_no_image_prompt(catalog: Catalog) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        resolve_request(image_prompt(IMAGE), catalog, LIMITS)
    [fault] = refused.value.violations
    assert fault.field == "spec.image_prompt"
    assert fault.description.startswith("models/small takes no image prompt")


@pytest.mark.parametrize(("scale", "expected"), [(None, 1.0), (0.6, 0.6), (2.0, 2.0), (0.0, 0.0), (-0.0, 0.0)])
def test_an_image_prompt_counts_as_it_was_meant(adapted: Catalog, scale: float | None, expected: float) -> None:
    spec = resolve_request(image_prompt(IMAGE, scale), adapted, LIMITS).spec
    assert (spec.image_prompt, spec.image_prompt_scale) == (IMAGE.removeprefix("images/") if expected else "", expected)


def test_outputs_that_pictures_are_named_by_are_replaced_by_their_content(adapted: Catalog) -> None:
    names = {field: f"generations/{field.replace('_', '')}/outputs/0" for field in ("init_image", "mask")}
    message = request(**names, image_prompt=pb.ImagePrompt(image="generations/prompt/outputs/1"))
    spec = resolve_request(message, adapted, LIMITS).spec
    assert spec.named_outputs == names | {"image_prompt.image": "generations/prompt/outputs/1"}
    kept = spec.with_images({"init_image": "aa", "mask": "bb", "image_prompt.image": "cc"})
    assert (kept.init_image, kept.mask, kept.image_prompt, kept.named_outputs) == ("aa", "bb", "cc", {})
