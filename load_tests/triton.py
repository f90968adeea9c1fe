"""The triton runtime beside the embedded one: throughput, CPU per step, and how soon work goes on after a kill -9.

Runs the engine without streams, so that what is compared is the runtimes; CPU
is that of this process and, for Triton, of the server and its stubs. Rounds of
all variants take turns on one machine; figures are medians. Needs what `make
test-triton` installs. `python -m load_tests.triton [--smoke]`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from safelight_server import catalog as catalogs
from safelight_server.catalog import Catalog
from safelight_server.engine import Engine
from safelight_server.errors import SafelightError
from safelight_server.jobs import Job
from safelight_server.latents import Snapshot
from safelight_server.runtime.base import FloatArray, Runtime
from safelight_server.runtime.onnx import OnnxRuntime
from safelight_server.runtime.triton import TritonOptions, TritonRuntime
from safelight_server.sampler import SamplerSpec, compile_table
from safelight_server.scheduler import Priority
from safelight_server.telemetry import Metrics

from tests.conftest import eventually
from tests.triton.support import TritonServer, triton_server, triton_servers

STEPS = 20
GENERATIONS = (1, 8, 16)
ROUNDS = 5
RECOVERIES = 5
PATIENCE_S = 60.0
IDS = itertools.count()
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class Watch:
    """An output listener that notes when its steps were made."""

    done: asyncio.Event = field(default_factory=asyncio.Event)
    steps: list[float] = field(default_factory=list)
    error: SafelightError | None = None

    def started(self) -> None:
        """Nothing to note."""

    def computed(self, seconds: float, rows: int) -> None:
        """Nothing to note."""

    def stepped(self, step: int, batch_size: int) -> None:
        """A step was made now."""
        self.steps.append(time.monotonic())

    def wants_frame(self, step: int) -> bool:
        """No previews."""
        return False

    def frame(self, step: int, denoised: FloatArray) -> None:
        """No previews."""

    def wants_checkpoint(self, step: int) -> bool:
        """Nothing is kept."""
        return False

    def checkpoint(self, snapshot: Snapshot) -> None:
        """Nothing is kept."""

    def encoded(self, row: int, embedding: FloatArray) -> None:
        """Nothing is kept."""

    def decoded(self, image: FloatArray) -> None:
        """The end."""
        self.done.set()

    def failed(self, error: SafelightError) -> None:
        """The end."""
        self.error = error
        self.done.set()

    def expired(self) -> None:
        """The end."""
        self.done.set()


class Bench:
    """An engine on a runtime."""

    def __init__(self, catalog: Catalog, runtime: Runtime) -> None:
        self.engine = Engine(runtime, time.monotonic, Metrics(), max_running=64)
        self._pipeline = catalog.get("")
        at = self._pipeline.manifest
        self._table = compile_table(SamplerSpec("ddim", "trailing"), self._pipeline.schedule, at.prediction_type, STEPS)
        assert self._pipeline.tokenizer is not None
        encode = self._pipeline.tokenizer.encode
        self._token_ids = encode("a red potion on a dark background").ids, encode("").ids

    def submit(self, count: int) -> list[Watch]:
        """`count` guided generations."""
        watches = [Watch() for _ in range(count)]
        latent = self._pipeline.manifest.latent
        for watch in watches:
            number = next(IDS)
            shape = (latent.channels, latent.height, latent.width)
            job = Job(
                number, "bench", Priority.STANDARD, self._pipeline, shape, self._table, number, 3.0, self._token_ids
            )
            self.engine.submit(job, watch)
        return watches

    async def finish(self, watches: Sequence[Watch]) -> None:
        """Waits for all of them."""
        for watch in watches:
            await watch.done.wait()
            if watch.error is not None:
                raise watch.error


def cpu_s(server: TritonServer | None) -> float:
    """CPU seconds of this process and of a server with its stubs."""
    used = time.process_time()
    for pid in (server.pid, *server.stubs()) if server else ():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        used += (int(fields[11]) + int(fields[12])) / TICKS
    return used


@asynccontextmanager
async def on(catalog: Catalog, runtime: Runtime) -> AsyncIterator[Bench]:
    """A started engine."""
    await runtime.start()
    bench = Bench(catalog, runtime)
    try:
        yield bench
    finally:
        await bench.engine.close()
        await runtime.close()


async def throughput(catalog: Catalog, rounds: int) -> list[dict[str, object]]:
    """Images per second and CPU milliseconds per step; all variants take turns."""
    results: dict[tuple[str, int], list[tuple[float, float]]] = {}
    with triton_server() as server:
        url = (server.grpc_url,)
        async with (
            on(catalog, OnnxRuntime(catalog, 1)) as embedded,
            on(catalog, TritonRuntime(catalog, TritonOptions(url, shared_memory="off"))) as over_grpc,
            on(catalog, TritonRuntime(catalog, TritonOptions(url, shared_memory="on"))) as shared,
        ):
            variants = {"embedded": (embedded, None), "grpc": (over_grpc, server), "shared memory": (shared, server)}
            for _ in range(rounds):
                for count in GENERATIONS:
                    for name, (bench, other) in variants.items():
                        began, cpu = time.monotonic(), cpu_s(other)
                        await bench.finish(bench.submit(count))
                        seconds, used = time.monotonic() - began, cpu_s(other) - cpu
                        results.setdefault((name, count), []).append((count / seconds, used / (count * STEPS)))
    rows: list[dict[str, object]] = []
    for (name, count), samples in results.items():
        pairs = zip(samples, results["embedded", count], strict=True)
        rows.append(
            {
                "runtime": name,
                "generations": count,
                "images_per_s": statistics.median(images for images, _ in samples),
                "cpu_ms_per_step": 1e3 * statistics.median(cpu for _, cpu in samples),
                "per_cpu_s_of_embedded": statistics.median(base[1] / own[1] for own, base in pairs),
            }
        )
    return rows


async def to_standby(catalog: Catalog, times: int) -> list[float]:
    """Seconds from kill -9 of one of two servers until every generation has made another step."""
    found = []
    for _ in range(times):
        with triton_servers(2) as servers:
            options = TritonOptions(tuple(server.grpc_url for server in servers))
            async with on(catalog, TritonRuntime(catalog, options)) as bench:
                watches = bench.submit(4)
                await eventually(lambda: all(len(watch.steps) >= 4 for watch in watches), PATIENCE_S)  # noqa: B023
                before = [len(watch.steps) for watch in watches]
                killed = time.monotonic()
                os.kill(servers[0].pid, 9)
                await bench.finish(watches)
                found.append(max(w.steps[at] for w, at in zip(watches, before, strict=True) if at < STEPS) - killed)
    return found


async def from_readiness(catalog: Catalog, times: int) -> list[float]:
    """Seconds from the readiness of the only server after a kill -9 until the first step on it."""
    found = []
    with triton_server() as server:
        async with on(catalog, TritonRuntime(catalog, TritonOptions((server.grpc_url,)))) as bench:
            for _ in range(times):
                [watch] = bench.submit(1)
                await eventually(lambda: len(watch.steps) >= 4, PATIENCE_S)  # noqa: B023
                await asyncio.to_thread(server.kill)
                before = len(watch.steps)
                server.restart()
                await asyncio.to_thread(server.wait_ready)
                ready = time.monotonic()
                await bench.finish([watch])
                found.append(watch.steps[before] - ready)
    return found


async def main(rounds: int, recoveries: int) -> dict[str, object]:
    """Everything; prints tables."""
    catalog = catalogs.load(Path("models"))
    console = Console()
    load = os.getloadavg()
    rows = await throughput(catalog, rounds)
    table = Table("runtime", "generations", "images/s", "CPU ms/step", "work per CPU s / embedded")
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
    recovery = {
        "standby_s": await to_standby(catalog, recoveries),
        "from_readiness_s": await from_readiness(catalog, recoveries),
    }
    for name, seconds in recovery.items():
        console.print(f"{name}: median {statistics.median(seconds):.3f}, worst {max(seconds):.3f}, of {len(seconds)}")
    console.print(f"load average {load[0]:.1f} at the beginning, {os.getloadavg()[0]:.1f} at the end")
    return {"throughput": rows, "recovery": recovery, "load": load}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="one round of each")
    given = parser.parse_args()
    once = given.smoke
    result = asyncio.run(main(1 if once else ROUNDS, 1 if once else RECOVERIES))
    out = Path("out/bench/triton.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1))
