"""Triton's queue as `safelight repository --bounded-queue` sets it: bounded, timed, ordered.

The refusals are those that docs/operations/triton.md quotes: a gateway tells
them from a dead server by their text.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import tritonclient.grpc.aio as triton_grpc
from safelight_server.repository import QUEUE_SIZE, Target, write
from tritonclient.utils import InferenceServerException

from tests.triton.support import REPOSITORY, TritonServer, triton_server
from tests.triton.test_backend import example, inputs

MODEL = "icons_denoiser"
LARGE, SMALL = (inputs(example(MODEL, rows)) for rows in (64, 1))
"""LARGE fills a batch alone and computes for a good part of a second."""


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server of a repository with bounded queues."""
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


async def busy(client: triton_grpc.InferenceServerClient, calls: int) -> list[asyncio.Task[object]]:
    """`calls` large calls of which one is done, one is running and the rest waits in the queue."""
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


async def test_a_request_of_higher_priority_goes_first(client: triton_grpc.InferenceServerClient) -> None:
    calls = await busy(client, 3)
    order: list[str] = []
    for name, priority in (("a", 3), ("b", 3), ("c", 3), ("first", 1)):
        calls.append(ask(client, LARGE, priority=priority))
        calls[-1].add_done_callback(lambda _, name=name: order.append(name))
    await asyncio.gather(*calls)
    assert order[0] == "first"
