"""The runners of all languages: programs that read a case and print its outcome (clients/CONFORMANCE.md)."""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from tools.clients import cpp, csharp, java, rust
from tools.clients.commands import CLIENTS, OUT, ROOT, once, run

WEB = "typescript-web"
"""Name of the TypeScript client for pages, run by Node."""
SYNC = "python-sync"
"""Name of the Python client for programs without asyncio."""
LANGUAGES = ("python", "go", "typescript", WEB, "java", "rust", "cpp", "c", "csharp")
TSC = ROOT / "node_modules/.bin/tsc"
DEFAULTS: Mapping[str, object] = {
    **dict.fromkeys(("ca_file", "server_name", "cert_file", "key_file", "api_key"), ""),
    **dict.fromkeys(("init_image_file", "mask_file"), ""),
    **dict.fromkeys(("timeout_s", "max_message_bytes", "pause_s", "cancel_at_step", "guidance_rescale"), 0),
    "guidance_interval": [],
    "min_num_steps": 0,
    **dict.fromkeys(("watch_again", "measure"), False),
    "patience_s": 60,
    "retries": 3,
}


@functools.cache
def is_here(language: str) -> bool:
    """Whether the machine has the toolchain of a language."""
    match language:
        case "python" | "python-sync":
            return True
        case "typescript" | "typescript-web":
            return shutil.which("node") is not None and TSC.exists()
        case "cpp" | "c":
            return cpp.is_here()
        case "java":
            return java.is_here()
        case "csharp":
            return csharp.is_here()
        case "rust":
            return rust.is_here()
        case _:
            return shutil.which(language) is not None


@functools.cache
def runner(language: str, *, optimized: bool = False) -> list[str]:
    """Builds the runner of a language whose toolchain is installed, and returns its command line.

    Args:
        optimized: whether to build and start it as in production; for tests Rust and Java use quicker ways.

    Raises:
        BuildError: the build has failed.
        ValueError: there is no such language.
    """
    match language:
        case "python":
            return [sys.executable, str(CLIENTS / "python/conformance.py")]
        case "python-sync":
            return [*runner("python"), "--sync"]
        case "go":
            program, source = OUT / "go/conformance", CLIENTS / "go"
            command = ("go", "build", "-o", program, "./internal/conformance")
            once("go", program, [source], partial(run, *command, cwd=source))
            return [str(program)]
        case "typescript":
            source = CLIENTS / "typescript"
            program = source / "dist/conformance.js"
            once("typescript", program, [source, ROOT / "package-lock.json"], partial(run, TSC, "--project", source))
            return ["node", str(program)]
        case "typescript-web":
            return [*runner("typescript"), "--web"]
        case "cpp" | "c":
            return [str(cpp.build() / f"conformance_{language}")]
        case "csharp":
            return csharp.command(csharp.runner())
        case "java":
            java.build()
            return java.command("io.github.safelight.Conformance", *(() if optimized else java.SHORT_LIVED))
        case "rust":
            program = rust.build_example(rust.SOURCE, "conformance", "release" if optimized else "dev")
            return [str(program), str(rust.descriptors())]
        case _:
            raise ValueError(language)


def told(name: str, targets: Sequence[str], requests: Sequence[Mapping[str, Any]], **more: object) -> dict[str, Any]:
    """The input of a runner for one case; fields that `more` does not set have the values of DEFAULTS."""
    return {**DEFAULTS, **more, "name": name, "targets": [*targets], "requests": [*requests]}
