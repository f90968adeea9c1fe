"""Fingerprints contain everything that decides a bit of the picture, and keys differ by tenant."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safelight.v1 import generation_pb2 as pb
from safelight_server.cache import fingerprint
from safelight_server.cache.fingerprint import (
    IndexKind,
    SharingScope,
    comparable,
    derived_seed,
    embedding,
    image_prompt,
    index_key,
    tenant_key,
)
from safelight_server.catalog.catalog import Catalog
from safelight_server.domain.request import AdapterUse, ControlUse, Spec
from safelight_server.sampler import SamplerSpec
from safelight_server.validation import RequestLimits, resolve_request

from tests.support.pipelines import adapted_catalog

LIMITS = RequestLimits(max_prompt_chars=100, max_request_rows=131_072, resume_grace_s=30.0, max_resume_grace_s=600.0)
OPERATOR = b"an operator's key of 32 bytes ..."
SPEC = Spec(
    model="small",
    revision="r1",
    prompt="red potion",
    negative_prompt="blue",
    token_ids=(1, 4, 6, 2),
    negative_token_ids=(1, 5, 2, 0),
    width_px=64,
    height_px=96,
    num_inference_steps=20,
    guidance_scale=3.0,
    sampler=SamplerSpec("ddim", "trailing", "default", 0.25),
    seeds=(7,),
)


def exact(digest: str, numerics: str, spec: Spec, seed: int) -> bytes:
    """The fingerprint of an output."""
    return fingerprint.exact(comparable(digest, numerics, spec), spec.token_ids, seed)


def compatible(digest: str, numerics: str, spec: Spec) -> bytes:
    """The fingerprint of what comparable outputs have in common."""
    return fingerprint.compatible(comparable(digest, numerics, spec))


OTHERS = {
    "token_ids": (1, 5, 6, 2),
    "negative_token_ids": None,
    "width_px": 96,
    "height_px": 64,
    "num_inference_steps": 21,
    "guidance_scale": 3.0000000000000004,
    "sampler": SamplerSpec("euler", "trailing", "default", 0.25),
    "init_image": "ab" * 32,
    "strength": 0.5,
    "mask": "cd" * 32,
    "guidance_rescale": 0.7,
    "guidance_interval": (0.2, 0.8),
    "adapters": (AdapterUse("pixel", 0.8, "ab" * 32),),
    "controls": (ControlUse("edges", "ab" * 32, 0.8, 0.25, 0.75),),
    "image_prompt": "ef" * 32,
    "image_prompt_scale": 0.5,
}
"""Another value for each field that decides pixels."""
SILENT = {"model", "revision", "prompt", "negative_prompt"}
"""Fields that the pipeline digest and the token ids represent."""


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return adapted_catalog(tmp_path_factory.mktemp("small"), "pixel")


def spec_of(catalog: Catalog, message: pb.GenerationSpec) -> Spec:
    return resolve_request(pb.GenerateRequest(spec=message), catalog, LIMITS).spec


def test_every_field_of_a_spec_is_in_the_fingerprint_or_known_to_be_silent():
    assert {field.name for field in fields(Spec)} == set(OTHERS) | SILENT | {"seeds"}
    whole = exact("digest", "numerics", SPEC, 7)
    for name, value in OTHERS.items():
        assert exact("digest", "numerics", replace(SPEC, **{name: value}), 7) != whole, name
    for name in SILENT:
        assert exact("digest", "numerics", replace(SPEC, **{name: "else"}), 7) == whole, name
    for name in ("name", "spacing", "sigma_schedule", "eta"):
        sampler = replace(SPEC.sampler, **{name: 0.5 if name == "eta" else "else"})
        assert exact("digest", "numerics", replace(SPEC, sampler=sampler), 7) != whole, name
    [adapter] = OTHERS["adapters"]
    adapted = exact("digest", "numerics", replace(SPEC, adapters=(adapter,)), 7)
    for name, value in {"scale": 0.7, "sha256": "cd" * 32}.items():
        other = replace(SPEC, adapters=(replace(adapter, **{name: value}),))
        assert exact("digest", "numerics", other, 7) != adapted, name
    [control] = OTHERS["controls"]
    controlled = replace(SPEC, controls=(control,))
    for name, value in {"name": "depth", "image": "cd" * 32, "scale": 0.7, "start": 0.2, "end": 0.8}.items():
        other = replace(SPEC, controls=(replace(control, **{name: value}),))
        assert exact("digest", "numerics", other, 7) != exact("digest", "numerics", controlled, 7), name
        assert compatible("digest", "numerics", other) != compatible("digest", "numerics", controlled), name
    assert exact("other", "numerics", SPEC, 7) != whole
    assert exact("digest", "other", SPEC, 7) != whole
    assert exact("digest", "numerics", SPEC, 8) != whole


IMAGE = f"images/{'ab' * 32}"
FIELDS = {
    "prompt": pb.GenerationSpec(prompt="blue potion"),
    "prompts": pb.GenerationSpec(prompts=[pb.Prompt(role=pb.Prompt.ROLE_NEGATIVE, text="blue")]),
    "height_px": pb.GenerationSpec(height_px=96),
    "num_inference_steps": pb.GenerationSpec(num_inference_steps=7),
    "guidance_scale": pb.GenerationSpec(guidance_scale=7),
    "sampler": pb.GenerationSpec(sampler=pb.SamplerSpec(name="euler")),
    "outputs": pb.GenerationSpec(outputs=[pb.OutputSpec(seed=8)]),
    "init_image": pb.GenerationSpec(init_image=IMAGE.replace("ab", "ef")),
    "strength": pb.GenerationSpec(strength=0.5),
    "mask": pb.GenerationSpec(mask=IMAGE),
    "guidance_rescale": pb.GenerationSpec(guidance_rescale=0.7),
    "guidance_interval": pb.GenerationSpec(guidance_interval=pb.GuidanceInterval(start=0.2, end=0.8)),
    "adapters": pb.GenerationSpec(adapters=[pb.Adapter(name="pixel")]),
    "controls": pb.GenerationSpec(controls=[pb.Control(name="edges", image=IMAGE)]),
    "image_prompt": pb.GenerationSpec(image_prompt=pb.ImagePrompt(image=IMAGE)),
}
"""A change of each field of the contract; the model is in the pipeline's digest, and the width goes with the height."""


def test_every_field_of_the_contract_changes_the_fingerprint(catalog):
    assert set(FIELDS) | {"model", "width_px"} == {field.name for field in pb.GenerationSpec.DESCRIPTOR.fields}
    base = pb.GenerationSpec(prompt="red potion", outputs=[pb.OutputSpec(seed=3)], init_image=IMAGE)
    names = set()
    for change in (pb.GenerationSpec(), *FIELDS.values()):
        message = pb.GenerationSpec()
        message.CopyFrom(base)
        if change.outputs:
            message.ClearField("outputs")
        message.MergeFrom(change)
        spec = spec_of(catalog, message)
        names.add(exact("d", "n", spec, spec.seeds[0]))
    assert len(names) == len(FIELDS) + 1


def test_outputs_of_one_request_differ_by_their_seed_alone():
    two = replace(SPEC, seeds=(7, 8))
    assert exact("digest", "numerics", two, 7) == exact("digest", "numerics", SPEC, 7)
    assert exact("digest", "numerics", two, 8) != exact("digest", "numerics", two, 7)


def test_prompts_are_compared_only_where_all_else_is_equal():
    whole = compatible("digest", "numerics", SPEC)
    for name, value in OTHERS.items():
        same = compatible("digest", "numerics", replace(SPEC, **{name: value})) == whole
        assert same == (name == "token_ids"), name
    assert compatible("other", "numerics", SPEC) != whole
    assert compatible("digest", "other", SPEC) != whole
    assert compatible("digest", "numerics", replace(SPEC, seeds=(9, 9))) == whole


DEFAULTS = {
    "model": "models/small",
    "width_px": 64,
    "height_px": 64,
    "num_inference_steps": 20,
    "guidance_scale": 3.0,
    "guidance_rescale": 0.0,
    "guidance_interval": pb.GuidanceInterval(start=0, end=1),
    "sampler": pb.SamplerSpec(
        name="ddim",
        spacing=pb.TIMESTEP_SPACING_TRAILING,
        sigma_schedule=pb.SIGMA_SCHEDULE_DEFAULT,
        eta=0.0,
    ),
}


@given(spelled=st.permutations(sorted(DEFAULTS)), count=st.integers(0, len(DEFAULTS)), long=st.booleans())
@settings(max_examples=40, deadline=None)
def test_defaults_may_be_spelled_out_in_any_order_or_not(catalog, spelled, count, long):
    bare = spec_of(catalog, pb.GenerationSpec(prompt="red potion", outputs=[pb.OutputSpec(seed=3)]))
    text = (
        {"prompts": [pb.Prompt(role=pb.Prompt.ROLE_POSITIVE, text="red potion")]} if long else {"prompt": "red potion"}
    )
    given_ = {name: DEFAULTS[name] for name in spelled[:count]} | text | {"outputs": [pb.OutputSpec(seed=3)]}
    assert exact("d", "n", spec_of(catalog, pb.GenerationSpec(**given_)), 3) == exact("d", "n", bare, 3)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_field_order_on_the_wire_does_not_matter(catalog, data):
    parts = [
        pb.GenerationSpec(prompt="red potion"),
        pb.GenerationSpec(num_inference_steps=data.draw(st.integers(1, 50))),
        pb.GenerationSpec(guidance_scale=data.draw(st.floats(1, 20))),
        pb.GenerationSpec(outputs=[pb.OutputSpec(seed=data.draw(st.integers(0, 2**64 - 1)))]),
    ]
    orders = data.draw(st.permutations(parts)), data.draw(st.permutations(parts))
    first, second = (
        spec_of(catalog, pb.GenerationSpec.FromString(b"".join(part.SerializeToString() for part in order)))
        for order in orders
    )
    assert exact("d", "n", first, first.seeds[0]) == exact("d", "n", second, second.seeds[0])


def test_numbers_have_one_form():
    half = replace(SPEC.sampler, eta=0.0)
    assert exact("d", "n", replace(SPEC, sampler=half), 1) == exact(
        "d", "n", replace(SPEC, sampler=replace(half, eta=-0.0)), 1
    )
    assert exact("d", "n", replace(SPEC, guidance_scale=3), 1) == exact("d", "n", SPEC, 1)
    with pytest.raises(ValueError):
        exact("d", "n", replace(SPEC, guidance_scale=float("nan")), 1)


def test_the_encoding_is_canonical_json_and_does_not_change_unseen():
    assert exact("d", "n", SPEC, 2**64 - 1) == (
        b'{"numerics":"n","pipeline":"d","seed":18446744073709551615,"spec":{"adapters":[],"controls":[],'
        b'"guidance_interval":[0,1],"guidance_rescale":0,"guidance_scale":3,"height_px":96,'
        b'"image_prompt":"","image_prompt_scale":0,"init_image":"","mask":"","negative_token_ids":[1,5,2,0],"num_inference_steps":20,'
        b'"sampler":["ddim","trailing","default",0.25],"strength":1,"width_px":64},"tokens":[1,4,6,2],"version":3}'
    )
    assert json.loads(embedding("e", "n", (1, 2))) == {"encoder": "e", "numerics": "n", "tokens": [1, 2], "version": 3}
    assert json.loads(image_prompt("e", "n", "ab")) == {"encoder": "e", "numerics": "n", "image": "ab", "version": 3}


@given(a=st.text(), b=st.text(), content=st.binary(max_size=50))
def test_keys_differ_by_tenant_pool_kind_and_content(a, b, content):
    one, other = tenant_key(OPERATOR, SharingScope(a)), tenant_key(OPERATOR, SharingScope(b))
    assert (index_key(one, IndexKind.EXACT, content) == index_key(other, IndexKind.EXACT, content)) == (a == b)
    assert one != tenant_key(OPERATOR, SharingScope(a, pooled=True))
    assert len({index_key(one, kind, content) for kind in IndexKind}) == len(IndexKind)
    assert index_key(one, IndexKind.EXACT, content) != index_key(one, IndexKind.EXACT, content + b"x")
    assert derived_seed(one, "planes") != derived_seed(one, "planes of another")
    assert tenant_key(OPERATOR + b"2", SharingScope(a)) != one


def test_keys_tell_nothing_and_fit_anywhere():
    key = index_key(tenant_key(OPERATOR, SharingScope("acme")), IndexKind.EXACT, exact("d", "n", SPEC, 1))
    assert len(key) == 64
    assert set(key) <= set("0123456789abcdef")
    with pytest.raises(ValueError, match="16 bytes"):
        tenant_key(b"short", SharingScope("acme"))
