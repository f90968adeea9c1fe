"""Pictures per second, and per CPU second of the server, with previews of every step, against the bare loop.

Server, clients and bare loop are processes of their own, so that the server's CPU does
not include the clients'. Only one of server and bare loop works at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from load_tests.bench import bare, processes
from load_tests.bench.processes import Child, Usage
from load_tests.bench.requests import Asked, closed_loop
from load_tests.bench.runner import Report, Target, median_by

PREVIEWS = ("linear", "tiny", "auto")
BAR, BAR_CLIENTS = 0.92, 16


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure: `num_pictures` pictures with each of `num_clients`."""

    models: Path = Path("models")
    num_clients: tuple[int, ...] = (1, 4, 16, 64)
    num_pictures: tuple[int, ...] = (6, 12, 32, 64)
    num_steps: int = 20
    rounds: int = 3


SMOKE = Plan(num_clients=(1, 2), num_pictures=(2, 4), num_steps=6, rounds=1)


def measure(plan: Plan) -> Report:
    """Measures rounds of the bare loop and of the server with linear and with decoder previews."""
    rows = []
    settings = {"models_dir": plan.models, "max_running_outputs": max(64, *plan.num_clients)}
    with (
        processes.child(processes.serve, settings) as server,
        processes.child(processes.obey) as clients,
        processes.child(bare.develop_on_request, plan.models) as loop,
    ):
        address = server.first()
        clients.first()
        loop.first()
        clients.ask(closed_loop, address, 2, 4, 2, "tiny")
        loop.ask(2, 4, 2)
        for num_clients, num_pictures in zip(plan.num_clients, plan.num_pictures, strict=True):
            for _ in range(plan.rounds):
                took: bare.Took = loop.ask(num_clients, num_pictures, plan.num_steps)
                rows.append(_row(num_clients, "bare", num_pictures, took, took, 0))
                for previews in PREVIEWS:
                    asked, own = _served(server, clients, address, num_clients, num_pictures, plan.num_steps, previews)
                    per_picture = asked.num_previews / num_pictures
                    rows.append(_row(num_clients, previews, num_pictures, own, took, per_picture))
    medians = median_by(rows, ("clients", "previews"))
    targets = [
        Target(
            f"{row['previews']} previews at {BAR_CLIENTS} clients, pictures per CPU second against the bare loop",
            float(row["of_bare_per_cpu_s"]),
            BAR,
        )
        for row in medians
        if row["clients"] == BAR_CLIENTS and row["previews"] == "linear"
    ]
    return Report("throughput", {"Pictures with previews of every step, against the bare loop": medians}, targets)


def _served(
    server: Child, clients: Child, address: str, num_clients: int, num_pictures: int, num_steps: int, previews: str
) -> tuple[Asked, bare.Took]:
    before: Usage = server.ask()
    asked: Asked = clients.ask(closed_loop, address, num_clients, num_pictures, num_steps, previews)
    after: Usage = server.ask()
    return asked, bare.Took(asked.wall_s, after.cpu_s - before.cpu_s)


def _row(
    num_clients: int,
    previews: str,
    num_pictures: int,
    took: bare.Took,
    bare_took: bare.Took,
    previews_per_picture: float,
) -> dict[str, float | int | str]:
    return {
        "clients": num_clients,
        "previews": previews,
        "pictures_per_s": num_pictures / took.wall_s,
        "pictures_per_cpu_s": num_pictures / took.cpu_s,
        "of_bare_per_s": bare_took.wall_s / took.wall_s,
        "of_bare_per_cpu_s": bare_took.cpu_s / took.cpu_s,
        "previews_per_picture": previews_per_picture,
    }
