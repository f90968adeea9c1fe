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
ENGINES = {"GSTREAMER": ("gstreamer-base-1.0", "gstreamer-video-1.0"), "SDL": ("sdl2",)}
"""Parts of the build that need more packages."""


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


def lacks(*packages: str) -> list[str]:
    """Those of some packages that pkg-config does not find."""
    return [name for name in packages if subprocess.run(["pkg-config", "--exists", name]).returncode]


@functools.cache
def build(sanitizers: str = "") -> Path:
    """Builds all that the machine can; with sanitizers the test of the C client alone. Where it lies."""
    where = BUILD / (sanitizers.partition(",")[0] or "all")
    options = [f"-DSAFELIGHT_SANITIZE={sanitizers}", "-DSAFELIGHT_BUILD_TESTS=ON", "-DCMAKE_BUILD_TYPE=Release"]
    options += [
        f"-DSAFELIGHT_BUILD_{engine}={'OFF' if lacks(*packages) else 'ON'}" for engine, packages in ENGINES.items()
    ]
    run("cmake", "-S", SOURCE, "-B", where, *options)
    run("cmake", "--build", where, "--parallel", "2", "--target", "c_test" if sanitizers else "all")
    return where


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Runs a command that must succeed; what it printed."""
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout
