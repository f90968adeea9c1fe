"""Time to first pixel and to the picture under Poisson arrivals: Safelight and servers that return only the picture.

Each server is loaded at shares of its own measured capacity, and all at the
same share of the slowest server's capacity. All servers run all the time; a peer
without load is stopped (`Peer.awake`). The clients are one process. A peer sends
no previews, so its first pixel is that of its picture.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from load_tests.bench import processes
from load_tests.bench.arrivals import Latencies
from load_tests.bench.peers import ask, start
from load_tests.bench.processes import Child
from load_tests.bench.runner import Report, Row, Target

PEERS = ("litserve", "diffusers")
OWN, COMMON = "of its own", "of the slowest"
COMMON_SHARE = BAR_SHARE = 0.7
BAR = 5.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure: `rounds` x (shares + 1) x servers x `seconds`, and `capacity_s` for each server.

    Attributes:
        num_clients: clients of the closed loop that measures capacity.
    """

    models: Path = Path("models")
    peers: tuple[str, ...] = PEERS
    shares: tuple[float, ...] = (0.5, 0.7, 0.9)
    num_steps: int = 20
    num_clients: int = 16
    capacity_s: float = 10.0
    rounds: int = 2
    seconds: float = 13.0


SMOKE = Plan(shares=(0.7,), num_steps=2, num_clients=2, capacity_s=0.5, rounds=1, seconds=0.5)


@dataclass(frozen=True, slots=True)
class Server:
    """A running server that is measured."""

    name: str
    kind: str
    address: str
    awake: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext


@dataclass(frozen=True, slots=True)
class Load:
    """Arrivals per second, and what share of which capacity that is."""

    share: float
    of: str
    rate: float


def measure(plan: Plan) -> Report:
    """Measures capacities, then rounds over loads and servers."""
    with _servers(plan) as servers, processes.child(processes.obey) as clients:
        clients.first()
        capacities = {server: _capacity(clients, server, plan) for server in servers}
        chosen, notes = _choose(capacities)
        slowest = min(chosen.values())
        loads = [(server, Load(share, OWN, share * chosen[server])) for share in plan.shares for server in chosen]
        loads += [(server, Load(COMMON_SHARE, COMMON, COMMON_SHARE * slowest)) for server in chosen]
        seen: dict[tuple[Server, Load], list[Latencies]] = defaultdict(list)
        for round_number in range(plan.rounds):
            for server, load in loads:
                arguments = server.kind, server.address, plan.num_steps, load.rate, plan.seconds, round_number
                with server.awake():
                    seen[server, load].append(clients.ask(ask.poisson, *arguments))
    rows = [_row(server, load, latencies) for (server, load), latencies in seen.items()]
    tables: dict[str, Sequence[Row]] = {
        f"Capacity, {plan.num_clients} clients": [
            {"server": server.name, "pictures_per_s": rate} for server, rate in capacities.items()
        ],
        "Latency under Poisson arrivals, from when each was due": rows,
    }
    return Report("latency", tables, _targets(rows), notes)


@contextlib.contextmanager
def _servers(plan: Plan) -> Iterator[list[Server]]:
    """Starts Safelight and the peers; LitServe in two configurations, of which the better one is used."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        safelight = stack.enter_context(processes.child(processes.serve, {"models_dir": plan.models}))
        servers = [Server("safelight", "safelight", safelight.first())]
        if "litserve" in plan.peers:
            for workers, threads in dict.fromkeys(((cores, 1), (1, cores))):
                peer = stack.enter_context(start.litserve(plan.models, workers, threads))
                name = f"litserve, workers x threads: {workers} x {threads}"
                servers.append(Server(name, "litserve", peer.address, peer.awake))
        if "diffusers" in plan.peers:
            peer = stack.enter_context(start.diffusers())
            servers.append(Server("diffusers", "diffusers", peer.address, peer.awake))
        yield servers


def _capacity(clients: Child, server: Server, plan: Plan) -> float:
    arguments = server.kind, server.address, plan.num_steps, plan.num_clients, plan.capacity_s
    with server.awake():
        rate: float = clients.ask(ask.capacity, *arguments)
    return rate


def _choose(capacities: Mapping[Server, float]) -> tuple[dict[Server, float], list[str]]:
    """Chooses the best configuration of each kind of server."""
    best: dict[str, Server] = {}
    for server in sorted(capacities, key=capacities.__getitem__):
        best[server.kind] = server
    chosen = {server: rate for server, rate in capacities.items() if best[server.kind] is server}
    notes = [f"left out, slower: {server.name}" for server in capacities if server not in chosen]
    return chosen, notes


def _row(server: Server, load: Load, latencies: Sequence[Latencies]) -> Row:
    first = [s for latency in latencies for s in latency.first_pixel_s]
    picture = [s for latency in latencies for s in latency.picture_s]
    return {
        "server": server.kind,
        "load": f"{100 * load.share:.0f} % {load.of}",
        "arrivals_per_s": load.rate,
        "pictures": len(picture),
        "failed": sum(latency.num_failed for latency in latencies),
        "first_pixel_ms_p50": _percentile_ms(first, 50),
        "first_pixel_ms_p99": _percentile_ms(first, 99),
        "picture_ms_p50": _percentile_ms(picture, 50),
        "picture_ms_p99": _percentile_ms(picture, 99),
    }


def _percentile_ms(seconds: Sequence[float], percent: float) -> float:
    return 1e3 * float(np.percentile(seconds, percent)) if seconds else float("nan")


def _targets(rows: Sequence[Row]) -> list[Target]:
    """By what factor Safelight's first pixel comes sooner than each peer's, at equal loads."""
    p99 = {(row["load"], row["server"]): float(row["first_pixel_ms_p99"]) for row in rows}
    return [
        Target(f"first pixel p99 of {server} by that of safelight at {load}", value / p99[load, "safelight"], BAR)
        for (load, server), value in p99.items()
        if server != "safelight" and str(load).startswith(f"{100 * BAR_SHARE:.0f} %")
    ]
