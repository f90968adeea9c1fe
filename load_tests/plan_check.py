"""`python -m load_tests.plan_check` compares the predictions of `safelight plan` with runs of the simulated runtime.

A server with one instance gets Poisson arrivals at several shares of the capacity that the plan predicts. Times of
first previews are the server's (`Timings.first_preview`, from acceptance), like those of the plan.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from safelight import Client, Finished
from safelight.v1 import generation_pb2 as pb
from safelight_server.app.server import serving
from safelight_server.cli.planning import CallTimes, ModelTimes, PlannedLoad, expect
from safelight_server.settings import load
from safelight_server.telemetry import configure_logging

from load_tests.bench.arrivals import schedule

STEPS = 20
BASE_MS, ROW_MS = 200.0, 10.0
"""Seconds of a denoiser call. Long, so that the server's own work counts little on any machine."""
MAX_ROWS = 64
OTHERS = 0.1
"""A call of another component takes a tenth of that (runtime/simulated.py)."""


@dataclass(frozen=True)
class Comparison:
    """Predictions and measurements, in seconds."""

    utilization: float
    images_per_s: float
    num_pictures: int
    expected_p50_s: float
    measured_p50_s: float
    expected_p99_s: float
    measured_p99_s: float
    expected_outputs: float
    measured_outputs: float


def times() -> ModelTimes:
    """The simulated runtime's times, as the plan takes them."""
    first, last = (BASE_MS + ROW_MS) / 1e3, (BASE_MS + MAX_ROWS * ROW_MS) / 1e3
    return ModelTimes(CallTimes((1, MAX_ROWS), (first, last)), OTHERS * first, OTHERS * first)


def at_utilization(share: float) -> PlannedLoad:
    """The load at which an instance is busy for this share of the time."""
    full = expect([PlannedLoad("simulated", 1.0, STEPS, 1)], {"simulated": times()}, 1.0).utilization
    return PlannedLoad("simulated", share / full, STEPS, 1)


async def measure(share: float, seconds: float, seed: int) -> Comparison:
    """Runs a server under a load of this utilization for `seconds`."""
    planned = at_utilization(share)
    expected = expect([planned], {"simulated": times()}, 1.0)
    settings = load(
        port=0,
        runtime="simulated",
        num_instances=1,
        simulated_base_ms=BASE_MS,
        simulated_row_ms=ROW_MS,
        log_level="error",
    )
    firsts: list[float] = []
    totals: list[float] = []
    async with serving(settings) as running, Client(running.address) as client:

        async def ask(at: float, number: int) -> None:
            await asyncio.sleep(at)
            words = f"picture {number}"  # a different prompt each, so that each is encoded
            developing = client.generate(
                words, seed=number, steps=STEPS, cache="bypass", priority=pb.PRIORITY_INTERACTIVE
            )
            async for event in developing:
                if isinstance(event, Finished):
                    timings = event.timings
                    firsts.append(timings.first_preview.ToTimedelta().total_seconds())
                    totals.append(timings.total.ToTimedelta().total_seconds())

        due = schedule(planned.images_per_s, seconds, seed)
        await asyncio.gather(*(ask(at, number) for number, at in enumerate(due)))
    cuts = statistics.quantiles(firsts, n=100, method="inclusive")
    return Comparison(
        share,
        planned.images_per_s,
        len(firsts),
        expected.first_preview_p50_s,
        cuts[49],
        expected.first_preview_p99_s,
        cuts[98],
        expected.outputs,
        planned.images_per_s * statistics.fmean(totals),  # Little's law
    )


async def compare(seconds: float) -> list[Comparison]:
    """Measures at several utilizations at once, with a server for each; the servers mostly sleep."""
    return await asyncio.gather(*(measure(share, seconds, seed) for seed, share in enumerate((0.2, 0.4, 0.6, 0.8))))


def main() -> None:
    """Prints a table, and writes the figures to a file if the command line names one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=90.0, help="of the loads")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args()
    configure_logging("console", "error")
    found = asyncio.run(compare(given.seconds))
    print("busy   pictures/s  pictures  p50 expected/measured     p99 expected/measured     at once expected/measured")
    for one in found:
        print(
            f"{one.utilization:4.0%} {one.images_per_s:10.2f} {one.num_pictures:9d}"
            f"  {1e3 * one.expected_p50_s:5.0f} / {1e3 * one.measured_p50_s:5.0f} ms"
            f" = {one.expected_p50_s / one.measured_p50_s:4.2f}"
            f"  {1e3 * one.expected_p99_s:5.0f} / {1e3 * one.measured_p99_s:5.0f} ms"
            f" = {one.expected_p99_s / one.measured_p99_s:4.2f}"
            f"  {one.expected_outputs:5.1f} / {one.measured_outputs:5.1f}"
            f" = {one.expected_outputs / one.measured_outputs:4.2f}"
        )
    if given.out:
        given.out.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
