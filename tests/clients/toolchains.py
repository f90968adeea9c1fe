"""Skips tests if the toolchain of a language is not installed."""

from __future__ import annotations

import pytest

from tools.clients.runners import is_here

NEEDED = {
    "go": "Go",
    "typescript": "Node with the packages of package.json (make node_modules/.installed)",
    "java": "JDK with Maven",
    "rust": "Rust",
    "cpp": "cmake, C++ compiler, libgrpc++-dev and protobuf-compiler-grpc (tools/install-system-packages cpp)",
    "csharp": "mono-mcs, mono-runtime, libmono-system-runtime-serialization4.0-cil and libmono-system-xml-linq4.0-cil, "
    "or C++ toolchain (tools/install-system-packages cpp csharp)",
}
SAME = {"c": "cpp", "typescript-web": "typescript"}


def require(language: str) -> None:
    """Skips the test if the toolchain of a language is missing; the message says what is needed."""
    if not is_here(language):
        pytest.skip(f"not on this machine: {NEEDED[SAME.get(language, language)]}")
