"""Runs the commands of the builds, and skips builds whose sources have not changed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
CLIENTS = ROOT / "clients"
OUT = ROOT / "out"
"""Folder of build outputs; others are in folders of the clients that git ignores."""
BUILT = frozenset({"target", "dist", "node_modules", "__pycache__"})
"""Names of folders of build outputs beside sources."""


class BuildError(Exception):
    """A build failed; the message has its output."""


def run(*command: str | Path, cwd: Path = ROOT, environment: Mapping[str, str] | None = None) -> str:
    """Runs a command that must succeed, and returns its output.

    Args:
        environment: environment variables to add to those of this process.

    Raises:
        BuildError: the command failed.
    """
    done = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | dict(environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise BuildError(f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stdout[-8000:]}")
    return done.stdout


def once(name: str, product: Path, sources: Sequence[Path], build: Callable[[], str]) -> str:
    """Runs a build unless no source has changed since its last success; returns its output.

    Args:
        name: name of the build, such as "java".
        product: the file that the build writes last; if it is missing, the build runs.
        sources: folders and files that the build reads.
    """
    stamp, digest = OUT / "built" / f"{name}.json", _digest(sources)
    if stamp.exists() and product.exists():
        before = json.loads(stamp.read_text())
        if before["sources"] == digest:
            return str(before["said"])
    said = build()
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(json.dumps({"sources": digest, "said": said}))
    return said


def _digest(sources: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for source in sources:
        for path in [source] if source.is_file() else sorted(source.rglob("*")):
            if path.is_file() and not BUILT.intersection(path.relative_to(ROOT).parts):
                digest.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()
