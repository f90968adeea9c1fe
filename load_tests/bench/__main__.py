"""The command behind `make bench`: measures the parts asked for, prints tables, writes out/bench/PART.json."""

from __future__ import annotations

import argparse
import functools
import importlib
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from safelight_server.telemetry import configure_logging

from load_tests.bench import runner

PARTS = (
    "throughput",
    "latency",
    "scheduler",
    "watchers",
    "clients",
    "loop",
    "triton",
    "merging",
    "kinds",
    "cheaper",
    "hits",
    "overhead",
    "eviction",
    "tiers",
    "scaling",
    "surge",
    "index",
    "similar",
    "replay",
)
"""Modules with `Plan` (all of it), `SMOKE` (a tiny plan) and `measure(plan)`."""
CALIBRATION = frozenset({"eviction", "index", "replay", "similar"})
"""Parts that the caches' constants were chosen by; they are in `load_tests.calibration`."""
LONG = frozenset({"index", "replay"})
"""Take most of an hour: measured only when named."""


def main() -> None:
    """Runs all parts, or those that are named."""
    parser = argparse.ArgumentParser(prog="load_tests", description=__doc__)
    parser.add_argument(
        "--only",
        type=parts,
        default=(),
        help=f"of {', '.join(PARTS)}, separated by commas; empty: all but the long ones",
    )
    parser.add_argument("--smoke", action="store_true", help="tiny plans, to see that all of it runs")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    options = parser.parse_args()
    console = Console(width=160)
    configure_logging("console", "error")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # servers end with their blocks
    names = chosen(options.only, smoke=options.smoke)
    console.print(f"Measured: {', '.join(names)}. How long that takes: docs/benchmarks.md")
    if not options.only and len(names) < len(PARTS):
        console.print(f"Left out, only by name: {', '.join(name for name in PARTS if name not in names)}")
    began = time.monotonic()
    for name in names:
        part = importlib.import_module(module_of(name))
        plan = part.SMOKE if options.smoke else part.Plan()
        runner.run(functools.partial(part.measure, plan), console, options.out)
    console.print(f"{len(names)} of {len(PARTS)} parts in {(time.monotonic() - began) / 60:.1f} minutes")


def module_of(part: str) -> str:
    """The module that measures a part."""
    return f"load_tests.{'calibration' if part in CALIBRATION else 'bench'}.{part}"


def parts(text: str) -> tuple[str, ...]:
    """The parts that a list names, separated by commas.

    Raises:
        ArgumentTypeError: one of them is none.
    """
    names = tuple(filter(None, text.split(",")))
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(PARTS)}")
    return names


def chosen(only: Sequence[str], *, smoke: bool) -> list[str]:
    """The parts to measure: those asked for, else all; the long ones then on tiny plans only."""
    return [name for name in PARTS if name in only or (not only and (smoke or name not in LONG))]


if __name__ == "__main__":
    main()
