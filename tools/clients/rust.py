"""Builds programs of clients/rust with Cargo."""

from __future__ import annotations

import subprocess
from pathlib import Path

from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FileDescriptor
from safelight.v1 import generation_pb2

from tools.clients.commands import CLIENTS, OUT, ROOT, run

SOURCE = CLIENTS / "rust"
CARGO = ROOT / "tools/cargo"
ENVIRONMENT = {
    "CARGO_TARGET_DIR": str(OUT / "rust"),
    "CARGO_INCREMENTAL": "0",
    "CARGO_PROFILE_DEV_DEBUG": "0",
    "CARGO_TERM_COLOR": "never",
}
"""Environment of Cargo: one target folder for all builds of the tests, so that dependencies are built only once."""


def is_here() -> bool:
    """Whether the machine has Cargo with a toolchain."""
    return subprocess.run([CARGO, "--version"], capture_output=True).returncode == 0


def build_example(crate: Path, name: str, profile: str = "dev") -> Path:
    """Builds an example of the Rust client, or of a copy of it; `profile`: "dev" or "release"."""
    run(CARGO, "build", "--quiet", "--profile", profile, "--example", name, cwd=crate, environment=ENVIRONMENT)
    return Path(ENVIRONMENT["CARGO_TARGET_DIR"], "debug" if profile == "dev" else profile, "examples", name)


def build_program(folder: Path, source: str) -> Path:
    """Builds a program with the Rust client and the dependencies of its runner, which was built before."""
    for part in ("Cargo.toml", "Cargo.lock", "README.md", "src"):
        (folder / part).symlink_to(SOURCE / part)
    (folder / "examples").mkdir()
    (folder / "examples/program.rs").write_text(source)
    return build_example(folder, "program")


def descriptors() -> Path:
    """Writes the API as a descriptor set, which the Rust runner needs to read messages in JSON."""
    files: dict[str, descriptor_pb2.FileDescriptorProto] = {}

    def add(file: FileDescriptor) -> None:
        for needed in file.dependencies:
            add(needed)
        files[file.name] = descriptor_pb2.FileDescriptorProto()
        file.CopyToProto(files[file.name])

    add(generation_pb2.DESCRIPTOR)
    written = OUT / "rust/safelight.binpb"
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_bytes(descriptor_pb2.FileDescriptorSet(file=files.values()).SerializeToString())
    return written
