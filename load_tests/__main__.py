"""The command behind `make bench`: measures the parts asked for, prints tables, writes out/bench/PART.json."""

from __future__ import annotations

import argparse
import functools
import importlib
import signal
import sys
from pathlib import Path

from rich.console import Console
from safelight_server.telemetry import configure_logging

from load_tests import runner

PARTS = (
    "throughput",
    "latency",
    "scheduler",
    "watchers",
    "loop",
    "triton",
    "merging",
    "hits",
    "overhead",
    "eviction",
    "tiers",
    "index",
    "replay",
)
"""Modules with `Plan` (all of it), `SMOKE` (a tiny plan) and `measure(plan)`."""
LONG = frozenset({"index", "replay"})
"""Take most of an hour: measured only when named."""


def main() -> None:
    """Runs all parts, or one."""
    parser = argparse.ArgumentParser(prog="load_tests", description=__doc__)
    parser.add_argument("--only", choices=("", *PARTS), default="", help="one part; empty: all but the long ones")
    parser.add_argument("--smoke", action="store_true", help="tiny plans, to see that all of it runs")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    options = parser.parse_args()
    console = Console(width=160)
    configure_logging("console", "error")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # servers end with their blocks
    for name in PARTS:
        if options.only == name or (not options.only and (options.smoke or name not in LONG)):
            part = importlib.import_module(f"load_tests.{name}")
            plan = part.SMOKE if options.smoke else part.Plan()
            runner.run(functools.partial(part.measure, plan), console, options.out)


if __name__ == "__main__":
    main()
