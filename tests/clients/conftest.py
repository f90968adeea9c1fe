"""The runners of all languages, each built once."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients import cpp, csharp
from tests.clients.case import ROOT

CLIENTS = ROOT / "clients"
WEB = "typescript-web"
"""The TypeScript client for pages, run by Node."""
LANGUAGES = ("python", "go", "typescript", WEB, "java", "rust", "cpp", "c", "csharp")
TSC = ROOT / "node_modules/.bin/tsc"
JAVA = CLIENTS / "java"
MAVEN_REPOSITORY = ROOT / ".tools/maven"
JAVA_OPTIONS = (
    *("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"),  # it lives for seconds
    *("-Dhttps.proxyHost=127.0.0.1", "-Dhttps.proxyPort=9", "-Dhttp.nonProxyHosts="),  # Java's form of DEAD_PROXY
)
CARGO = ROOT / "tools/cargo"
CARGO_ENVIRONMENT = {
    "CARGO_TARGET_DIR": str(ROOT / "out/rust"),
    "CARGO_INCREMENTAL": "0",
    "CARGO_PROFILE_DEV_DEBUG": "0",
    "CARGO_TERM_COLOR": "never",
}
"""One folder for all that the tests build, so that dependencies are built once, and as quickly as may be."""


@functools.cache
def is_here(language: str) -> bool:
    """Whether the machine has the toolchain of a language."""
    match language:
        case "python":
            return True
        case "typescript" | "typescript-web":
            return shutil.which("node") is not None and TSC.exists()
        case "cpp" | "c":
            return cpp.is_here()
        case "java":
            return shutil.which("javac") is not None and shutil.which("mvn") is not None
        case "csharp":
            return csharp.is_here()
        case "rust":
            return subprocess.run([CARGO, "--version"], capture_output=True).returncode == 0
        case _:
            return shutil.which(language) is not None


def require_go() -> None:
    """Skips the test where there is no Go."""
    if not is_here("go"):
        pytest.skip("no Go on this machine")


def require_typescript() -> None:
    """Skips the test where Node or its packages are missing."""
    if not is_here("typescript"):
        pytest.skip("no Node with the packages of package.json here (make node_modules/.installed)")


def require_java() -> None:
    """Skips the test where there is no JDK or no Maven."""
    if not is_here("java"):
        pytest.skip("no JDK with Maven on this machine")


@functools.cache
def build_java() -> str:
    """Builds the Java client, its jars and its documentation, and runs its tests, once; what Maven said.

    Maven keeps what it downloads in the checkout and not in the home directory, so that a later build needs no network.
    """
    command = ["mvn", "--batch-mode", "--no-transfer-progress", f"-Dmaven.repo.local={MAVEN_REPOSITORY}"]
    goals = ["clean", "verify", "dependency:copy-dependencies", "-DoutputDirectory=target/lib"]
    done = subprocess.run([*command, *goals], cwd=JAVA, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


def run_java(main: str) -> list[str]:
    """The command that runs a class, or a source file, with the client that `build_java` has built."""
    classes = [
        JAVA / "target/test-classes",
        *(JAVA / "target").glob("safelight-client-*[0-9].jar"),
        JAVA / "target/lib/*",
    ]
    return ["java", *JAVA_OPTIONS, "-cp", ":".join(map(str, classes)), main]


def require_rust() -> None:
    """Skips the test where there is no Rust."""
    if not is_here("rust"):
        pytest.skip("no Rust on this machine")


def build_rust_example(crate: Path, name: str) -> Path:
    """Builds an example of the Rust client, or of a copy of it."""
    build = [CARGO, "build", "--quiet", "--example", name]
    subprocess.run(build, cwd=crate, env=os.environ | CARGO_ENVIRONMENT, check=True)
    return Path(CARGO_ENVIRONMENT["CARGO_TARGET_DIR"], "debug/examples", name)


def build_rust_program(folder: Path, source: str) -> Path:
    """Builds a program with the Rust client and the dependencies of its runner, which was built before."""
    for part in ("Cargo.toml", "Cargo.lock", "README.md", "src"):
        (folder / part).symlink_to(CLIENTS / "rust" / part)
    (folder / "examples").mkdir()
    (folder / "examples/program.rs").write_text(source)
    return build_rust_example(folder, "program")


@pytest.fixture(scope="session")
def runners(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """The command of a language's runner. Skips the test where the machine lacks the toolchain."""

    @functools.cache
    def command(language: str) -> list[str]:
        match language:
            case "python":
                return [sys.executable, str(CLIENTS / "python/conformance.py")]
            case "go":
                require_go()
                return [str(build_go(tmp_path_factory.mktemp("go") / "conformance"))]
            case "typescript":
                require_typescript()
                subprocess.run([TSC, "--project", CLIENTS / "typescript"], check=True)
                return ["node", str(CLIENTS / "typescript/dist/conformance.js")]
            case "typescript-web":
                return [*command("typescript"), "--web"]
            case "cpp" | "c":
                cpp.require()
                return [str(cpp.build() / f"conformance_{language}")]
            case "csharp":
                csharp.require()
                return csharp.command(csharp.runner())
            case "java":
                require_java()
                build_java()
                return run_java("io.github.safelight.Conformance")
            case "rust":
                require_rust()
                return [
                    str(build_rust_example(CLIENTS / "rust", "conformance")),
                    str(descriptors(tmp_path_factory.mktemp("rust") / "safelight.binpb")),
                ]
            case _:
                raise ValueError(language)

    def build_go(program: Path) -> Path:
        subprocess.run(["go", "build", "-o", program, "./internal/conformance"], cwd=CLIENTS / "go", check=True)
        return program

    return command


def descriptors(file: Path) -> Path:
    """Writes the contract as a descriptor set, for runners whose language has no JSON of messages built in."""
    protos = [str(path.relative_to(ROOT / "proto")) for path in (ROOT / "proto/safelight").rglob("*.proto")]
    includes = ["-Iproto", "-Iproto/third_party"]
    protoc = [sys.executable, "-m", "grpc_tools.protoc", *includes, "--include_imports", f"--descriptor_set_out={file}"]
    subprocess.run([*protoc, *protos], cwd=ROOT, check=True)
    return file
