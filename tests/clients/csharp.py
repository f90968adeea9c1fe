"""Builds clients/csharp with Debian's mono, on the libsafelight that `cpp` builds."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest

from tests.clients import cpp
from tests.clients.case import ROOT

SOURCE = ROOT / "clients/csharp"
BUILD = ROOT / "out/csharp"
ASSEMBLIES = ("System.Core", "System.Runtime.Serialization", "System.Xml", "System.Xml.Linq")


def is_here() -> bool:
    """Whether the machine has mcs, mono, the assemblies that are needed, and the toolchain of libsafelight."""
    return (
        all(shutil.which(name) for name in ("mcs", "mono"))
        and all(Path(f"/usr/lib/mono/4.5/{name}.dll").exists() for name in ASSEMBLIES)
        and cpp.is_here()
    )


def require() -> None:
    """Skips the test where something is missing."""
    if not is_here():
        pytest.skip(
            "no mono-mcs, mono-runtime, libmono-system-runtime-serialization4.0-cil and libmono-system-xml-linq4.0-cil, "
            "or no C++ toolchain here (tools/install-system-packages cpp csharp)"
        )


def compile_(program: Path, *sources: Path, library: Path | None = None) -> Path:
    """Compiles C# 7, without warnings: a program with the library, or the library itself."""
    program.parent.mkdir(parents=True, exist_ok=True)
    kind = "-target:library" if library is None else f"-r:{library}"
    references = [f"-r:{name}" for name in ASSEMBLIES]
    cpp.run("mcs", "-langversion:7", "-warn:4", "-warnaserror", kind, *references, f"-out:{program}", *sources)
    return program


@functools.cache
def build() -> Path:
    """The client's assembly."""
    return compile_(BUILD / "Safelight.dll", *sorted((SOURCE / "src").glob("*.cs")))


@functools.cache
def runner() -> Path:
    """The runner of the conformance suite."""
    return compile_(BUILD / "conformance.exe", SOURCE / "conformance/Program.cs", library=build())


def command(program: Path) -> list[str]:
    """How to run a program that lies beside the client's assembly."""
    return ["env", f"LD_LIBRARY_PATH={cpp.build()}", "mono", str(program)]
