"""Builds clients/cpp with CMake, out of the source tree, and again only where something changed."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.clients.case import ROOT

SOURCE = ROOT / "clients/cpp"
BUILD = ROOT / "out/cpp"


def is_here() -> bool:
    """Whether the machine has the toolchain: CMake, a compiler, gRPC's headers and its plugin for protoc."""
    programs = ("cmake", "c++", "protoc", "grpc_cpp_plugin")
    return all(shutil.which(name) for name in programs) and Path("/usr/include/grpcpp").exists()


def require() -> None:
    """Skips the test where the toolchain is missing."""
    if not is_here():
        pytest.skip(
            "no cmake, C++ compiler, libgrpc++-dev and protobuf-compiler-grpc here (tools/install-system-packages)"
        )


@functools.cache
def build(*options: str, folder: str = "all") -> Path:
    """Configures and builds with the tests; where the programs and libraries are."""
    where = BUILD / folder
    run("cmake", "-S", SOURCE, "-B", where, "-DSAFELIGHT_BUILD_TESTS=ON", "-DCMAKE_BUILD_TYPE=Release", *options)
    run("cmake", "--build", where, "--parallel", "2")
    return where


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Runs a command that must succeed; what it printed."""
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout
