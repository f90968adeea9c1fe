"""An engine without streams, for benchmarks that compare runtimes; its generations note their steps."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from safelight_server.catalog.catalog import Catalog
from safelight_server.domain.errors import SafelightError
from safelight_server.domain.tensors import FloatArray
from safelight_server.engine.engine import Engine
from safelight_server.engine.jobs import Job
from safelight_server.engine.observer import ExecutionObserver
from safelight_server.runtime.base import Runtime
from safelight_server.sampler import SamplerSpec, compile_table
from safelight_server.scheduler import Priority
from safelight_server.telemetry import Metrics

from tests.triton.support import TritonServer

IDS = itertools.count()
CPUCLOCK_SCHED = 2
"""Linux' clock id of a process' CPU time: these bits below the complement of the process id."""


@dataclass
class Watch(ExecutionObserver):
    """Notes when the steps of an output were made."""

    done: asyncio.Event = field(default_factory=asyncio.Event)
    steps: list[float] = field(default_factory=list)
    error: SafelightError | None = None

    def stepped(self, step: int, batch_size: int) -> None:
        """Notes the time of a step."""
        self.steps.append(time.monotonic())

    def decoded(self, image: FloatArray) -> None:
        """Marks the output as ended."""
        self.done.set()

    def failed(self, error: SafelightError) -> None:
        """Marks the output as ended."""
        self.error = error
        self.done.set()

    def expired(self) -> None:
        """Marks the output as ended."""
        self.done.set()


class Bench:
    """An engine on a runtime, for generations of the default pipeline that nobody watches."""

    def __init__(self, catalog: Catalog, runtime: Runtime) -> None:
        self.engine = Engine(runtime, time.monotonic, Metrics(), max_running=256)
        self._pipeline = catalog.get("")
        assert self._pipeline.tokenizer is not None
        encode = self._pipeline.tokenizer.encode
        self._token_ids = encode("a red potion on a dark background").ids, encode("").ids

    def submit(self, count: int, num_steps: int, guidance_scale: float = 3.0) -> list[Watch]:
        """Submits `count` generations at once. A guidance scale of 1 means no guidance, so one row a step."""
        watches = [Watch() for _ in range(count)]
        manifest = self._pipeline.manifest
        latent, spec = manifest.latent, SamplerSpec("ddim", "trailing")
        table = compile_table(spec, self._pipeline.schedule, manifest.prediction_type, num_steps)
        token_ids = self._token_ids if guidance_scale != 1.0 else self._token_ids[:1]
        for watch in watches:
            number = next(IDS)
            shape = (latent.channels, latent.height, latent.width)
            job = Job(
                number, "bench", Priority.STANDARD, self._pipeline, shape, table, number, guidance_scale, token_ids
            )
            self.engine.submit(job, watch)
        return watches

    async def finish(self, watches: Sequence[Watch]) -> None:
        """Waits until all generations have ended."""
        for watch in watches:
            await watch.done.wait()
            if watch.error is not None:
                raise watch.error


def cpu_s(server: TritonServer | None) -> float:
    """CPU seconds of this process and of a Triton server with its stub processes."""
    used = time.process_time()
    for pid in (server.pid, *server.stubs()) if server else ():
        used += time.clock_gettime(~pid << 3 | CPUCLOCK_SCHED)
    return used


@asynccontextmanager
async def on(catalog: Catalog, runtime: Runtime) -> AsyncIterator[Bench]:
    """Runs an engine on the runtime during the block."""
    await runtime.start()
    bench = Bench(catalog, runtime)
    try:
        yield bench
    finally:
        await bench.engine.close()
        await runtime.close()
