"""How much memory is available and how many rows of a call fit, so that neither a load nor a batch exhausts it."""

from __future__ import annotations

from pathlib import Path

import structlog

from safelight_server.catalog.catalog import DATA_FILE
from safelight_server.runtime.base import RuntimeStartError

log = structlog.get_logger(__name__)

LOAD_FACTOR = 3
"""Memory that loading takes, as a multiple of the file's size: the file itself, and its float16 as float32."""
CALL_SHARE = 0.8
"""Share of the available memory that calls may take; the rest is for latents, pictures and caches."""


def available_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Memory that this process can still take: the machine's, or its cgroup's if that is less; None if unknown."""
    found = []
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        found.append(int(lines["MemAvailable"].split()[0]) << 10)
    except (OSError, KeyError, ValueError):
        pass
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
        files = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        if limit != "max":
            found.append(int(limit) - int(used) + int(files.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass
    return max(0, min(found)) if found else None


def check_load(file: Path, available: int | None = None) -> None:
    """Refuses a model whose weights do not fit.

    Raises:
        RuntimeStartError: they do not fit; the message has the arithmetic.
    """
    available = available_bytes() if available is None else available
    data = file.with_name(DATA_FILE)
    size = file.stat().st_size + (data.stat().st_size if data.is_file() else 0)
    if available is not None and LOAD_FACTOR * size > available:
        raise RuntimeStartError(
            f"loading takes {_mib(LOAD_FACTOR * size)} ({LOAD_FACTOR} x {_mib(size)} of weights),"
            f" and {_mib(available)} are free"
        )


def bound_rows(max_rows: int, row_bytes: int, num_instances: int, available: int | None = None) -> int:
    """The largest batch, at most `max_rows`, that all instances can run at once.

    Args:
        row_bytes: memory of a row; 0: it was not measured.

    Raises:
        RuntimeStartError: not even one row fits; the message has the arithmetic.
    """
    available = available_bytes() if available is None else available
    if not row_bytes or available is None:
        return max_rows
    free = int(CALL_SHARE * available)
    fitting = free // (num_instances * row_bytes)
    arithmetic = f"{num_instances} instances x {_mib(row_bytes)} a row, and {_mib(free)} are free for calls"
    if fitting < 1:
        raise RuntimeStartError(f"a row does not fit: {arithmetic}")
    if fitting < max_rows:
        log.warning("batches_bounded_by_memory", rows=fitting, of=max_rows, why=arithmetic)
    return min(max_rows, fitting)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"
