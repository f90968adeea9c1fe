"""Replays the committed trace against a real server, with its caches off, with exact hits only, and with all.

    off      BYPASS, some of the requests, the real runtime
    exact    DEFAULT, all requests, the simulated runtime at no cost, with digests instead of prompts (it reads
             16 bytes); exact hits depend neither on pixels nor on words
    similar  ALLOW_SIMILAR, all requests, the real runtime

Requests are sent in the order of the trace, several at a time, each when the
previous one of its session has ended; think times are left out. The served
pictures are kept in out/replay, for `training.judge`.
"""

from __future__ import annotations

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
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight_server.app.server import serving
from safelight_server.settings import load

from load_tests.bench.runner import Report, Row, Target
from load_tests.calibration.trace import DEFAULT, SEEDS, Asked, trace

MODES = {
    "off": pb.CachePolicy.MODE_BYPASS,
    "exact": pb.CachePolicy.MODE_DEFAULT,
    "similar": pb.CachePolicy.MODE_ALLOW_SIMILAR,
}
KINDS = ("exact", "similar", "latent", "coalesced", "miss")
BAR = 0.57
RAW = pb.PixelEncoding(media_type="application/x-raw-rgba8")
PREVIEWS = pb.PreviewPolicy(method=pb.PREVIEW_METHOD_LINEAR, accept=[RAW])


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to replay.

    Attributes:
        num_requests: number of requests of each trace, from its beginning.
        judged: number of these that are also sent with the caches off.
        num_clients: number of requests in flight.
        min_similarity: minimum similarity in mode `similar`; the value chosen for `icons` (record 0013).
        out: folder for the answers, with their pictures.
    """

    seeds: tuple[int, ...] = SEEDS
    modes: tuple[str, ...] = tuple(MODES)
    num_requests: int = DEFAULT.num_requests
    judged: int = 2000
    num_steps: int = 20
    num_clients: int = 8
    min_similarity: float = 0.7
    models: Path = Path("models")
    out: Path = Path("out/replay")


SMOKE = Plan((1,), num_requests=6, judged=2, num_steps=2, num_clients=2, out=Path("out/bench/smoke/replay"))


@dataclass
class Served:
    """One answer.

    Attributes:
        number: index of the request in its trace.
        source: index of the request for which the picture was developed; -1: this one.
        first_s: seconds from the request to the first preview or the picture.
        total_s: seconds from the request to the picture.
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
    """Result of replaying one trace in one mode."""

    mode: str
    seed: int
    num_steps: int
    wall_s: float
    load: float
    served: list[Served]

    @property
    def saved(self) -> float:
        """S: the share of all steps that cached work saved, without those shared by identical requests in flight."""
        skipped = sum(one.num_steps_skipped for one in self.served if one.kind != "coalesced")
        return skipped / (self.num_steps * len(self.served))

    @property
    def coalesced(self) -> float:
        """The share of all steps that identical requests in flight saved."""
        return sum(o.num_steps_skipped for o in self.served if o.kind == "coalesced") / (
            self.num_steps * len(self.served)
        )


class Player:
    """Sends requests and records the answers.

    Args:
        numbers: indexes of the requests to send; the others are left out.
    """

    def __init__(self, asked: Sequence[Asked], numbers: Sequence[int], mode: str, plan: Plan) -> None:
        self._asked = asked
        self._mode = mode
        self._plan = plan
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
        """Sends all requests and waits for their answers."""
        async with grpc.aio.insecure_channel(address) as channel:
            stub = stubs.GenerationServiceStub(channel)
            async with asyncio.TaskGroup() as group:
                for _ in range(self._plan.num_clients):
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
        if self._mode == "similar":
            policy.min_similarity = self._plan.min_similarity
        outputs = [] if asked.seed is None else [pb.OutputSpec(seed=asked.seed)]
        prompt = asked.prompt
        if self._mode == "exact":
            prompt = hashlib.blake2b(prompt.encode(), digest_size=8).hexdigest()
        spec = pb.GenerationSpec(prompt=prompt, num_inference_steps=self._plan.num_steps, outputs=outputs)
        return pb.GenerateRequest(spec=spec, cache=policy, encoding=RAW, preview=PREVIEWS)


async def replay(mode: str, seed: int, plan: Plan) -> Replayed:
    """Replays one trace in one mode; writes the pictures to a file."""
    asked = trace(seed, DEFAULT)[: plan.num_requests]
    step = max(1, len(asked) // plan.judged) if mode == "off" else 1
    player = Player(asked, range(0, len(asked), step), mode, plan)
    settings: dict[str, Any] = {"port": 0, "models_dir": plan.models, "log_level": "error"}
    if mode == "exact":
        settings |= {"runtime": "simulated", "simulated_base_ms": 0.0, "simulated_row_ms": 0.0}
    async with serving(load(**settings)) as running:
        began = time.perf_counter()
        await player.run(running.address)
        wall_s = time.perf_counter() - began
    if mode != "exact":
        arrays = {str(number): picture for number, picture in player.pictures.items()}
        np.savez_compressed(plan.out / f"{mode}-{seed}.npz", **arrays)  # type: ignore[arg-type]
    served = [player.served[number] for number in sorted(player.served)]
    return Replayed(mode, seed, plan.num_steps, wall_s, os.getloadavg()[0], served)


def measure(plan: Plan) -> Report:
    """Replays all traces; returns the table and writes the answers to `plan.out`."""
    plan.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for seed in plan.seeds:
        for mode in plan.modes:
            result = uvloop.run(replay(mode, seed, plan))
            (plan.out / f"{mode}-{seed}.json").write_text(json.dumps(asdict(result)) + "\n")
            rows.append(_figures(result))
    targets = [
        Target(f"share of the steps saved on trace {row['seed']}, everything allowed", float(row["steps_saved"]), BAR)
        for row in rows
        if row["mode"] == "similar"
    ]
    return Report("replay", {"The trace, by what its requests allow": rows}, targets)


def _figures(result: Replayed) -> Row:
    kinds = Counter(one.kind for one in result.served)
    first = [one.first_s for one in result.served]
    return {
        "seed": result.seed,
        "mode": result.mode,
        "requests": len(result.served),
        "steps_saved": result.saved,
        "coalesced": result.coalesced,
        "pictures_per_s": len(result.served) / result.wall_s,
        "first_seen_s_p50": float(np.quantile(first, 0.5)),
        "first_seen_s_p95": float(np.quantile(first, 0.95)),
        **{kind: kinds[kind] for kind in KINDS},
    }
