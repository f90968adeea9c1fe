"""Triton's queue as configured by `safelight repository --bounded-queue`: bounded, with time limits, in order.

docs/operations/triton.md quotes the messages of the refusals: by these the gateway
distinguishes them from a dead server.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import tritonclient.grpc.aio as triton_grpc
from safelight_server.catalog import catalog
from safelight_server.catalog.export import QUEUE_SIZE, Target, write
from safelight_server.domain.component import Component
from safelight_server.runtime import verification
from safelight_server.runtime.triton.client import CallFailed, Trouble
from safelight_server.runtime.triton.models import models_of
from safelight_server.runtime.triton.server import Server, SharedMemoryUse
from tritonclient.utils import InferenceServerException

from tests.conftest import MODELS, eventually
from tests.triton.support import REPOSITORY, TritonServer, triton_server
from tests.triton.test_backend import example, inputs

MODEL = "icons_denoiser"
KEY = ("icons", Component.DENOISER)
LARGE, SMALL = (inputs(example(MODEL, rows)) for rows in (64, 1))
"""LARGE fills a batch by itself and computes for a good part of a second."""


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """Runs a server on a repository with bounded queues."""
    folder = tmp_path_factory.mktemp("bounded") / "repository"
    write(REPOSITORY, folder, Target.CPU, bounded_queue=True)
    with triton_server("--repository", folder) as server:
        yield server


@pytest.fixture
async def client(bounded: TritonServer) -> AsyncIterator[triton_grpc.InferenceServerClient]:
    async with triton_grpc.InferenceServerClient(bounded.grpc_url) as opened:
        yield opened


def ask(client: triton_grpc.InferenceServerClient, tensors: list[Any], **how: int) -> asyncio.Task[object]:
    return asyncio.ensure_future(client.infer(MODEL, tensors, **how))


async def num_failed(client: triton_grpc.InferenceServerClient) -> int:
    """Number of requests of the model that the server has refused or failed."""
    statistics = (await client.get_inference_statistics(MODEL)).model_stats[0]
    return int(statistics.inference_stats.fail.count)


async def busy(client: triton_grpc.InferenceServerClient, calls: int) -> list[asyncio.Task[object]]:
    """Starts `calls` large calls; returns when one is done, one is running and the rest is queued."""
    running = [ask(client, LARGE) for _ in range(calls)]
    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    return running


async def test_what_the_queue_does_not_take_is_refused(client: triton_grpc.InferenceServerClient) -> None:
    calls = await busy(client, 8)
    calls += [ask(client, SMALL) for _ in range(QUEUE_SIZE + 8)]
    ended = await asyncio.gather(*calls, return_exceptions=True)
    refused = [end for end in ended if isinstance(end, InferenceServerException)]
    assert refused
    assert {(end.status(), end.message().partition("] ")[2]) for end in refused} == {
        ("StatusCode.UNAVAILABLE", "Exceeds maximum queue size")
    }
    assert len(calls) - len(refused) >= QUEUE_SIZE


async def test_what_waits_too_long_is_refused(client: triton_grpc.InferenceServerClient) -> None:
    calls = await busy(client, 4)
    with pytest.raises(InferenceServerException) as refusal:
        await ask(client, SMALL, timeout=1000)
    assert (refusal.value.status(), refusal.value.message()) == ("StatusCode.UNAVAILABLE", "Request timeout expired")
    await asyncio.gather(*calls)


async def test_what_the_gateway_has_given_up_is_not_computed(
    bounded: TritonServer, client: triton_grpc.InferenceServerClient
) -> None:
    server = Server(bounded.grpc_url, models_of(catalog.load(MODELS)), SharedMemoryUse.ON, calls_at_once=1, limit_s=2.0)
    await server.probe(30.0)
    feed = verification.example(server.served(KEY).specs(), 1)
    calls = await busy(client, 4)
    failed = await num_failed(client)
    with pytest.raises(CallFailed) as caught:
        await server.run(KEY, feed, 0.05)
    assert caught.value.trouble is Trouble.HUNG
    assert server.regions is not None
    await asyncio.gather(*calls)
    await eventually(lambda: not server.regions.num_quarantined)  # the server has answered that it dropped the call
    assert await num_failed(client) == failed + 1
    await server.close()


async def test_a_request_of_higher_priority_goes_first(client: triton_grpc.InferenceServerClient) -> None:
    calls = await busy(client, 3)
    order: list[str] = []
    for name, priority in (("a", 3), ("b", 3), ("c", 3), ("first", 1)):
        calls.append(ask(client, LARGE, priority=priority))
        calls[-1].add_done_callback(lambda _, name=name: order.append(name))
    await asyncio.gather(*calls)
    assert order[0] == "first"
