"""`make mutate`: each deliberate break in tests/mutations/ must turn its test red.

A patch's first line names the test: `# test: tests/unit/test_x.py::test_name`.
Each patch is applied in a scratch copy of the working tree, as many at once as
there are cores. An argument (`make mutate ONLY=scheduler-`) runs those whose
names contain it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRATCH = ROOT / "out" / "mutate"
COPIED = ("server", "clients", "tests", "training", "load_tests", "deploy", "pyproject.toml")
LINKED = ("models",)


def main() -> int:
    """Runs every patch; the exit code is the number that did not turn their test red."""
    only = sys.argv[1] if len(sys.argv) > 1 else ""
    patches = [patch for patch in sorted((ROOT / "tests" / "mutations").glob("*.patch")) if only in patch.stem]
    failed = 0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for patch, outcome in zip(patches, pool.map(run, patches), strict=True):
            failed += outcome != "red"
            print(f"{outcome:14} {patch.stem:44} {_test_of(patch)}", flush=True)
    print(f"{len(patches) - failed} passed, {failed} failed")
    return min(failed, 1)


def run(patch: Path) -> str:
    """ "red" where the break is seen."""
    scratch = SCRATCH / patch.stem
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        _copy(scratch)
        applied = _call(["patch", "-p1", "--silent", "-i", str(patch)], scratch)
        if applied:
            return "does not apply"
        tested = _call([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", _test_of(patch)], scratch)
        return {0: "GREEN", 1: "red"}.get(tested, f"error {tested}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _test_of(patch: Path) -> str:
    return patch.read_text().splitlines()[0].removeprefix("# test: ").strip()


def _copy(scratch: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, scratch / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, scratch / name)
    for name in LINKED:
        (scratch / name).symlink_to(ROOT / name)


def _call(command: list[str], folder: Path) -> int:
    environment = os.environ | {"PYTHONPATH": "server:clients/python:."}
    return subprocess.run(command, cwd=folder, capture_output=True, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
