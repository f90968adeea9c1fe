"""The HTTP API's conversion of requests and errors, without a server."""

from __future__ import annotations

import json
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safelight.v1 import generation_pb2 as pb
from safelight_server.catalog.catalog import Catalog
from safelight_server.catalog.manifest import INPAINTING_INPUTS, STABLE_DIFFUSION_INPUTS
from safelight_server.domain import errors
from safelight_server.domain.errors import FieldViolation, InvalidRequestError, NotFoundError, SafelightError
from safelight_server.http.errors import STATUS_CODES, error_body, error_response
from safelight_server.http.form import Form
from safelight_server.http.images_request import (
    EditParameters,
    ImageParameters,
    edit_request,
    generate_request,
    in_parameters,
    parse,
    parse_edit,
)
from safelight_server.runtime.simulated import simulated_pipeline
from safelight_server.validation import RequestLimits, resolve_request
from safelight_server.wire.statuses import status_of

from tests.support.pipelines import MANIFEST, adapted_catalog, small_pipeline

CATALOG = Catalog([simulated_pipeline()])
LIMITS = RequestLimits(max_prompt_chars=2000, max_request_rows=131_072, resume_grace_s=30.0, max_resume_grace_s=600.0)


def message(**parameters: object) -> pb.GenerateRequest:
    return generate_request(parse(json.dumps({"prompt": "x"} | parameters).encode()), CATALOG)[0]


def refused(**parameters: object) -> dict[str, str]:
    """The refused parameters, with the message for each."""
    try:
        resolve_request(message(**parameters), CATALOG, LIMITS)
    except SafelightError as error:
        return named(error)
    return {}


def named(error: SafelightError) -> dict[str, str]:
    """The messages for each parameter that a client gets."""
    violations = error_body(in_parameters(status_of(error), pb.GenerateRequest()))["error"]["safelight"]["violations"]
    return {one["param"]: one["message"] for one in violations}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", ""),
        ("prompt", "a\u0000b"),
        ("prompt", "x" * 2001),
        ("prompt", 7),
        ("model", "gpt-image-1"),
        ("model", "models/none"),
        ("n", 0),
        ("n", 65),
        ("n", 10**30),
        ("n", 1.0),
        ("n", True),
        ("size", "64"),
        ("size", "64x64x64"),
        ("size", "999999x1"),
        ("size", "1024x1024"),
        ("quality", "hd"),
        ("quality", "low"),
        ("style", "vivid"),
        ("background", "transparent"),
        ("moderation", "low"),
        ("response_format", "url"),
        ("output_format", "gif"),
        ("output_compression", 101),
        ("output_compression", 50),  # of PNG
        ("partial_images", 4),
        ("partial_images", 1),  # without a stream
        ("stream", "true"),
        ("user", "x" * 256),
        ("seed", -1),
        ("seed", 2**64),
        ("num_inference_steps", 0),
        ("num_inference_steps", 1001),
        ("num_inference_steps", 2**31),
        ("guidance_scale", 0.5),
        ("guidance_scale", 1e300),
        ("guidance_scale", "7"),
        ("guidance_rescale", 1.5),
        ("guidance_interval", 0.5),
        ("guidance_interval", [0.5]),
        ("guidance_interval", [0.8, 0.2]),
        ("guidance_interval", [-1, 0.5]),
        ("guidance_interval", ["0", 1]),
        ("negative_prompt", "a\u0000b"),
        ("adapters", {"pixel": 1}),  # the model takes none
        ("adapters", {"pixel": "1"}),
        ("adapters", {"pixel": None}),
        ("adapters", ["pixel"]),
        ("adapters", "pixel"),
        ("mask", "x"),
        ("foo", None),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(name, value):
    assert list(refused(**{name: value})) == [name]


def test_parameters_that_contradict_each_other_are_named():
    assert list(refused(style="vivid", quality="hd", n=0, foo=1)) == ["n", "quality", "style", "foo"]
    assert len(refused(**{f"unknown_{number}": 1 for number in range(100)})) == 16


@pytest.mark.parametrize(
    "body", [b"", b"null", b"[]", b"{", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b"[" * 9999]
)
def test_what_is_no_json_object_is_refused(body):
    with pytest.raises(InvalidRequestError) as caught:
        parse(body)
    assert [one.field for one in caught.value.violations] == ["body"]


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("n", 65, "must be at most 64"),
        ("guidance_interval", [0], "must be two numbers, [start, end]"),
        ("guidance_interval", [0, 0.5, 1], "must be two numbers, [start, end]"),
        ("user", "u" * 256, "must have at most 255 characters"),
    ],
)
def test_a_fault_says_in_words_what_the_parameter_must_be(name, value, what):
    assert refused(**{name: value})[name] == what


def test_every_parameter_may_be_null_but_the_prompt():
    names = set(ImageParameters.model_fields) - {"prompt"}
    assert refused(**dict.fromkeys(names)) == {}
    assert list(refused(prompt=None)) == ["prompt"]


def test_the_defaults_are_those_of_the_model():
    wanted = message()
    assert wanted.spec.model == "models/simulated"
    assert not wanted.spec.HasField("num_inference_steps")
    assert not wanted.spec.HasField("width_px")
    assert wanted.encoding == pb.PixelEncoding(media_type="image/png")
    assert wanted.preview == pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE)
    assert message(size="auto", quality="auto", background="opaque", moderation="auto").spec.ByteSize()


def test_a_client_that_leaves_cancels_at_once():
    disconnect = resolve_request(message(), CATALOG, LIMITS).disconnect
    assert (disconnect.detach, disconnect.resume_grace_s) == (False, 0.0)


def test_each_parameter_has_its_field():
    wanted = message(
        model="models/simulated",
        n=3,
        size="128x128",
        output_format="webp",
        output_compression=0,
        user="ann",
        seed=2**64 - 2,
        num_inference_steps=7,
        guidance_scale=2.5,
        guidance_rescale=0.5,
        guidance_interval=[0.25, 1],
        negative_prompt="rust",
    )
    spec = wanted.spec
    assert (spec.width_px, spec.height_px, spec.num_inference_steps, spec.guidance_scale) == (128, 128, 7, 2.5)
    assert (spec.guidance_rescale, spec.guidance_interval) == (0.5, pb.GuidanceInterval(start=0.25, end=1))
    assert [output.seed for output in spec.outputs] == [2**64 - 2, 2**64 - 1, 0], "each picture has the next seed"
    assert list(spec.prompts) == [pb.Prompt(role=pb.Prompt.ROLE_NEGATIVE, text="rust")]
    assert wanted.encoding == pb.PixelEncoding(media_type="image/webp", quality=1)
    assert dict(wanted.labels) == {"user": "ann"}


def test_adapters_are_named_with_their_factors(tmp_path):
    catalog = adapted_catalog(tmp_path, "pixel", "ink")
    asked = json.dumps({"prompt": "red", "adapters": {"pixel": 0.8, "ink": 1, "gone": 0}}).encode()
    request = generate_request(parse(asked), catalog)[0]
    assert [(one.name, round(one.scale, 6)) for one in request.spec.adapters] == [
        ("pixel", 0.8),
        ("ink", 1),
        ("gone", 0),
    ]
    assert edit(catalog, **{"adapters[pixel]": "0.8", "adapters[a]b]": "1"}).spec.adapters == [
        pb.Adapter(name="pixel", scale=0.8),
        pb.Adapter(name="a]b", scale=1),
    ]


@pytest.mark.parametrize(
    ("adapters", "what", "kind"),
    [
        ({"unheard of": 1}, "has no adapter 'unheard of'; it has ink, pixel", NotFoundError),
        ({"ink": 1, "pixel": 10.5}, "'pixel' must be from -10 to 10", InvalidRequestError),
        ({"pixel": True}, "the factor of 'pixel' must be a number", InvalidRequestError),
        ({"a": 0, "b": 0, "c": 0, "d": 0, "e": 0}, "has 5 entries; at most 4", InvalidRequestError),
    ],
)
def test_a_fault_of_an_adapter_says_which(tmp_path, adapters, what, kind):
    catalog = adapted_catalog(tmp_path, "pixel", "ink")
    request = pb.GenerateRequest()
    with pytest.raises(kind) as caught:
        request = generate_request(parse(json.dumps({"prompt": "red", "adapters": adapters}).encode()), catalog)[0]
        resolve_request(request, catalog, LIMITS)
    [fault] = error_body(in_parameters(status_of(caught.value), request))["error"]["safelight"]["violations"]
    assert fault["param"] == "adapters"
    assert what in fault["message"]


def test_random_seeds_are_exact_in_javascript_and_differ():
    seeds = [output.seed for output in message(n=20).spec.outputs]
    assert len(set(seeds)) == 20
    assert max(seeds) < 2**53


@pytest.mark.parametrize(("partial", "every"), [(1, 20), (2, 10), (3, 7)])
def test_partial_images_are_spread_over_the_steps_in_the_encoding_of_the_picture(partial, every):
    preview = message(stream=True, partial_images=partial, output_format="jpeg").preview
    assert preview.every_n_steps == every
    assert list(preview.accept) == [pb.PixelEncoding(media_type="image/jpeg")]
    assert message(stream=True, partial_images=3, num_inference_steps=1).preview.every_n_steps == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
PARAMETERS = st.dictionaries(st.sampled_from([*ImageParameters.model_fields, "style", "x"]), JSON, max_size=6)


@given(PARAMETERS | st.binary(max_size=40))
def test_whatever_is_sent_is_taken_or_refused_with_names(sent):
    body = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
    try:
        resolve_request(generate_request(parse(body), CATALOG)[0], CATALOG, LIMITS)
    except (InvalidRequestError, NotFoundError) as error:
        assert set(named(error)) <= {*ImageParameters.model_fields, "style", "x", "body"}


def test_a_key_decides_what_the_server_chooses():
    """Therefore the same request becomes the same message when it is sent again."""

    def keyed(key: str, **parameters: object) -> pb.GenerateRequest:
        return generate_request(parse(json.dumps({"prompt": "x", "n": 3} | parameters).encode()), CATALOG, key)[0]

    assert keyed("a") == keyed("a")
    assert keyed("a").request_id != keyed("b").request_id
    assert uuid.UUID(keyed("a").request_id).version == 5
    seeds = [output.seed for output in keyed("a").spec.outputs]
    assert len(set(seeds)) == 3
    assert max(seeds) < 2**53
    assert seeds != [output.seed for output in keyed("b").spec.outputs]
    assert [output.seed for output in keyed("a", seed=7).spec.outputs] == [7, 8, 9]
    assert resolve_request(keyed("a"), CATALOG, LIMITS).disconnect.resume_grace_s == 30.0


def edit(catalog: Catalog = CATALOG, **texts: str) -> pb.GenerateRequest:
    form = Form({name: [text] for name, text in ({"prompt": "x"} | texts).items()}, {"image": [b"picture"]})
    return edit_request(parse_edit(form).parameters, catalog)[0]


def test_partial_images_of_an_edit_are_spread_over_the_steps_that_the_models_strength_leaves(tmp_path):
    inpaints = Catalog([small_pipeline(tmp_path, inputs=STABLE_DIFFUSION_INPUTS | INPAINTING_INPUTS)])
    asked = {"stream": "true", "partial_images": "2", "num_inference_steps": "20"}
    assert edit(**asked).preview.every_n_steps == 8
    assert edit(inpaints, **asked).preview.every_n_steps == 10
    assert edit(inpaints, **asked, strength="0.6").preview.every_n_steps == 6


def test_each_text_of_an_edit_has_its_field():
    wanted = edit(
        strength="0.5",
        n="2",
        stream="true",
        guidance_scale="2.5",
        size="128x128",
        output_compression="50",
        output_format="webp",
    )
    assert (wanted.spec.strength, wanted.spec.guidance_scale, len(wanted.spec.outputs)) == (0.5, 2.5, 2)
    assert wanted.encoding == pb.PixelEncoding(media_type="image/webp", quality=50)
    assert not edit().spec.HasField("strength")


@pytest.mark.parametrize(("strength", "every"), [("1", 10), ("0.5", 5), ("0.1", 1)])
def test_partial_images_of_an_edit_are_spread_over_the_steps_that_are_made(strength, every):
    wanted = edit(strength=strength, stream="true", partial_images="2", num_inference_steps="20")
    assert wanted.preview.every_n_steps == every


def test_a_model_that_starts_from_no_picture_is_refused_with_those_that_do(tmp_path):
    without = {name: entry for name, entry in MANIFEST["components"].items() if name != "encoder"}
    text_alone = small_pipeline(tmp_path, components=without)
    for catalog, told in [
        (Catalog([text_alone, simulated_pipeline()]), "simulated can"),
        (Catalog([text_alone]), "no model"),
    ]:
        with pytest.raises(InvalidRequestError, match=told) as caught:
            edit(catalog, model="small")
        assert [one.field for one in caught.value.violations] == ["model"]


@given(
    st.dictionaries(
        st.sampled_from([*EditParameters.model_fields, "image", "x"]), st.lists(st.text(), min_size=1, max_size=2)
    )
)
def test_whatever_a_form_has_is_taken_or_refused_with_names(texts):
    try:
        edit_request(parse_edit(Form(texts, {"image": [b"picture"]})).parameters, CATALOG)
    except (InvalidRequestError, NotFoundError) as error:
        assert set(named(error)) <= {*EditParameters.model_fields, "image", "x"}


def every_error() -> list[SafelightError]:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SafelightError)]
    special = {InvalidRequestError: InvalidRequestError([FieldViolation("n", "x")]), errors.InternalError: None}
    return [special.get(kind) or (errors.InternalError() if kind in special else kind("x")) for kind in kinds]


def test_every_error_has_a_status_code_and_keeps_its_reason():
    for error in every_error():
        assert error_response(status_of(error)).status_code == STATUS_CODES[error.status]
        told = error_body(status_of(error))["error"]
        assert told["code"] == error.reason
        assert told["type"].endswith("_error")


def test_a_retry_is_said_to_be_worth_it_where_it_is():
    full = status_of(errors.QueueFullError("full", retry_after_s=1.2, metadata={"bound": "streams"}))
    response = error_response(full)
    assert (response.status_code, response.headers["retry-after"], response.headers["x-should-retry"]) == (
        429,
        "2",
        "true",
    )
    assert error_body(full)["error"]["safelight"] == {"metadata": {"bound": "streams"}}
    for error, worth in [
        (errors.QueueFullError("never fits"), "false"),
        (errors.DeadlineExceededError("late"), "false"),
        (errors.InternalError(), "false"),
        (errors.UnavailableError("soon"), "true"),
    ]:
        headers = error_response(status_of(error)).headers
        assert headers["x-should-retry"] == worth
        assert "retry-after" not in headers


def test_the_first_faulty_parameter_is_named_and_the_others_too():
    error = InvalidRequestError([FieldViolation("n", "too many"), FieldViolation("size", "odd")])
    told = error_body(status_of(error))["error"]
    assert (told["param"], told["type"]) == ("n", "invalid_request_error")
    assert [one["param"] for one in told["safelight"]["violations"]] == ["n", "size"]
