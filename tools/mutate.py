"""`make mutate`: each deliberate break in tests/mutations/ must turn its test red.

A patch's first line names the test: `# test: tests/unit/test_x.py::test_name`.
Each patch is applied in a scratch copy of the working tree, two at once for
each core. An argument (`make mutate ONLY=scheduler-`) runs those whose
names contain it. Red is a test that failed: one that could not be set up says
nothing of its rule, nor does one that had to be ended from outside. What is not
red is tried once more, alone, at the end: a break that shows on most runs only
is named as such, and what never turned red comes last, with what was printed.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRATCH = ROOT / "out" / "mutate"
COPIED = ("server", "clients", "tests", "training", "load_tests", "deploy", "pyproject.toml")
LINKED = ("models",)
LIMIT_S = 240.0  # a test whose minute is up is cancelled; this is for what not even that can end
TAIL = 4000
"""Characters of what a test printed that are shown where it is not red."""


def main() -> int:
    """Runs every patch; the exit code is 1 where one did not turn its test red."""
    only = sys.argv[1] if len(sys.argv) > 1 else ""
    patches = [patch for patch in sorted((ROOT / "tests" / "mutations").glob("*.patch")) if only in patch.stem]
    with ThreadPoolExecutor(2 * len(os.sched_getaffinity(0))) as pool:  # many wait for what never comes true
        unseen = [patch for patch, seen in zip(patches, pool.map(_seen, patches), strict=True) if not seen]
    if unseen:
        print(f"once more, alone: {', '.join(patch.stem for patch in unseen)}", flush=True)
    failed = [patch.stem for patch in unseen if not _seen(patch)]
    print(f"{len(patches) - len(failed)} of {len(patches)} red, {len(unseen) - len(failed)} of them at the second try")
    if failed:
        print(f"not red: {', '.join(failed)}")
    return min(len(failed), 1)


def _seen(patch: Path) -> bool:
    """Whether the break turned its test red; prints its line, and what was printed where it did not."""
    outcome, took_s, printed = run(patch)
    lines = f"{outcome:14} {took_s:5.1f} s {patch.stem:44} {_test_of(patch)}"
    if outcome != "red":
        lines += "\n" + textwrap.indent(printed[-TAIL:], "    ")
    print(lines, flush=True)
    return outcome == "red"


def run(patch: Path) -> tuple[str, float, str]:
    """What came of it, "red" where the break is seen; the seconds that it took; what was printed."""
    began = time.monotonic()
    scratch = SCRATCH / patch.stem
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        _copy(scratch)
        outcome, printed = _outcome(patch, scratch)
        return outcome, time.monotonic() - began, printed
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _outcome(patch: Path, scratch: Path) -> tuple[str, str]:
    applied, printed = _call(["patch", "-p1", "--silent", "-i", str(patch)], scratch)
    if applied:
        return "does not apply", printed
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", _test_of(patch)]
    tested, printed = _call(command, scratch)
    if tested == 0:
        return "GREEN", printed
    if tested == 1 and re.search(r"^\d+ failed", printed, re.MULTILINE):
        return "red", printed
    return "hung" if tested is None else f"error {tested}", printed


def _test_of(patch: Path) -> str:
    return patch.read_text().splitlines()[0].removeprefix("# test: ").strip()


def _copy(scratch: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, scratch / name)  # with what is compiled: half of a test's time is its imports
        else:
            shutil.copy(source, scratch / name)
    for name in LINKED:
        (scratch / name).symlink_to(ROOT / name)


def _call(command: list[str], folder: Path) -> tuple[int | None, str]:
    """Its exit code, None where it was ended, and its output; nothing that it started outlives it."""
    environment = os.environ | {"PYTHONPATH": "server:clients/python:."}
    log = folder / "output.log"  # a pipe would stay open as long as a process that the test left behind
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return code, log.read_text(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
