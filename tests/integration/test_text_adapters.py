"""Adapters that change the text encoder, from the request to the rows of both networks, with small ones on ONNX Runtime."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from safelight import Client
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import models_pb2, models_pb2_grpc
from safelight_server.api.identity import new_key
from safelight_server.cli.main import main
from safelight_server.domain.component import Component
from safelight_server.domain.errors import UnavailableError

from load_tests.ports import free_port
from tests.conftest import eventually
from tests.integration.test_generate import assert_batched_as_alone, collect, pixels, reason_of
from tests.integration.test_images import development
from tests.support.adapters import matrices, text_matrices, write_adapter
from tests.support.conditions import NAME, models_with_conditions, serving_conditions
from tests.support.http import client

pytestmark = pytest.mark.asyncio(loop_scope="module")
DISPOSITIONS = pb.CacheResult
KINDS = {"style": (1, 0), "word": (0, 2), "other": (0, 3), "both": (4, 4)}
"""The seeds of an adapter's matrices for the denoiser and for the text encoder; 0: it does not change that."""


def write_kind(folder: Path, name: str, of_denoiser: int, of_text: int) -> None:
    given = matrices(2, of_denoiser) if of_denoiser else {}
    write_adapter(folder, name, arrays=given | (text_matrices(2, of_text) if of_text else {}))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = models_with_conditions(tmp_path_factory.mktemp("text_adapters"))
    for name, seeds in KINDS.items():
        write_kind(folder / "adapters", name, *seeds)
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(models):
    async with serving_conditions(models) as served:
        yield served


@pytest.fixture
def encoded(server, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call of the text encoder."""
    running, seen = server[0], []
    run = running.runtime.run

    async def counted(instance: int, model: str, component: Component, inputs: Mapping[str, Any]) -> Any:
        if component is Component.TEXT_ENCODER:
            seen.append(len(inputs["input_ids"]))
        return await run(instance, model, component, inputs)

    monkeypatch.setattr(running.runtime, "run", counted)
    return seen


def adapted(seed: int, prompt: str = "a red potion", cached: bool = False, **scales: float) -> pb.GenerateRequest:
    message = development(seed, prompt=prompt)
    message.spec.adapters.extend(pb.Adapter(name=name, scale=scale) for name, scale in scales.items())
    if cached:
        message.cache.mode = pb.CachePolicy.MODE_DEFAULT
    return message


async def idle(running) -> None:
    await eventually(lambda: not (running.inspect().live or running.inspect().keeping))


async def test_a_mixed_batch_has_the_bits_of_each_alone(server):
    running, _, stub = server
    kinds = [{}, {"style": 1.0}, {"word": 1.0}, {"word": 0.5}, {"other": 1.0}, {"both": 1.0}, {"word": 1, "other": 1}]
    messages = [adapted(1, **kind) for kind in kinds]
    messages[5].spec.guidance_scale = 1.0
    await assert_batched_as_alone(running, stub, messages)


async def test_a_prompt_is_encoded_again_only_for_what_changes_the_text_encoder(server, encoded):
    running, _, stub = server
    prompt = "a wooden bow and a blue gem"

    async def rows(**scales: float) -> int:
        del encoded[:]
        await collect(stub.Generate(adapted(2, prompt, cached=True, **scales)))
        await idle(running)
        return sum(encoded)

    await collect(stub.Generate(adapted(2, "a brass key", cached=True)))  # encodes what all prompts need once
    await idle(running)
    assert await rows() == 1
    assert await rows(style=1.0) == 0, "the denoiser alone is another"
    assert await rows(word=1.0) == 2
    assert await rows(word=1.0, style=0.5) == 0
    assert await rows(word=0.5) == 2
    assert await rows(both=1.0) == 2
    assert await rows(word=0.5, both=1.0) == 2


async def test_a_similar_picture_has_the_same_adapters(server, encoded):
    """Prompts are compared without them: only pictures with equal adapters are candidates at all."""
    running, _, stub = server
    one, other = "a green shield with a star, icon", "green shield with star, icon"
    await collect(stub.Generate(adapted(9, one, cached=True, word=0.8)))
    await idle(running)
    found = []
    for scales in ({}, {"word": 0.7}, {"other": 0.8}, {"word": 0.8, "other": 0.8}, {"both": 0.8}, {"word": 0.8}):
        message = adapted(10, one if "word" not in scales else other, **scales)
        message.cache.CopyFrom(pb.CachePolicy(mode=pb.CachePolicy.MODE_ALLOW_SIMILAR, min_similarity=0.2))
        events = await collect(stub.Generate(message))
        found.append(events[-1].finished.cache_results[0].disposition)
        await idle(running)
    assert found == [DISPOSITIONS.DISPOSITION_MISS] * 5 + [DISPOSITIONS.DISPOSITION_SIMILAR]


async def test_an_approximate_lookup_does_not_lend_its_embedding(server):
    """It compares the prompt without adapters; the picture is drawn of the prompt with them."""
    _, _, stub = server
    alone = await collect(stub.Generate(adapted(11, "an orange ring", word=1.0)))
    message = adapted(11, "an orange ring", word=1.0)
    message.cache.CopyFrom(pb.CachePolicy(mode=pb.CachePolicy.MODE_ALLOW_LATENT))
    assert np.array_equal(pixels(await collect(stub.Generate(message))), pixels(alone))


@pytest.mark.parametrize("error", [UnavailableError("broken"), TimeoutError()], ids=["broken", "slow"])
async def test_a_picture_is_kept_although_its_prompt_alone_cannot_be_encoded(server, monkeypatch, error):
    running, _, stub = server

    async def fails(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(running.cache._prompts, "_encode", fails)
    dispositions = []
    for _ in range(2):
        events = await collect(stub.Generate(adapted(12, f"a silver coin, {error!r}", cached=True, word=0.3)))
        dispositions.append(events[-1].finished.cache_results[0].disposition)
        await idle(running)
    assert dispositions == [DISPOSITIONS.DISPOSITION_MISS, DISPOSITIONS.DISPOSITION_EXACT]


async def test_an_adapter_that_is_replaced_has_other_embeddings(models, tmp_path):
    folder = tmp_path / "adapters"
    write_kind(folder, "word", *KINDS["word"])
    async with serving_conditions(models, adapters_dir=folder) as (running, _, stub):

        async def drawn(seed: int) -> np.ndarray:
            return pixels(await collect(stub.Generate(adapted(seed, cached=True, word=1.0))))

        def offered() -> set[str]:
            return {file.sha256 for file in running.catalog.adapters.of(NAME).values()}

        known, first = offered(), await drawn(3)
        await idle(running)
        write_kind(folder, "word", *KINDS["other"])
        await eventually(lambda: offered() not in (known, set()))
        second = await drawn(3)
        await idle(running)
        write_kind(folder, "word", *KINDS["word"])
        await eventually(lambda: offered() == known)
        assert np.array_equal(await drawn(3), first)
        assert not np.array_equal(first, second)


async def test_the_list_of_models_says_what_an_adapter_changes(server, monkeypatch, capsys):
    running = server[0]
    async with Client(running.address) as client:
        [model] = await client.models()
    found = {adapter.name: list(adapter.components) for adapter in model.adapters}
    both, text = ["denoiser", "text_encoder"], ["text_encoder"]
    assert found == {"both": both, "other": text, "style": ["denoiser"], "word": text}
    monkeypatch.setattr("sys.argv", ["safelight", "models", "--target", running.address])
    with pytest.raises(SystemExit) as ended:
        await asyncio.to_thread(main)
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "adapters both (rank 2, text too), other (rank 2, text alone), style (rank 2), word" in said


async def test_adapters_of_a_tenant_are_not_there_for_others(models, tmp_path):
    """Over gRPC and HTTP; an adapter of the same name that is for all is another one."""
    folder = tmp_path / "adapters"
    write_kind(folder, "style", 1, 0)
    write_kind(folder / "@studio", "style", 5, 0)
    write_kind(folder / "@studio", "secret", 0, 2)
    (ann, ann_entry), (bob, bob_entry) = new_key("ann", "studio"), new_key("bob", "other")
    keys = tmp_path / "keys.json"
    keys.write_text(f'{{"keys": [{ann_entry}, {bob_entry}]}}')
    settings = {"api_key_file": keys, "adapters_dir": folder, "http_port": free_port()}
    async with serving_conditions(models, **settings) as (running, channel, stub), client(running) as http:
        mine, theirs = ((("authorization", f"Bearer {key}"),) for key in (ann, bob))
        served = models_pb2_grpc.ModelServiceStub(channel)
        seen = {}
        for who, metadata in (("ann", mine), ("bob", theirs)):
            [model] = (await served.ListModels(models_pb2.ListModelsRequest(), metadata=metadata)).models
            got = await served.GetModel(models_pb2.GetModelRequest(name=model.name), metadata=metadata)
            assert got.model == model
            seen[who] = {adapter.name: adapter.sha256 for adapter in model.adapters}
        assert list(seen["ann"]) == ["secret", "style"]
        assert list(seen["bob"]) == ["style"]
        assert seen["ann"]["style"] != seen["bob"]["style"]
        await collect(stub.Generate(adapted(1, secret=1.0), metadata=mine))
        for name in ("secret", "unheard-of"):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await collect(stub.Generate(adapted(1, **{name: 1.0}), metadata=theirs))
            assert refused.value.code() is grpc.StatusCode.NOT_FOUND
            assert reason_of(refused.value) == "ADAPTER_NOT_FOUND"
            assert refused.value.details() == f"{model.name} has no adapter '{name}'; it has style"
            body = {"prompt": "red", "adapters": {name: 1}}
            answer = await http.post("/v1/images/generations", json=body, headers={"authorization": f"Bearer {bob}"})
            assert answer.status_code == 404
            assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == (
                "ADAPTER_NOT_FOUND",
                "adapters",
            )
        of_all = await collect(stub.Generate(adapted(1, cached=True, style=1.0), metadata=theirs))
        of_one = await collect(stub.Generate(adapted(1, cached=True, style=1.0), metadata=mine))
        assert not np.array_equal(pixels(of_one), pixels(of_all))
