"""`python -m load_tests.replay`: the committed trace through a real server, with its caches off, exact only, and all.

    off      BYPASS, a sample of the requests, the real runtime
    exact    DEFAULT, all requests, the simulated runtime at no cost, which reads 16 bytes: digests for prompts;
             what is counted depends neither on pixels nor on words
    similar  ALLOW_SIMILAR, all requests, the real runtime

Requests are sent in the order of the trace, several at a time, each when the one
before it in its session is done; think times are left out. Writes what was
served to out/replay, for `training.judge`, and prints shares and rates.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import uvloop
from rich.console import Console
from rich.table import Table
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight_server.app import serving
from safelight_server.settings import load
from safelight_server.telemetry import configure_logging

from load_tests.trace import DEFAULT, SEEDS, Asked, trace

OUT = Path("out/replay")
MODELS = Path(__file__).parent.parent / "models"
MODES = {
    "off": pb.CachePolicy.MODE_BYPASS,
    "exact": pb.CachePolicy.MODE_DEFAULT,
    "similar": pb.CachePolicy.MODE_ALLOW_SIMILAR,
}
RAW = pb.PixelEncoding(media_type="application/x-raw-rgba8")
PREVIEWS = pb.PreviewPolicy(method=pb.PREVIEW_METHOD_LINEAR, accept=[RAW])


@dataclass
class Served:
    """One answer.

    Attributes:
        number: of the request in its trace.
        source: number of the request whose picture it is; -1: its own.
        first_s: until something of the picture was seen, a preview or itself; from asking.
        total_s: until it was there.
    """

    number: int
    kind: str
    num_steps_skipped: int
    similarity: float
    source: int
    first_s: float
    total_s: float


@dataclass
class Replayed:
    """One trace in one mode."""

    mode: str
    seed: int
    num_steps: int
    wall_s: float
    load: float
    served: list[Served]

    @property
    def saved(self) -> float:
        """S: the share of all steps that earlier work saved; what identical requests in flight shared is apart."""
        skipped = sum(one.num_steps_skipped for one in self.served if one.kind != "coalesced")
        return skipped / (self.num_steps * len(self.served))

    @property
    def coalesced(self) -> float:
        """The share that identical requests in flight saved."""
        return sum(o.num_steps_skipped for o in self.served if o.kind == "coalesced") / (
            self.num_steps * len(self.served)
        )


class Player:
    """Sends requests and notes what comes back.

    Args:
        numbers: of the requests to send; the others are left out.
    """

    def __init__(self, asked: Sequence[Asked], numbers: Sequence[int], mode: str, options: argparse.Namespace) -> None:
        self._asked = asked
        self._mode = mode
        self._options = options
        self._numbers = iter(numbers)
        self._done = {number: asyncio.Event() for number in numbers}
        self._before: dict[int, int] = {}
        last: dict[int, int] = {}
        for number in numbers:
            session = asked[number].session
            if session in last:
                self._before[number] = last[session]
            last[session] = number
        self._names: dict[str, int] = {}
        self.served: dict[int, Served] = {}
        self.pictures: dict[int, npt.NDArray[np.uint8]] = {}

    async def run(self, address: str) -> None:
        """All of them."""
        async with grpc.aio.insecure_channel(address) as channel:
            stub = stubs.GenerationServiceStub(channel)
            async with asyncio.TaskGroup() as group:
                for _ in range(self._options.clients):
                    group.create_task(self._client(stub))

    async def _client(self, stub: stubs.GenerationServiceAsyncStub) -> None:
        for number in self._numbers:
            if number in self._before:
                await self._done[self._before[number]].wait()
            await self._ask(stub, number)
            self._done[number].set()

    async def _ask(self, stub: stubs.GenerationServiceAsyncStub, number: int) -> None:
        began, first = time.perf_counter(), 0.0
        parts: list[bytes] = []
        async for response in stub.Generate(self._request(number)):
            event = response.event
            kind = event.WhichOneof("event")
            if kind in ("preview", "artifact_chunk") and not first:
                first = time.perf_counter() - began
            if kind == "accepted":
                self._names[event.generation] = number
            elif kind == "artifact_chunk":
                parts.append(event.artifact_chunk.data)
                edge = event.artifact_chunk.height_px
        [found] = event.finished.cache_results
        self.pictures[number] = np.frombuffer(b"".join(parts), np.uint8).reshape(edge, -1, 4)[..., :3]
        self.served[number] = Served(
            number,
            pb.CacheResult.Disposition.Name(found.disposition).removeprefix("DISPOSITION_").lower(),
            found.num_steps_skipped,
            found.similarity,
            self._names.get(found.source, -1),
            first,
            time.perf_counter() - began,
        )

    def _request(self, number: int) -> pb.GenerateRequest:
        asked = self._asked[number]
        policy = pb.CachePolicy(mode=MODES[self._mode])
        if self._mode == "similar" and self._options.min_similarity is not None:
            policy.min_similarity = self._options.min_similarity
        outputs = [] if asked.seed is None else [pb.OutputSpec(seed=asked.seed)]
        prompt = asked.prompt
        if self._mode == "exact":
            prompt = hashlib.blake2b(prompt.encode(), digest_size=8).hexdigest()
        spec = pb.GenerationSpec(prompt=prompt, num_inference_steps=self._options.steps, outputs=outputs)
        return pb.GenerateRequest(spec=spec, cache=policy, encoding=RAW, preview=PREVIEWS)


async def replay(mode: str, seed: int, options: argparse.Namespace) -> Replayed:
    """One trace in one mode; pictures go to a file."""
    asked = trace(seed, DEFAULT)[: options.requests]
    step = max(1, len(asked) // options.judged) if mode == "off" else 1
    player = Player(asked, range(0, len(asked), step), mode, options)
    settings: dict[str, Any] = {"port": 0, "models_dir": MODELS, "log_level": "error"}
    if mode == "exact":
        settings |= {"runtime": "simulated", "simulated_base_ms": 0.0, "simulated_row_ms": 0.0}
    async with serving(load(**settings)) as running:
        began = time.perf_counter()
        await player.run(running.address)
        wall_s = time.perf_counter() - began
    if mode != "exact":
        arrays = {str(number): picture for number, picture in player.pictures.items()}
        np.savez_compressed(options.out / f"{mode}-{seed}.npz", **arrays)  # type: ignore[arg-type]
    served = [player.served[number] for number in sorted(player.served)]
    return Replayed(mode, seed, options.steps, wall_s, os.getloadavg()[0], served)


def show(results: Sequence[Replayed]) -> Table:
    """The figures."""
    table = Table(
        "mode", "seed", "requests", "S", "coalesced", "pictures/s", "first seen p50", "p95", "by kind", "load"
    )
    for result in results:
        kinds = Counter(one.kind for one in result.served)
        first = [one.first_s for one in result.served]
        table.add_row(
            result.mode,
            str(result.seed),
            str(len(result.served)),
            f"{result.saved:.3f}",
            f"{result.coalesced:.3f}",
            f"{len(result.served) / result.wall_s:.2f}",
            *(f"{float(np.quantile(first, q)):.2f} s" for q in (0.5, 0.95)),
            ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items())),
            f"{result.load:.1f}",
        )
    return table


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--requests", type=int, default=DEFAULT.num_requests, help="of each trace, from its beginning")
    parser.add_argument("--judged", type=int, default=400, help="requests of each trace that are sent with caches off")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps of each picture")
    parser.add_argument("--clients", type=int, default=8, help="requests in flight")
    parser.add_argument("--min-similarity", type=float, help="of the requests; without it the server's default")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    configure_logging("console", "error")
    console, results = Console(width=180), []
    for seed in options.seeds:
        for mode in options.modes:
            result = uvloop.run(replay(mode, seed, options))
            (options.out / f"{mode}-{seed}.json").write_text(json.dumps(asdict(result)) + "\n")
            results.append(result)
            console.print(show([result]))
    console.print(show(results))


if __name__ == "__main__":
    main()
