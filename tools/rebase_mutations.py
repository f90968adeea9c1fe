"""Rebases tests/mutations/*.patch onto the working tree: `rebase_mutations.py [COMMIT]`.

COMMIT is one at which all patches apply (default: HEAD). Each patch is applied to its files as of COMMIT, the result is
merged with the working tree by `git merge-file`, and the patch is written again. Patches that still apply are not
changed. Exits with 1 on a conflict.
"""

from __future__ import annotations

import difflib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Rebases the patches that no longer apply; the exit code is 1 if one must be edited by hand."""
    base = sys.argv[1] if len(sys.argv) > 1 else "HEAD"
    renamed = _renamed(base)
    conflicts = 0
    for patch in sorted((ROOT / "tests/mutations").glob("*.patch")):
        if _run("patch", "-p1", "--dry-run", "-F0", "-i", str(patch)).returncode == 0:
            continue
        try:
            patch.write_text(_rebased(patch, base, renamed))
            print(f"rebased {patch.stem}")
        except ValueError as why:
            conflicts += 1
            print(f"CONFLICT {patch.stem}: {why}")
    return min(conflicts, 1)


def _run(*command: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def _renamed(base: str) -> dict[str, str]:
    """Files that were renamed since `base`."""
    lines = _run("git", "diff", "-M30", "--name-status", "--diff-filter=R", base).stdout.splitlines()
    return {before: now for _, before, now in (line.split("\t") for line in lines)}


def _rebased(patch: Path, base: str, renamed: dict[str, str]) -> str:
    """The patch for the working tree.

    Raises:
        ValueError: it must be edited by hand; the message says why.
    """
    then = _run("git", "show", f"{base}:{patch.relative_to(ROOT)}")
    text = then.stdout if then.returncode == 0 else patch.read_text()
    parts = [text.splitlines()[0]]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = re.findall(r"^--- a/(\S+)", text, re.MULTILINE)
        before = {file: _run("git", "show", f"{base}:{file}").stdout for file in files}
        for file, content in before.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(content)
        (folder / "it.patch").write_text(text)
        if _run("patch", "-p1", "--silent", "-i", "it.patch", folder=folder).returncode:
            raise ValueError(f"does not apply to {base}")
        for file, content in before.items():
            now = ROOT / renamed.get(file, file)
            if not now.is_file():
                raise ValueError(f"{file} is gone")
            (folder / "before").write_text(content)
            (folder / "now").write_text(now.read_text())
            merged = _run("git", "merge-file", "-p", file, "before", "now", folder=folder)
            if merged.returncode:
                raise ValueError(f"{file} was edited in the very lines of the fault")
            if merged.stdout == now.read_text():
                print(f"EMPTY {patch.stem}: {file} has the fault already, or its lines are gone")
            name = renamed.get(file, file)
            lines = now.read_text().splitlines(True), merged.stdout.splitlines(True)
            parts.append("".join(difflib.unified_diff(*lines, f"a/{name}", f"b/{name}")).rstrip("\n"))
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
