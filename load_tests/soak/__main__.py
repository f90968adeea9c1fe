"""The command behind `make soak`: good callers alone, then with hostile ones; measures memory and first previews.

Good callers send requests at a steady rate (an open loop), two each INTERACTIVE and STANDARD. They are alone for the
first tenth of the time. Latency counts from when a request was due. Exits with 1 if a target is missed:

- p99 of good INTERACTIVE callers' first preview with hostile callers: at most twice that without, plus one step;
- resident memory at the end: at most 10 % above that after the first third of the hostile time;
- no good request fails.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from rich.console import Console
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight_server.api.identity import new_key

from load_tests.bench import processes
from load_tests.bench.runner import facts
from load_tests.soak.hostile import ATTACKS, Metadata, attack_all

BASE_MS, ROW_MS, MAX_ROWS = 20.0, 1.0, 64
RATE_PER_S = 2.0
REQUESTS = {"per_s": 50, "burst": 50}
"""Quotas of each tenant. Without them, a flood would take all CPU of a small machine."""
SAMPLE_S = 5.0
STRETCH, GROWTH = 2.0, 1.10


@dataclass(slots=True)
class Seen:
    """Measurements of good callers: seconds until the first preview by phase and class, and failures by reason."""

    first_preview_s: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)


async def main(minutes: float, out: Path, attacks: list[str]) -> int:
    """Runs both phases, and prints and writes the figures."""
    console = Console(width=140)
    with tempfile.TemporaryDirectory(prefix="safelight-soak-") as folder:
        keys, good = _key_file(Path(folder) / "keys.json")
        (Path(folder) / "quotas.json").write_text(json.dumps({"default": {"requests": REQUESTS}}))
        settings = {
            "runtime": "simulated", "simulated_base_ms": BASE_MS, "simulated_row_ms": ROW_MS, "num_instances": 1,
            "api_key_file": str(Path(folder) / "keys.json"), "quota_file": str(Path(folder) / "quotas.json"),
        }  # fmt: skip
        with processes.child(processes.serve, settings) as server:
            return await _soak(server, server.first(), good, keys, minutes * 60, out, attacks, console)


async def _soak(
    server: processes.Child,
    address: str,
    good: Metadata,
    hostile: list[Metadata],
    seconds: float,
    out: Path,
    attacks: list[str],
    console: Console,
) -> int:
    seen, refused = Seen(), Counter[str]()
    resident: list[tuple[float, float]] = []
    began, phase = time.monotonic(), ["alone"]
    async with grpc.aio.insecure_channel(address) as channel:
        tasks = [
            asyncio.create_task(_good(channel, good, priority, phase, seen))
            for priority in ("INTERACTIVE", "STANDARD")
            for _ in range(2)
        ]
        tasks.append(asyncio.create_task(_sample(server, began, resident)))
        try:
            await asyncio.sleep(seconds / 10)
            with processes.child(attack_all, address, hostile, attacks) as attackers:
                await asyncio.to_thread(attackers.first)
                phase[0] = "beside"
                done, _ = await asyncio.wait(tasks, timeout=seconds * 9 / 10, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()
                refused.update(await asyncio.to_thread(attackers.ask))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return _report(seen, refused, resident, seconds, out, console)


async def _good(channel: grpc.aio.Channel, key: Metadata, priority: str, phase: list[str], seen: Seen) -> None:
    """A good caller: sends a request every 1 / RATE_PER_S seconds, whether or not the last answer has come."""
    running: set[asyncio.Task[None]] = set()
    due = time.monotonic()
    for number in itertools.count():
        due += 1 / RATE_PER_S
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        seed = hash((priority, id(running), number)) & 0x7FFF_FFFF
        task = asyncio.create_task(_ask(channel, key, priority, seed, due, phase[0], seen))
        running.add(task)
        task.add_done_callback(running.discard)


async def _ask(
    channel: grpc.aio.Channel, key: Metadata, priority: str, seed: int, due: float, phase: str, seen: Seen
) -> None:
    request = pb.GenerateRequest(
        spec=pb.GenerationSpec(prompt="a good picture", num_inference_steps=8, outputs=[pb.OutputSpec(seed=seed)]),
        scheduling=pb.Scheduling(priority=pb.Priority.Value(f"PRIORITY_{priority}")),
        cache=pb.CachePolicy(mode=pb.CachePolicy.MODE_BYPASS),
    )
    first = finished = False
    try:
        async for response in stubs.GenerationServiceStub(channel).Generate(request, metadata=key, timeout=120):
            kind = response.event.WhichOneof("event")
            if kind == "preview" and not first:
                first = True
                seen.first_preview_s.setdefault((phase, priority), []).append(time.monotonic() - due)
            finished = finished or kind == "finished"
        if not finished:
            seen.failures["no end"] += 1
        elif not first:
            seen.failures["no preview"] += 1
    except grpc.aio.AioRpcError as error:
        seen.failures[f"{error.code().name}: {error.details()}"] += 1


async def _sample(server: processes.Child, began: float, resident: list[tuple[float, float]]) -> None:
    while True:
        usage: processes.Usage = await asyncio.to_thread(server.ask)
        resident.append((time.monotonic() - began, usage.resident_bytes / 2**20))
        await asyncio.sleep(SAMPLE_S)


def _report(
    seen: Seen,
    refused: Counter[str],
    resident: list[tuple[float, float]],
    seconds: float,
    out: Path,
    console: Console,
) -> int:
    step_s = (BASE_MS + ROW_MS * MAX_ROWS) / 1e3
    p99 = {f"{phase} {priority}": _p99(times) for (phase, priority), times in seen.first_preview_s.items()}
    third = _median_around(resident, seconds * 0.4)
    last = _median_around(resident, seconds)
    alone, beside = p99.get("alone INTERACTIVE", math.nan), p99.get("beside INTERACTIVE", math.nan)
    bars = {
        f"p99 of the first preview beside hostile callers: {beside:.3f} s, alone {alone:.3f} s": (
            beside <= STRETCH * alone + step_s
        ),
        f"resident memory: {last:.0f} MiB at the end, {third:.0f} MiB after the first third": last <= GROWTH * third,
        f"good requests that failed: {seen.failures.total()}": not seen.failures,
    }
    for what, is_met in bars.items():
        console.print(f"{'met  ' if is_met else 'BELOW'}  {what}")
    for what, figure in sorted(p99.items()):
        console.print(f"p99 of the first preview, {what}: {figure:.3f} s")
    console.print("hostile calls:", dict(sorted(refused.items())))
    if seen.failures:
        console.print("failures:", dict(seen.failures))
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": facts() | {"load": os.getloadavg()},
        "seconds": seconds,
        "first_preview_p99_s": p99,
        "good_requests": {" ".join(at): len(times) for at, times in seen.first_preview_s.items()},
        "failures": seen.failures,
        "hostile": refused,
        "resident_mib": [(round(at), round(mib)) for at, mib in resident],
        "bars": bars,
    }
    (out / "soak.json").write_text(json.dumps(content, indent=1))
    return 0 if all(bars.values()) else 1


def _p99(times: list[float]) -> float:
    return sorted(times)[math.ceil(len(times) * 0.99) - 1]


def _median_around(resident: list[tuple[float, float]], at: float) -> float:
    nearest = sorted(resident, key=lambda sample: abs(sample[0] - at))[:5]
    return sorted(mib for _, mib in nearest)[len(nearest) // 2]


def _key_file(path: Path) -> tuple[list[Metadata], Metadata]:
    """Writes a key file with one good tenant and two hostile ones; returns their metadata."""
    entries: list[object] = []
    metadata: list[Metadata] = []
    for caller, tenant in (("good", "studio"), ("one", "evil"), ("two", "evil"), ("three", "worse")):
        key, entry = new_key(caller, tenant)
        entries.append(json.loads(entry))
        metadata.append((("authorization", f"Bearer {key}"),))
    path.write_text(json.dumps({"keys": entries}))
    path.chmod(0o600)
    return metadata[1:], metadata[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    names = ", ".join(attack.__name__ for attack in ATTACKS)
    parser.add_argument("--only", default="", help=f"of {names}, with commas; empty: all")
    parser.add_argument("--out", type=Path, default=Path("out/soak"))
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else [attack.__name__ for attack in ATTACKS]
    sys.exit(asyncio.run(main(options.minutes, options.out, chosen)))
