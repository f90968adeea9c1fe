"""Builds clients/csharp with Debian's mono, on the libsafelight that `cpp` builds."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

from tools.clients import cpp
from tools.clients.commands import CLIENTS, OUT, once, run

SOURCE = CLIENTS / "csharp"
BUILD = OUT / "csharp"
ASSEMBLIES = ("System.Core", "System.Runtime.Serialization", "System.Xml", "System.Xml.Linq")


def is_here() -> bool:
    """Whether the machine has mcs, mono, the required assemblies, and the toolchain of libsafelight."""
    return (
        all(shutil.which(name) for name in ("mcs", "mono"))
        and all(Path(f"/usr/lib/mono/4.5/{name}.dll").exists() for name in ASSEMBLIES)
        and cpp.is_here()
    )


def compile_library(assembly: Path, *sources: Path, uses: Path | None = None) -> Path:
    """Compiles sources into an assembly."""
    # -doc checks the references in comments. Warnings 1573 and 1591 demand comments even where a name says enough.
    return _compile(assembly, "-target:library", f"-doc:{assembly}.xml", "-nowarn:1573,1591", *_used(uses), *sources)


def compile_program(program: Path, source: Path) -> Path:
    """Compiles a program of the client."""
    return _compile(program, *_used(build()), source)


def _used(assembly: Path | None) -> list[str]:
    return [f"-r:{assembly}"] if assembly else []


def _compile(assembly: Path, *arguments: str | Path) -> Path:
    """Compiles C# 7, with warnings as errors."""
    assembly.parent.mkdir(parents=True, exist_ok=True)
    references = [f"-r:{name}" for name in ASSEMBLIES]
    run("mcs", "-langversion:7", "-warn:4", "-warnaserror", f"-out:{assembly}", *references, *arguments)
    return assembly


@functools.cache
def build() -> Path:
    """Builds the client's assembly."""
    assembly = BUILD / "Safelight.dll"
    sources = sorted((SOURCE / "src").glob("*.cs"))
    once("csharp", assembly, [SOURCE / "src"], lambda: str(compile_library(assembly, *sources)))
    return assembly


@functools.cache
def runner() -> Path:
    """Builds the runner of the conformance suite."""
    program, source = BUILD / "conformance.exe", SOURCE / "conformance/Program.cs"
    once("csharp-runner", program, [SOURCE / "src", source], lambda: str(compile_program(program, source)))
    return program


def command(program: Path) -> list[str]:
    """The command line that runs a program in the folder of the client's assembly."""
    return ["env", f"LD_LIBRARY_PATH={cpp.build()}", "mono", str(program)]
