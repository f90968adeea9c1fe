"""How many cores this process may use, and which instructions they have."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path


def num_cores(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores this process may use: its CPU affinity, or its cgroup's CPU quota if that is less."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = cpu_max.read_text().split()
    except OSError:
        return cores
    return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))


def instruction_set() -> str:
    """The architecture and its widest vector instructions, such as "x86_64-avx512_vnni": kernels are chosen by them."""
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return platform.machine()
    best = [name for name in ("avx512_bf16", "avx512_vnni", "avx512f", "avx2", "asimd") if name in flags]
    return "-".join([platform.machine(), *best[:1]])
