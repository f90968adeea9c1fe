"""Runs ghz's scenarios against a running server, or one that it starts, and prints one table: `make ghz`.

Each scenario is a configuration file of ghz in this folder, which also works with ghz alone. Two tags are read here:
`expect` lists the statuses that a call may end with, and `read-bytes-per-second` says how fast each connection is read.
Exits with 1 if a call ended with a status that its scenario does not expect, or if no call ended.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from load_tests.bench import processes
from load_tests.ghz.slow_reader import slow_reader

FOLDER = Path(__file__).parent
GHZ = FOLDER.parents[1] / ".tools/ghz"
SCENARIOS = ("steady", "ramp", "burst", "recovery", "slow-readers", "cancel-storm", "idempotent-retries")
"""The scenarios in the order in which they run: `recovery` has the rate of `steady`, after the calls of `burst`."""
DURATIONS = ("duration", "load-step-duration", "load-max-duration")
RUNTIMES = ("onnx", "simulated")
"""The scenarios that need no other machine."""
RATES = ("rps", "load-start", "load-step", "load-end")
PERCENTILES = (50, 95, 99)
REFUSED, TOO_LATE, CANCELLED = "ResourceExhausted", "DeadlineExceeded", "Canceled"


@dataclass(frozen=True, slots=True)
class Access:
    """How to reach the server.

    Attributes:
        target: HOST:PORT.
        api_key: the API key that each call sends; None: no key.
        ca_file: file of the server's certificate authority, as PEM; None: no TLS.
        server_name: the name in the server's certificate.
    """

    target: str
    api_key: str | None
    ca_file: Path | None
    server_name: str


def scaled(config: Mapping[str, Any], *, time_scale: float, rate_scale: float) -> dict[str, Any]:
    """The configuration with all its durations and rates multiplied; a rate is at least one a second."""
    changed: dict[str, Any] = dict(config)
    for name in DURATIONS:
        if name in config:
            seconds = float(re.fullmatch(r"([\d.]+)s", config[name])[1])  # type: ignore[index]  # ours are all in seconds
            changed[name] = f"{seconds * time_scale:.3f}s"
    for name in RATES:
        if name in config:
            changed[name] = max(1, round(config[name] * rate_scale))
    return changed


def unexpected(report: Mapping[str, Any]) -> list[str]:
    """Faults in a report of ghz: statuses that its scenario does not expect, or no calls at all."""
    expected = report["tags"]["expect"].split(",")
    statuses = report["statusCodeDistribution"]
    wrong = [f"{count} calls ended with {status}" for status, count in statuses.items() if status not in expected]
    return [f"{report['name']}: {what}" for what in (wrong if statuses else ["no call has ended"])]


def table(reports: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each report; latencies are of calls that ended OK, in `cancel-storm` of all."""
    made = Table(title="Generate, from the call to its end")
    made.add_column("scenario")
    for column in (
        "calls",
        "calls/s",
        "OK",
        "refused",
        "too late",
        "cancelled",
        "other",
        *(f"p{at} ms" for at in PERCENTILES),
    ):
        made.add_column(column, justify="right")
    for report in reports:
        statuses = dict(report["statusCodeDistribution"])
        named = [statuses.pop(status, 0) for status in ("OK", REFUSED, TOO_LATE, CANCELLED)]
        latencies = {entry["percentage"]: entry["latency"] for entry in report["latencyDistribution"] or ()}
        shown = [f"{latencies[at] / 1e6:.0f}" if latencies.get(at) else "" for at in PERCENTILES]
        counts = [str(count) for count in (*named, sum(statuses.values()))]
        made.add_row(report["name"], str(report["count"]), f"{report['rps']:.1f}", *counts, *shown)
    return made


async def run(scenario: str, access: Access, *, time_scale: float, rate_scale: float) -> dict[str, Any]:
    """Runs one scenario and returns ghz's report.

    Raises:
        SystemExit: ghz failed; the message has its output.
    """
    config = scaled(json.loads((FOLDER / f"{scenario}.json").read_text()), time_scale=time_scale, rate_scale=rate_scale)
    if access.ca_file is None:
        config["insecure"] = True
    else:
        config["cacert"] = str(access.ca_file)
        config["cname"] = access.server_name
    if access.api_key:
        config["metadata"] = {"authorization": f"Bearer {access.api_key}"}
    async with contextlib.AsyncExitStack() as stack:
        config["host"] = access.target
        if (rate := config["tags"].get("read-bytes-per-second")) is not None:
            config["host"] = await stack.enter_async_context(slow_reader(access.target, float(rate)))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="safelight-ghz-")))
        (folder / "config.json").write_text(json.dumps(config))  # only this user can read it: it may contain the key
        process = await asyncio.create_subprocess_exec(
            GHZ, "--config", folder / "config.json", "--format", "json",
            env=os.environ | {"GHZ_RUN": str(int(time.time()))},  # other request ids in each run
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            out, err = await process.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    if process.returncode:
        sys.exit(f"{scenario}: ghz failed: {err.decode().strip()}")
    report: dict[str, Any] = json.loads(out)
    return report


async def main(access: Access, scenarios: Sequence[str], time_scale: float, rate_scale: float, out: Path) -> int:
    """Runs the scenarios in turn, writes each report, and prints the table; returns 1 if something was not expected."""
    console, reports = Console(width=120), []
    for scenario in scenarios:
        report = await run(scenario, access, time_scale=time_scale, rate_scale=rate_scale)
        _write(report, out / f"{scenario}.json")
        reports.append(report)
    console.print(table(reports))
    wrong = [line for report in reports for line in unexpected(report)]
    for line in wrong:
        console.print(line)
    return 1 if wrong else 0


def _write(report: dict[str, Any], file: Path) -> None:
    report["options"].pop("metadata", None)  # a report must not contain the key
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1))


@contextlib.contextmanager
def serving(runtime: str) -> Iterator[str]:
    """Runs a server of a runtime in a process of its own during the block; yields its address."""
    with processes.child(processes.serve, {"runtime": runtime}) as server:
        yield server.first()


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m load_tests.ghz.run", description=__doc__.splitlines()[0])
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--target", default="127.0.0.1:8421", help="address of the server")
    where.add_argument("--serve", choices=RUNTIMES, help="start a server of this runtime, on this machine, and ask it")
    parser.add_argument("--api-key", default=os.environ.get("SAFELIGHT_API_KEY"), help="or SAFELIGHT_API_KEY")
    parser.add_argument("--ca-file", type=Path, help="PEM of the server's certificate authority; enables TLS")
    parser.add_argument("--server-name", help="in the certificate, if it is not the target's")
    parser.add_argument("--only", default=",".join(SCENARIOS), help="scenarios, with commas; default: %(default)s")
    parser.add_argument(
        "--time-scale", type=float, default=1.0, help="multiplies all durations; all take 8 minutes at 1"
    )
    parser.add_argument("--rate-scale", type=float, default=1.0, help="multiplies all rates; steady is 2 a second at 1")
    parser.add_argument(
        "--out", type=Path, default=Path("out/ghz"), help="folder for ghz's reports, default: %(default)s"
    )
    parsed = parser.parse_args(given)
    parsed.server_name = parsed.server_name or parsed.target.rsplit(":", 1)[0]
    parsed.only = parsed.only.split(",")
    if unknown := sorted(set(parsed.only) - set(SCENARIOS)):
        parser.error(f"--only: there is no scenario {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    if parsed.time_scale <= 0 or parsed.rate_scale <= 0:
        parser.error("--time-scale and --rate-scale must be above 0")
    if not GHZ.exists():
        parser.error(f"{GHZ} is not there: make tools")
    return parsed


if __name__ == "__main__":
    chosen = arguments()
    with serving(chosen.serve) if chosen.serve else contextlib.nullcontext(chosen.target) as address:
        reached = Access(address, chosen.api_key, chosen.ca_file, chosen.server_name)
        ended = asyncio.run(main(reached, chosen.only, chosen.time_scale, chosen.rate_scale, chosen.out))
    sys.exit(ended)
