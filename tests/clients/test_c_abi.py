"""Tests of the C client, `libsafelight`: its exports, and its test program with and without sanitizers."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import safelight

from tests.clients.case import SIMULATED
from tests.clients.toolchains import require
from tools.clients import cpp
from tools.clients.commands import run

SANITIZERS = {
    "plain": ("", {}),
    "address": ("address,undefined", {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}),
    # Debian's gRPC is not built for ThreadSanitizer, so only reports with frames of this client count.
    "thread": ("thread", {"TSAN_OPTIONS": f"suppressions={cpp.SOURCE / 'tests/tsan.supp'} halt_on_error=0"}),
}


def test_it_exports_its_functions_and_nothing_else() -> None:
    require("cpp")
    symbols = run("nm", "-D", "--defined-only", cpp.build() / "libsafelight.so")
    exported = {line.split()[2].partition("@")[0] for line in symbols.splitlines()}
    header = (cpp.SOURCE / "include/safelight.h").read_text()
    declared = set(re.findall(r"^SAFELIGHT_API [^(]*?(\w+)\(", header, re.MULTILINE))
    assert len(declared) > 50
    assert exported == declared | {"SAFELIGHT_1"}, "the name of the version script's only version"


def test_the_header_is_c99_and_cpp(tmp_path: Path) -> None:
    require("cpp")
    (tmp_path / "main.c").write_text("#include <safelight.h>\nint main(void) { return 0; }\n")
    strict = ("-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-I", cpp.SOURCE / "include")
    run("cc", "-std=c99", *strict, tmp_path / "main.c")
    run("c++", "-std=c++17", *strict, "-x", "c++", tmp_path / "main.c")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("sanitizers", SANITIZERS)
async def test_its_test_program(sanitizers: str, start, tmp_path: Path) -> None:
    require("cpp")
    flags, environment = SANITIZERS[sanitizers]
    built = await asyncio.to_thread(cpp.build, flags)
    async with start(**SIMULATED | {"simulated_base_ms": 10}) as running:
        done = await asyncio.to_thread(
            subprocess.run,
            [built / "c_test", running.address, tmp_path / "pixels"],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
        async with safelight.Client(running.address) as client:
            image = await client.generate("a red potion", steps=40, seed=7).picture()
    assert done.returncode == 0, done.stderr[-8000:]
    assert "Sanitizer" not in done.stderr, done.stderr[-8000:]
    assert done.stdout == "ok\n"
    assert np.array_equal(
        np.frombuffer((tmp_path / "pixels").read_bytes(), np.uint8).reshape(128, 128, 4), image.array()
    )
