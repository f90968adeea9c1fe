"""Runs the programs of the clients' READMEs."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.case import ROOT
from tests.clients.toolchains import require
from tools.clients import commands, cpp, java, rust

ADDRESS = "127.0.0.1:8421"


def programs(language: str, fence: str) -> list[str]:
    """The complete programs in a client's README; other examples are fragments."""
    found = re.findall(rf"```{fence}\n(.*?)```", (ROOT / f"clients/{language}/README.md").read_text(), re.DOTALL)
    return [program for program in found if ADDRESS in program]


async def run(folder: Path, *command: str, **environment: str) -> str:
    """Runs a command in `folder` and returns its output."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env=os.environ | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()
    return said.decode()


async def test_python(start, tmp_path: Path) -> None:
    asynchronous, synchronous = programs("python", "python")
    async with start() as running:
        said = await run(tmp_path, sys.executable, "-c", asynchronous.replace(ADDRESS, running.address))
        assert re.match(r"step \d+: \d+ bytes\n", said)
        assert (tmp_path / "potion.png").read_bytes().startswith(b"\x89PNG")
        said = await run(tmp_path, sys.executable, "-c", synchronous.replace(ADDRESS, running.address))
    size, accepted, *_, finished = said.split("\n")[:-1]
    assert (size, accepted, finished) == ("(128, 128)", "Accepted", "Finished")


@pytest.mark.timeout(180)
async def test_go(start, tmp_path: Path) -> None:
    require("go")
    [program] = programs("go", "go")
    source, binary = tmp_path / "main.go", tmp_path / "program"
    async with start() as running:
        source.write_text(program.replace(ADDRESS, running.address))
        await run(ROOT / "clients/go", "go", "build", "-o", str(binary), str(source))
        said = await run(tmp_path, str(binary))
    assert re.match(r"step \d+: \d+ bytes of image/jpeg\n", said)
    assert (tmp_path / "potion.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ and the C client, installed into an empty folder."""
    require("cpp")
    prefix = tmp_path_factory.mktemp("cpp") / "installed"
    commands.run("cmake", "--install", cpp.build(), "--prefix", prefix)
    return prefix


def libraries(prefix: Path) -> str:
    return str(next(prefix.rglob("libsafelight.so")).parent)


def pkg_config(prefix: Path, package: str) -> list[str]:
    search = os.environ | {"PKG_CONFIG_PATH": str(next(prefix.rglob("pkgconfig")))}
    command = ["pkg-config", f"--define-variable=prefix={prefix}", "--cflags", "--libs", package]
    return subprocess.run(command, env=search, check=True, capture_output=True, text=True).stdout.split()


@pytest.mark.timeout(400)
async def test_cpp(start, installed: Path, tmp_path: Path) -> None:
    [program] = programs("cpp", "cpp")
    [lines] = re.findall(r"```cmake\n(.*?)```", (ROOT / "clients/cpp/README.md").read_text(), re.DOTALL)
    async with start() as running:
        (tmp_path / "main.cc").write_text(program.replace(ADDRESS, running.address))
        (tmp_path / "CMakeLists.txt").write_text(
            "cmake_minimum_required(VERSION 3.18)\nproject(stranger CXX)\nadd_executable(program main.cc)\n" + lines
        )
        await run(tmp_path, "cmake", "-S", ".", "-B", "build", f"-DCMAKE_PREFIX_PATH={installed}")
        await run(tmp_path, "cmake", "--build", "build")
        said = await run(tmp_path, "build/program")
    assert re.match(r"step \d+: \d+ bytes of image/jpeg\n", said)
    assert (tmp_path / "potion.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.timeout(400)
async def test_c(start, installed: Path, tmp_path: Path) -> None:
    [program] = programs("cpp", "c")
    options = pkg_config(installed, "safelight")
    async with start() as running:
        (tmp_path / "main.c").write_text(program.replace(ADDRESS, running.address))
        await run(tmp_path, "cc", "-std=c99", "-pedantic", "-Wall", "-Werror", "main.c", "-o", "program", *options)
        said = await run(tmp_path, "./program", LD_LIBRARY_PATH=libraries(installed))
    assert re.match(r"step \d+: \d+ x \d+ pixels to upload\n", said)


@pytest.mark.timeout(400)
async def test_csharp(start, tmp_path: Path) -> None:
    """Runs the README's commands and programs."""
    require("csharp")
    (tmp_path / "build").symlink_to(await asyncio.to_thread(cpp.build))
    (tmp_path / "clients").symlink_to(ROOT / "clients")
    [program] = programs("csharp", "csharp")
    text = (ROOT / "clients/csharp/README.md").read_text()
    commands = re.findall(r"^    ((?:mcs|LD_LIBRARY_PATH=).*)", text, re.MULTILINE)
    async with start() as running:
        (tmp_path / "Potion.cs").write_text(program.replace(ADDRESS, running.address))
        said = [await run(tmp_path, "bash", "-c", command) for command in commands]
    assert len(commands) == 3
    assert re.match(r"step \d+: \d+ bytes of application/x-raw-rgba8\n", said[-1])
    assert (tmp_path / "potion.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.timeout(400)
async def test_the_cpp_client_passes_its_own_tests(tmp_path: Path) -> None:
    require("cpp")
    assert await run(tmp_path, str(cpp.build() / "client_test")) == "ok\n"


@pytest.mark.timeout(400)
async def test_cpp_by_pkg_config(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "main.cc").write_text(
        '#include <safelight/client.h>\nint main() { safelight::Client client("a:1"); }\n'
    )
    options = pkg_config(installed, "safelight-cpp")
    await run(tmp_path, "c++", "-std=c++17", "main.cc", "-o", "program", *options)
    await run(tmp_path, "./program", LD_LIBRARY_PATH=libraries(installed))


async def test_the_go_client_is_formatted_and_vetted() -> None:
    require("go")
    module = ROOT / "clients/go"
    assert await run(module, "gofmt", "-l", ".") == ""
    await run(module, "go", "vet", "./...")
    await run(module, "go", "mod", "verify")
    await run(module, "go", "test", "./...")


@pytest.mark.timeout(300)
async def test_rust(start, runners, tmp_path: Path) -> None:
    runners("rust")
    [program] = programs("rust", "rust,no_run")
    async with start() as running:
        built = await asyncio.to_thread(rust.build_program, tmp_path, program.replace(ADDRESS, running.address))
        said = await run(tmp_path, str(built))
    assert re.match(r"step \d+: \d+ bytes\n", said)
    assert (tmp_path / "potion.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.timeout(180)
async def test_typescript(start, runners, tmp_path: Path) -> None:
    runners("typescript")
    [program] = programs("typescript", "js")
    installed = tmp_path / "node_modules/@safelight/client"
    installed.parent.mkdir(parents=True)
    installed.symlink_to(ROOT / "clients/typescript")
    async with start() as running:
        (tmp_path / "program.mjs").write_text(program.replace(ADDRESS, running.address))
        said = await run(tmp_path, "node", "program.mjs")
    assert re.match(r"step \d+: \d+ bytes of image/jpeg\n", said)
    assert (tmp_path / "potion.png").read_bytes().startswith(b"\x89PNG")


async def test_the_typescript_client_passes_its_own_tests(runners) -> None:
    runners("typescript")
    await run(ROOT / "clients/typescript", "node", "--test", "dist/client.test.js")


def test_the_typescript_client_for_pages_imports_nothing_of_node(runners) -> None:
    runners("typescript")
    modules = [ROOT / "clients/typescript/dist/web.js"]
    packages = set()
    for module in modules:
        for name in re.findall(r'^(?:import|export)\b[^;]*?\bfrom "([^"]+)";', module.read_text(), re.MULTILINE):
            if not name.startswith("."):
                packages.add(name)
            elif (imported := (module.parent / name).resolve()) not in modules:
                modules.append(imported)
    assert len(modules) > 8
    assert {name for name in packages if not name.startswith("@bufbuild/protobuf")} == {
        "@connectrpc/connect",
        "@connectrpc/connect-web",
        "@noble/hashes/sha2.js",
    }


@pytest.mark.timeout(400)
def test_the_java_client_builds_without_warnings_and_passes_its_own_tests() -> None:
    require("java")
    said = java.build()
    assert "[WARNING]" not in said
    assert re.search(r"Tests run: [1-9]\d*, Failures: 0, Errors: 0, Skipped: 0", said)
    made = {re.sub(r"[\d.]+\d", "VERSION", file.stem) for file in java.TARGET.glob("*.jar")}
    assert made == {f"safelight-client-VERSION{kind}" for kind in ("", "-sources", "-javadoc")}


@pytest.mark.timeout(400)
async def test_java(start, tmp_path: Path) -> None:
    require("java")
    await asyncio.to_thread(java.build)
    [program] = programs("java", "java")
    async with start() as running:
        source = tmp_path / "Potion.java"
        source.write_text(program.replace(ADDRESS, running.address))
        said = await run(tmp_path, *java.command(str(source), *java.SHORT_LIVED))
    assert re.match(r"step \d+: \d+ bytes of image/jpeg\n", said)
    assert (tmp_path / "potion.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.timeout(400)
async def test_kotlin(start, tmp_path: Path) -> None:
    require("java")
    await asyncio.to_thread(java.build)
    assert programs("java", "kotlin") == [(java.SOURCE / "src/test/kotlin/Potion.kt").read_text()]
    async with start() as running:
        said = await run(tmp_path, *java.command("PotionKt", *java.SHORT_LIVED), running.address)
    assert re.match(r"step \d+: \d+ bytes of image/jpeg\n", said)
    assert (tmp_path / "potion.png").read_bytes().startswith(b"\x89PNG")
