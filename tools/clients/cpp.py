"""Builds clients/cpp with CMake, out of the source tree; rebuilds only what has changed."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path

from tools.clients.commands import CLIENTS, OUT, run

SOURCE = CLIENTS / "cpp"
BUILD = OUT / "cpp"
ENGINES = {"GSTREAMER": ("gstreamer-base-1.0", "gstreamer-video-1.0"), "SDL": ("sdl2",)}
"""Parts of the build that need further packages: CMake option to names for pkg-config."""
SANITIZERS = ("address,undefined", "thread")
"""Sanitizers with which the C client's test is built."""


def is_here() -> bool:
    """Whether the machine has the toolchain: CMake, a compiler, gRPC's headers and its plugin for protoc."""
    programs = ("cmake", "c++", "protoc", "grpc_cpp_plugin")
    return all(shutil.which(name) for name in programs) and Path("/usr/include/grpcpp").exists()


def lacks(*packages: str) -> list[str]:
    """The packages that pkg-config does not find."""
    return [name for name in packages if subprocess.run(["pkg-config", "--exists", name]).returncode]


@functools.cache
def build(sanitizers: str = "") -> Path:
    """Builds every part that the machine can build; with sanitizers only the C client's test. Returns the folder."""
    where = BUILD / (sanitizers.partition(",")[0] or "all")
    options = [f"-DSAFELIGHT_SANITIZE={sanitizers}", "-DSAFELIGHT_BUILD_TESTS=ON"]
    # Sanitizers work as well without optimization, and the stubs compile in half of the time.
    options.append(f"-DCMAKE_BUILD_TYPE={'Debug' if sanitizers else 'Release'}")
    options += [
        f"-DSAFELIGHT_BUILD_{engine}={'OFF' if lacks(*packages) else 'ON'}" for engine, packages in ENGINES.items()
    ]
    run("cmake", "-S", SOURCE, "-B", where, *options)
    run("cmake", "--build", where, "--parallel", "2", "--target", "c_test" if sanitizers else "all")
    return where
