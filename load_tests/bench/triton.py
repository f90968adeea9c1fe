"""The triton runtime compared with the embedded one: throughput, CPU per step, and the pause after a kill -9.

It runs the engine without streams, with one instance, so that the difference is
that of the runtimes. CPU is that of this process and, for Triton, of the server and
its stubs.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safelight_server.catalog import catalog as catalogs
from safelight_server.catalog.catalog import Catalog
from safelight_server.runtime.onnx import OnnxRuntime
from safelight_server.runtime.triton import TritonOptions, TritonRuntime

from load_tests.bench.engines import cpu_s, on
from load_tests.bench.runner import Report, Row, Target, median_by
from tests.conftest import eventually
from tests.triton.support import triton_server, triton_servers

NUM_STEPS = 20
PATIENCE_S = 60.0
BAR = 0.9
STANDBY_S, READINESS_S = 0.1, 1.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure: `kills` for each of the two recovery times."""

    num_generations: tuple[int, ...] = (1, 8, 16)
    rounds: int = 5
    kills: int = 5


SMOKE = Plan(num_generations=(1, 2), rounds=1, kills=1)


def measure(plan: Plan) -> Report:
    """Measures both tables."""
    return asyncio.run(_measure(plan))


async def _measure(plan: Plan) -> Report:
    catalog = catalogs.load(Path("models"))
    rows = await _throughput(catalog, plan)
    standby, readiness = await _to_standby(catalog, plan.kills), await _from_readiness(catalog, plan.kills)
    recovery: list[Row] = [
        {"from": name, "median_s": statistics.median(seconds), "worst_s": max(seconds), "kills": plan.kills}
        for name, seconds in (("kill to standby", standby), ("readiness of the only server", readiness))
    ]
    largest = max(plan.num_generations)
    [share] = [r for r in rows if r["runtime"] == "shared memory" and r["generations"] == largest]
    what = f"work per CPU second over shared memory by embedded at {largest} generations"
    targets = [
        Target(what, float(share["of_embedded_per_cpu_s"]), BAR),
        Target("1 s by the recovery from readiness, worst", READINESS_S / max(readiness), 1.0),
        Target("0.1 s by the recovery to a standby, worst", STANDBY_S / max(standby), 1.0),
    ]
    return Report("triton", {"Embedded and Triton": rows, "Recovery after kill -9": recovery}, targets)


async def _throughput(catalog: Catalog, plan: Plan) -> Sequence[Row]:
    """Measures images per second and CPU milliseconds per step; the variants take turns."""
    rows: list[Row] = []
    with triton_server() as server:
        url = (server.grpc_url,)
        async with (
            on(catalog, OnnxRuntime(catalog, 1)) as embedded,
            on(catalog, TritonRuntime(catalog, TritonOptions(url, shared_memory="off"))) as over_grpc,
            on(catalog, TritonRuntime(catalog, TritonOptions(url, shared_memory="on"))) as shared,
        ):
            variants = {"embedded": (embedded, None), "grpc": (over_grpc, server), "shared memory": (shared, server)}
            for _ in range(plan.rounds):
                for count in plan.num_generations:
                    base_s = 0.0
                    for name, (bench, other) in variants.items():
                        began, cpu = time.monotonic(), cpu_s(other)
                        await bench.finish(bench.submit(count, NUM_STEPS))
                        seconds, used_s = time.monotonic() - began, cpu_s(other) - cpu
                        base_s = base_s or used_s
                        rows.append(
                            {
                                "runtime": name,
                                "generations": count,
                                "images_per_s": count / seconds,
                                "cpu_ms_per_step": 1e3 * used_s / (count * NUM_STEPS),
                                "of_embedded_per_cpu_s": base_s / used_s,
                            }
                        )
    return median_by(rows, ("runtime", "generations"))


async def _to_standby(catalog: Catalog, kills: int) -> list[float]:
    """Seconds from kill -9 of one of two servers until every generation has made another step."""
    found = []
    for _ in range(kills):
        with triton_servers(2) as servers:
            options = TritonOptions(tuple(server.grpc_url for server in servers))
            async with on(catalog, TritonRuntime(catalog, options)) as bench:
                watches = bench.submit(4, NUM_STEPS)
                await eventually(lambda: all(len(watch.steps) >= 4 for watch in watches), PATIENCE_S)  # noqa: B023
                before = [len(watch.steps) for watch in watches]
                killed = time.monotonic()
                os.kill(servers[0].pid, 9)
                await bench.finish(watches)
                next_steps = [w.steps[at] for w, at in zip(watches, before, strict=True) if at < NUM_STEPS]
                found.append(max(next_steps) - killed)
    return found


async def _from_readiness(catalog: Catalog, kills: int) -> list[float]:
    """Seconds from the readiness of the only server after a kill -9 until the first step on it."""
    found = []
    with triton_server() as server:
        async with on(catalog, TritonRuntime(catalog, TritonOptions((server.grpc_url,)))) as bench:
            for _ in range(kills):
                [watch] = bench.submit(1, NUM_STEPS)
                await eventually(lambda: len(watch.steps) >= 4, PATIENCE_S)  # noqa: B023
                await asyncio.to_thread(server.kill)
                before = len(watch.steps)
                server.restart()
                await asyncio.to_thread(server.wait_ready)
                ready = time.monotonic()
                await bench.finish([watch])
                found.append(watch.steps[before] - ready)
    return found
