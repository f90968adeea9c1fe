"""`make mutate`: each deliberate break in tests/mutations/ must turn its test red.

A patch's first line names the test: `# test: tests/unit/test_x.py::test_name`.
Patches are applied one at a time in a scratch copy of the working tree. An
argument (`make mutate ONLY=scheduler-`) runs those whose names contain it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRATCH = ROOT / "out" / "mutate"
COPIED = ("server", "clients", "tests", "models", "training", "load_tests", "pyproject.toml")


def main() -> int:
    """Runs every patch; the exit code is the number that did not turn their test red."""
    only = sys.argv[1] if len(sys.argv) > 1 else ""
    patches = sorted((ROOT / "tests" / "mutations").glob(f"*{only}*.patch"))
    failed = 0
    for patch in patches:
        test = patch.read_text().splitlines()[0].removeprefix("# test: ").strip()
        outcome = run(patch, test)
        failed += outcome != "red"
        print(f"{outcome:14} {patch.stem:44} {test}", flush=True)
    print(f"{len(patches) - failed} passed, {failed} failed")
    return min(failed, 1)


def run(patch: Path, test: str) -> str:
    """ "red" where the break is seen."""
    shutil.rmtree(SCRATCH, ignore_errors=True)
    SCRATCH.mkdir(parents=True)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, SCRATCH / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, SCRATCH / name)
    applied = subprocess.run(
        ["patch", "-p1", "--silent", "-i", str(patch)], cwd=SCRATCH, capture_output=True, text=True, check=False
    )
    if applied.returncode:
        return "does not apply"
    environment = os.environ | {"PYTHONPATH": "server:clients/python:."}
    tested = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test],
        cwd=SCRATCH,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    return "red" if tested.returncode == 1 else "GREEN" if tested.returncode == 0 else f"error {tested.returncode}"


if __name__ == "__main__":
    sys.exit(main())
