"""The official OpenAI package for Python works unchanged against HTTP."""

from __future__ import annotations

import base64

import httpx2
import openai
import pytest
from openai import AsyncOpenAI

from tests.conftest import eventually
from tests.integration.test_cache import kept
from tests.integration.test_edits import CLEAR
from tests.integration.test_images import PHOTO
from tests.support.http import http_server, simulate_adapters

PNG, WEBP = b"\x89PNG", b"RIFF"


@pytest.fixture
async def server():
    async with http_server() as running:
        yield running


@pytest.fixture
async def client(server):
    without_proxy = httpx2.AsyncClient(trust_env=False)
    url = f"http://{server.http_address}/v1"
    async with AsyncOpenAI(base_url=url, api_key="none", http_client=without_proxy, max_retries=0) as client:
        yield client


async def test_pictures(client):
    answer = await client.images.generate(
        prompt="a red potion",
        model="simulated",
        n=2,
        size="128x128",
        quality="auto",
        background="auto",
        output_format="webp",
        output_compression=80,
        response_format="b64_json",
        user="ann",
        extra_body={"seed": 7, "num_inference_steps": 4, "negative_prompt": "rust", "guidance_scale": 1.5},
    )
    assert len(answer.data) == 2
    assert all(base64.b64decode(picture.b64_json).startswith(WEBP) for picture in answer.data)
    assert (answer.output_format, answer.background, answer.size) == ("webp", "opaque", "128x128")
    assert answer.created > 1_700_000_000
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert answer.safelight["seeds"] == [7, 8]


async def test_a_stream(client):
    stream = await client.images.generate(
        prompt="a red potion", model="simulated", stream=True, partial_images=2, extra_body={"num_inference_steps": 200}
    )
    events = [event async for event in stream]
    *partial, completed = events
    assert [event.type for event in partial] == ["image_generation.partial_image"] * len(partial)
    assert [event.partial_image_index for event in partial] == list(range(len(partial)))
    assert partial
    assert completed.type == "image_generation.completed"
    assert completed.usage.input_tokens_details.text_tokens == completed.usage.input_tokens
    for event in events:
        assert base64.b64decode(event.b64_json).startswith(PNG)
        assert (event.output_format, event.quality, event.background) == ("png", "auto", "opaque")
        assert event.created_at > 1_700_000_000


async def test_an_edit(client):
    answer = await client.images.edit(
        image=("photo.png", PHOTO),
        mask=CLEAR,
        prompt="a red potion",
        model="simulated",
        n=2,
        size="128x128",
        output_format="webp",
        output_compression=80,
        response_format="b64_json",
        user="ann",
        extra_body={"strength": 0.6, "seed": 7, "num_inference_steps": 10, "negative_prompt": "rust"},
    )
    assert all(base64.b64decode(picture.b64_json).startswith(WEBP) for picture in answer.data)
    assert (len(answer.data), answer.output_format, answer.safelight["seeds"]) == (2, "webp", [7, 8])
    assert answer.safelight["strength"] == 0.6
    assert answer.usage.input_tokens_details.image_tokens == 16 * 16


@pytest.fixture
def adapted(tmp_path, monkeypatch):
    """The server's model takes adapters; comes before the server."""
    simulate_adapters(monkeypatch, tmp_path, "pixel", "ink")


async def test_adapters(adapted, client, server):
    async def drawn(**adapters):
        await kept(server)
        more = {"adapters": adapters, "num_inference_steps": 4, "seed": 7}
        return (await client.images.generate(prompt="a red potion", extra_body=more)).safelight

    answer = await drawn(pixel=0.8, ink=1)
    assert (answer["adapters"], answer["cache"]) == ({"ink": 1.0, "pixel": 0.8}, ["MISS"])
    assert (await drawn(pixel=0.8))["cache"] == ["MISS"], "another picture"
    assert (await drawn(ink=1, pixel=0.8))["cache"] == ["EXACT"]
    edited = await client.images.edit(
        image=PHOTO, prompt="a red potion", extra_body={"adapters": {"pixel": 0.8}, "num_inference_steps": 10}
    )
    assert edited.safelight["adapters"] == {"pixel": 0.8}
    for refused in (
        drawn(unheard_of=1),
        client.images.edit(image=PHOTO, prompt="x", extra_body={"adapters": {"a": 1}}),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            await refused
        assert caught.value.param == "adapters"
        assert "it has ink, pixel" in caught.value.message


async def test_a_stream_of_an_edit(client):
    stream = await client.images.edit(
        image=PHOTO, prompt="x", stream=True, partial_images=2, n=2, extra_body={"num_inference_steps": 200}
    )
    events = [event async for event in stream]
    kinds = [event.type for event in events]
    assert set(kinds) == {"image_edit.partial_image", "image_edit.completed"}
    assert kinds.count("image_edit.completed") == 2
    assert all(base64.b64decode(event.b64_json).startswith(PNG) for event in events)
    assert sorted(event.image_index for event in events if event.type == "image_edit.completed") == [0, 1]


async def test_several_pictures_to_edit_are_refused_by_name(client):
    with pytest.raises(openai.BadRequestError) as refused:
        await client.images.edit(image=[PHOTO, CLEAR], prompt="x")
    assert refused.value.param == "image"
    assert "occurs 2 times" in refused.value.message


async def test_a_key_of_the_package_attaches(client):
    headers = {"Idempotency-Key": "one"}
    one, other = [await client.images.generate(prompt="x", extra_headers=headers) for _ in range(2)]
    assert one.safelight["generation"] == other.safelight["generation"]
    with pytest.raises(openai.ConflictError):
        await client.images.generate(prompt="y", extra_headers=headers)


async def test_errors_are_those_of_the_package(client):
    with pytest.raises(openai.BadRequestError) as refused:
        await client.images.generate(prompt="x", style="vivid")
    assert (refused.value.param, refused.value.code, refused.value.type) == (
        "style",
        "INVALID_REQUEST",
        "invalid_request_error",
    )
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.images.generate(prompt="x", model="gpt-image-1", stream=True)
    assert unknown.value.code == "MODEL_NOT_FOUND"


async def test_a_stream_that_fails_raises(client, server):
    stream = await client.images.generate(prompt="x", stream=True, extra_body={"num_inference_steps": 1000})
    [generation] = server.generations._live.values()
    generation.expire()
    with pytest.raises(openai.APIError) as failed:
        [_ async for _ in stream]
    assert failed.value.code == "DEADLINE_EXCEEDED"


async def test_a_stream_that_is_closed_cancels(client, server):
    stream = await client.images.generate(
        prompt="x", stream=True, partial_images=3, extra_body={"num_inference_steps": 1000}
    )
    await anext(aiter(stream))
    await stream.close()
    await eventually(lambda: not server.inspect().live)


async def test_models(client):
    assert [model.id async for model in client.models.list()] == ["simulated"]
    model = await client.models.retrieve("simulated")
    assert (model.object, model.owned_by) == ("model", "safelight")
