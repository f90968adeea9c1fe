"""Tests of the C# client alone: its declarations of the C functions, and its test program."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from ctypes.util import find_library
from pathlib import Path

import numpy as np
import pytest
import safelight

from tests.clients.case import SIMULATED
from tests.clients.test_readmes import run
from tests.clients.toolchains import require
from tools.clients import cpp, csharp

TYPES = {
    "void": "void",
    "int32_t": "int",
    "uint32_t": "uint",
    "uint64_t": "ulong",
    "double": "double",
    "size_t": "UIntPtr",
    "void *": "IntPtr",
    "int32_t *": "out int",
    "size_t *": "out UIntPtr",
    "const uint8_t *": "IntPtr",
    "const safelight_error *": "IntPtr",
    "const safelight_image *": "IntPtr",
    "safelight_error **": "out ErrorHandle",
    "safelight_state": "State",
    "safelight_event_kind": "EventKind",
} | {
    f"{const}safelight_{name} *": f"{name.title()}Handle"
    for const in ("", "const ")
    for name in ("options", "client", "request", "generation", "event")
}
RAW_COPIES = {"safelight_image_copy_rgba8", "safelight_image_scale_rgba8"}
"""C functions that C# does not declare, since it copies an image's bytes into an array."""


def declared_in_c() -> set[str]:
    """The functions of the header, as C# declares them."""
    header = (cpp.SOURCE / "include/safelight.h").read_text()
    found = re.findall(r"^SAFELIGHT_API ([^(]*?)(\w+)\(([^)]*)\);", header, re.MULTILINE)
    return {f"{result_type(kind.strip(), name)} {name}({arguments(name, text)})" for kind, name, text in found}


def result_type(kind: str, name: str) -> str:
    if "_poll_" in name:
        return "PollResult"
    return {"const char *": "IntPtr", "char *": "TextHandle"}.get(kind) or TYPES[kind]


def arguments(function: str, text: str) -> str:
    if text == "void":
        return ""
    made = []
    for argument in re.split(r",\s*", text):
        kind, name = re.fullmatch(r"(.*?)(\w+)", argument, re.DOTALL).groups()  # type: ignore[union-attr]
        kind = kind.strip()
        free = function.endswith("_free")  # called by SafeHandle.ReleaseHandle with the pointer
        made.append(f"{'IntPtr' if free else {'const char *': 'byte[]'}.get(kind) or TYPES[kind]} {name}")
    return ", ".join(made)


def test_its_declarations_are_those_of_the_header() -> None:
    native = (csharp.SOURCE / "src/Native.cs").read_text().replace("@", "")
    declared = set(re.findall(r"static extern (.*?);", native))
    missing = {re.search(r"(\w+)\(", one)[1] for one in declared_in_c() - declared}  # type: ignore[index]
    assert declared <= declared_in_c()
    assert missing == RAW_COPIES


def test_its_numbers_are_those_of_the_header() -> None:
    header = (cpp.SOURCE / "include/safelight.h").read_text()
    source = "".join(path.read_text() for path in (csharp.SOURCE / "src").glob("*.cs"))
    [version] = re.findall(r"SAFELIGHT_ABI_VERSION (\w+)u", header)
    assert f"AbiVersion = {version};" in source
    for prefix, name in (("EVENT_", "EventKind"), ("STATE_", "State")):
        members = re.search(rf"enum {name}\s*{{(.*?)}}", source, re.DOTALL)
        assert members is not None
        expected = re.findall(rf"SAFELIGHT_{prefix}(\w+) = (\d+)", header)
        assert [(one.upper(), value) for one, value in re.findall(r"(\w+) = (\d+)", members[1])] == expected


@pytest.mark.timeout(600)
async def test_its_test_program(start, tmp_path: Path) -> None:
    require("csharp")
    source, program = csharp.SOURCE / "tests/ClientTest.cs", csharp.BUILD / "ClientTest.exe"
    await asyncio.to_thread(csharp.compile_program, program, source)
    async with start(**SIMULATED | {"simulated_base_ms": 10}) as running:
        said = await run(tmp_path, *csharp.command(program), running.address, "pixels")
        async with safelight.Client(running.address) as client:
            image = await client.generate("a red potion", steps=100, seed=7).picture()
    assert said == "ok\n"
    assert np.array_equal(
        np.frombuffer((tmp_path / "pixels").read_bytes(), np.uint8).reshape(128, 128, 4), image.array()
    )


@pytest.mark.skipif(find_library("safelight") is not None, reason="libsafelight is installed on this machine")
def test_a_missing_library_is_named(tmp_path: Path) -> None:
    require("csharp")
    source = tmp_path / "Alone.cs"
    source.write_text('class Alone { static void Main() { new Safelight.Client("localhost:1"); } }')
    alone = csharp.compile_program(tmp_path / "Alone.exe", source)
    shutil.copy(csharp.build(), tmp_path)
    done = subprocess.run(["mono", alone], capture_output=True, text=True)
    assert done.returncode == 1
    assert "DllNotFoundException: libsafelight, or a library that it needs, was not found" in done.stderr


def test_the_program_for_unity_compiles(tmp_path: Path) -> None:
    require("csharp")
    [program] = re.findall(
        r"```csharp\n(using[^`]*UnityEngine.*?)```", (csharp.SOURCE / "README.md").read_text(), re.DOTALL
    )
    (tmp_path / "Developing.cs").write_text(program)
    stand_in = Path(__file__).with_name("unity.cs")
    csharp.compile_library(tmp_path / "Developing.dll", tmp_path / "Developing.cs", stand_in, uses=csharp.build())
