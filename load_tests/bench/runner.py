"""Reports of the benchmarks: tables, targets and machine facts, printed and written as JSON.

Figures of one table come from one run, in interleaved rounds, so that other load
on the machine affects all of them alike. Tables have medians over rounds, and
ratios.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

Row = Mapping[str, float | int | str]
PACKAGES = ("grpcio", "numpy", "onnxruntime", "uvloop", "litserve", "torch", "diffusers")


@dataclass(frozen=True, slots=True)
class Target:
    """A figure that must be at least `bar`, the target."""

    what: str
    figure: float
    bar: float

    @property
    def is_met(self) -> bool:
        """Whether the figure reaches the target."""
        return self.figure >= self.bar


@dataclass(frozen=True, slots=True)
class Report:
    """Results of one part.

    Attributes:
        tables: rows by title; rows of one table have the same columns.
        notes: remarks on this run, such as a choice that it made.
    """

    name: str
    tables: Mapping[str, Sequence[Row]]
    targets: Sequence[Target] = ()
    notes: Sequence[str] = field(default=())


def run(measure: Callable[[], Report], console: Console, out: Path) -> Report:
    """Measures one part, prints its report, and writes `out/NAME.json`."""
    began, load_before = datetime.now(UTC), os.getloadavg()
    report = measure()
    machine = facts() | {
        "began": began.isoformat(timespec="seconds"),
        "seconds": round((datetime.now(UTC) - began).total_seconds(), 1),
        "load_before": load_before,
        "load_after": os.getloadavg(),
    }
    _print(report, machine, console)
    out.mkdir(parents=True, exist_ok=True)
    targets = [asdict(target) | {"is_met": target.is_met} for target in report.targets]
    content = {"machine": machine, "tables": report.tables, "targets": targets, "notes": report.notes}
    (out / f"{report.name}.json").write_text(json.dumps(content, indent=1))
    return report


def facts() -> dict[str, object]:
    """Describes the machine, and the versions of the software that is measured."""
    return {
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def median_by(rows: Iterable[Row], keys: Sequence[str]) -> list[dict[str, float | int | str]]:
    """One row for each combination of `keys`, in order of appearance, with the medians of the other columns."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        {
            name: value if name in keys else statistics.median(float(row[name]) for row in group)
            for name, value in group[0].items()
        }
        for group in groups.values()
    ]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _print(report: Report, machine: Mapping[str, object], console: Console) -> None:
    for title, rows in report.tables.items():
        table = Table(title=title, title_justify="left")
        for name in rows[0]:
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(*(_shown(value) for value in row.values()))
        console.print(table)
    for target in report.targets:
        verdict = "met" if target.is_met else "BELOW"
        console.print(f"{verdict}: {target.what}: {target.figure:.3f}, target at least {target.bar:g}")
    for note in report.notes:
        console.print(note)
    loads = [", ".join(f"{load:.2f}" for load in machine[name]) for name in ("load_before", "load_after")]  # type: ignore[attr-defined]
    console.print(
        f"{machine['cores']} cores; load average before {loads[0]}, after {loads[1]}; {machine['seconds']} s\n"
    )


def _shown(value: float | int | str) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"
