"""What a preview costs each language's client, how many a second it can receive, and how late its caller gets them.

Each client is the runner of its language (clients/CONFORMANCE.md), a process of its own. It notes when its caller gets
each preview of the only stream of `preview_source`, over gRPC or, like web pages, over gRPC-Web. CPU per preview is the
difference between a long and a short run, divided by the difference of their previews: this leaves out the start of the
process and most of the just-in-time compiler's work. A second table compares gRPC, gRPC-Web and server-sent events of a
real server.
"""

from __future__ import annotations

import json
import resource
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray
from safelight.v1 import generation_pb2 as pb

from load_tests.bench import preview_source, processes, transports
from load_tests.bench.processes import Child
from load_tests.bench.requests import PROMPT, RAW
from load_tests.bench.runner import Report, Row, median_by
from tools.clients import runners

CLIENTS = ("python", runners.SYNC, "go", "typescript", runners.WEB, "java", "rust", "cpp", "c", "csharp")
RUN_ENDS_S = 300.0
WARMED_UP = 0.2
"""Share of a run's previews that are warm-up; rates and lateness are measured on the others."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure.

    Attributes:
        sizes: edge of the previews in pixels, and number of previews in a short and a long run.
        paced: number of previews in the run that measures lateness, `per_s` a second.
        optimized: whether runners are built with optimization.
        about: how long the measurement takes once the runners are built.
    """

    clients: tuple[str, ...] = CLIENTS
    sizes: tuple[tuple[int, int, int], ...] = ((64, 1500, 9000), (256, 400, 2400))
    paced: int = 200
    per_s: int = 100
    rounds: int = 3
    optimized: bool = True
    about: str = "8 minutes on two cores that have nothing else to do"
    transports: transports.Plan = field(default_factory=transports.Plan)


SMOKE = Plan(
    clients=("python",),  # needs no compilation
    sizes=((64, 5, 25),),
    paced=10,
    rounds=1,
    optimized=False,
    about="seconds",
    transports=transports.Plan(num_pictures=2, step_ms=50.0, rounds=1, typescript=False),
)


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a runner: when previews were written and received, in microseconds, and the CPU of both processes."""

    written_us: NDArray[np.int64]
    received_us: NDArray[np.int64]
    client_cpu_s: float
    source_cpu_s: float


def measure(plan: Plan) -> Report:
    """Measures both tables."""
    here = [client for client in plan.clients if runners.is_here(client)]
    print(
        f"clients: builds {len(here)} runners, which takes up to 20 minutes where none is built; then {plan.about}",
        flush=True,
    )
    commands = {client: runners.runner(client, optimized=plan.optimized) for client in here}
    print(f"clients: all runners are built; measures from {datetime.now():%H:%M} on, for {plan.about}", flush=True)
    rows: list[Row] = []
    with processes.child(preview_source.serve) as source:
        grpc_address, web_address = source.first()
        for _ in range(plan.rounds):
            for size in plan.sizes:
                for client in here:
                    address = web_address if client == runners.WEB else grpc_address
                    rows.append(_row(plan, client, commands[client], source, address, size))
    missing = [client for client in plan.clients if client not in here]
    tables: dict[str, Sequence[Row]] = {
        "One stream of raw previews, by client": median_by(rows, ("client", "preview_kib")),
        "Pictures with three previews as JPEG, one after another": transports.rows(plan.transports),
    }
    notes = [f"left out, their toolchains are not on this machine: {', '.join(missing)}"] if missing else []
    return Report("clients", tables, notes=notes)


def _row(
    plan: Plan, client: str, command: Sequence[str], source: Child, address: str, size: tuple[int, int, int]
) -> Row:
    edge_px, few, many = size
    short = _run(command, source, address, _request(edge_px, few))
    long = _run(command, source, address, _request(edge_px, many))
    paced = _run(command, source, address, _request(edge_px, plan.paced, plan.per_s))
    received_us = long.received_us[int(WARMED_UP * len(long.received_us)) :]
    per_s = 1e6 * (len(received_us) - 1) / float(received_us[-1] - received_us[0])
    cpu_us = 1e6 * (long.client_cpu_s - short.client_cpu_s) / (many - few)
    return {
        "client": client,
        "preview_kib": 4 * edge_px * edge_px // 1024,
        "previews_per_s": per_s,
        "cpu_us_per_preview": cpu_us,
        "source_cpu_us_per_preview": 1e6 * (long.source_cpu_s - short.source_cpu_s) / (many - few),
        "cores": per_s * cpu_us / 1e6,
        "had": len(long.received_us) / many,
        "late_ms_p50": _late_ms(paced, 50),
        "late_ms_p99": _late_ms(paced, 99),
    }


def _late_ms(run: Run, percent: float) -> float:
    """A percentile of the previews' delay; NaN if previews were skipped, since it is not known which."""
    if len(run.received_us) != len(run.written_us):
        return float("nan")
    late_us = (run.received_us - run.written_us)[int(WARMED_UP * len(run.written_us)) :]
    return float(np.percentile(late_us, percent)) / 1e3


def _request(edge_px: int, num_previews: int, per_s: int = 0) -> pb.GenerateRequest:
    """A request for previews from the source, `per_s` a second; 0: as fast as they are read."""
    spec = pb.GenerationSpec(prompt=PROMPT, num_inference_steps=num_previews, outputs=[pb.OutputSpec(seed=1)])
    request = pb.GenerateRequest(spec=spec, encoding=RAW, preview=pb.PreviewPolicy(accept=[RAW], max_edge_px=edge_px))
    if per_s:
        request.preview.min_interval.FromMicroseconds(1_000_000 // per_s)
    return request


def _run(command: Sequence[str], source: Child, address: str, request: pb.GenerateRequest) -> Run:
    """Lets a runner watch one stream.

    Raises:
        RuntimeError: the runner failed, or got no previews.
    """
    told = runners.told("measure", [address], [json_format.MessageToDict(request)], measure=True)
    source.ask()  # its CPU counts from here on
    before_s = _cpu_of_children_s()
    done = subprocess.run(
        command, input=json.dumps(told), capture_output=True, text=True, timeout=RUN_ENDS_S, check=False
    )
    cpu_s = _cpu_of_children_s() - before_s
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr[-4000:]}")
    [seen] = json.loads(done.stdout)["generations"]
    written_us, source_cpu_s = source.ask()
    run = Run(np.array(written_us), np.array(seen["received_us"]), cpu_s, source_cpu_s)
    if seen["code"] != "OK" or not 1 < len(run.received_us) <= len(run.written_us):
        raise RuntimeError(
            f"{' '.join(command)}: {len(run.received_us)} of {len(run.written_us)} previews; {seen['code']}"
        )
    return run


def _cpu_of_children_s() -> float:
    """CPU time of the processes that have ended, with all their threads."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
