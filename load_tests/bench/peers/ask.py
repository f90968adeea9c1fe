"""Clients of each compared server: request a picture and note when its pixels arrive. Run in the clients' process."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

import grpc
from safelight.v1 import generation_pb2_grpc as stubs

from load_tests.bench import arrivals, requests
from load_tests.bench.arrivals import Ask, Latencies
from load_tests.bench.requests import CHANNEL_OPTIONS, PROMPT, NoPicture, Seen

DIFFUSERS_METHOD = "/bench.Diffusers/Generate"


@contextlib.asynccontextmanager
async def _safelight(address: str, num_steps: int) -> AsyncIterator[Ask]:
    async with grpc.aio.insecure_channel(address, CHANNEL_OPTIONS) as channel:
        stub = stubs.GenerationServiceStub(channel)

        async def ask(seed: int) -> Seen:
            return await requests.watch(stub, seed, num_steps)

        yield ask


@contextlib.asynccontextmanager
async def _litserve(address: str, num_steps: int) -> AsyncIterator[Ask]:
    import httpx  # in the environment of the peers only

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=f"http://{address}", timeout=None, limits=limits) as client:

        async def ask(seed: int) -> Seen:
            try:
                response = await client.post("/predict", json=_asked(seed, num_steps))
                response.raise_for_status()
            except httpx.HTTPError as error:
                raise NoPicture(str(error)) from None
            return _whole(response.content)

        yield ask


@contextlib.asynccontextmanager
async def _diffusers(address: str, num_steps: int) -> AsyncIterator[Ask]:
    async with grpc.aio.insecure_channel(address, CHANNEL_OPTIONS) as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(DIFFUSERS_METHOD)

        async def ask(seed: int) -> Seen:
            try:
                return _whole(await call(json.dumps(_asked(seed, num_steps)).encode()))
            except grpc.aio.AioRpcError as error:
                raise NoPicture(error.details()) from None

        yield ask


def _asked(seed: int, num_steps: int) -> dict[str, object]:
    return {"prompt": PROMPT, "seed": seed, "num_steps": num_steps}


def _whole(pixels: bytes) -> Seen:
    if not pixels:
        raise NoPicture("no pixels")
    now = time.perf_counter()
    return Seen(now, now)


def asking(kind: str, address: str, num_steps: int) -> AbstractAsyncContextManager[Ask]:
    """Connects to a server of a kind: "safelight", "litserve" or "diffusers"."""
    return {"safelight": _safelight, "litserve": _litserve, "diffusers": _diffusers}[kind](address, num_steps)


async def capacity(kind: str, address: str, num_steps: int, num_clients: int, seconds: float) -> float:
    """`arrivals.capacity` of a server."""
    async with asking(kind, address, num_steps) as ask:
        return await arrivals.capacity(ask, num_clients, seconds)


async def poisson(kind: str, address: str, num_steps: int, rate: float, seconds: float, seed: int) -> Latencies:
    """`arrivals.poisson` on a server; the connection is made before the first request is due."""
    async with asking(kind, address, num_steps) as ask:
        await ask(0)
        return await arrivals.poisson(ask, rate, seconds, seed)
