"""The command behind `make bench`: measures the requested parts, prints tables, and writes out/bench/PART.json."""

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
"""Parts from which the caches' constants were chosen; they are in `load_tests.calibration`."""
LONG = frozenset({"index", "replay"})
"""Parts that take most of an hour; they are measured only when named."""


def main() -> None:
    """Runs the parts that the command line names, or all."""
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
    """Imports the module that measures a part."""
    return f"load_tests.{'calibration' if part in CALIBRATION else 'bench'}.{part}"


def parts(text: str) -> tuple[str, ...]:
    """Parses a list of parts, separated by commas.

    Raises:
        ArgumentTypeError: there is no part of such a name.
    """
    names = tuple(filter(None, text.split(",")))
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(PARTS)}")
    return names


def chosen(only: Sequence[str], *, smoke: bool) -> list[str]:
    """The parts to measure: those requested, else all, without the long ones unless their plans are tiny."""
    return [name for name in PARTS if name in only or (not only and (smoke or name not in LONG))]


if __name__ == "__main__":
    main()
