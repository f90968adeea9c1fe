"""`make mutate`: each deliberate fault in tests/mutations/ must make its test fail ("turn red").

A patch's first line names the test: `# test: tests/unit/test_x.py::test_name`.
An argument (`make mutate ONLY=scheduler-`) runs the patches whose names contain it.

Tests run in forks of this process, which has imported all third-party libraries
and nothing of the server; three forks at once for each core. Each fork has a tree
of hard links of its own, in which only the patched files are copies. The tests
first pass without a patch, a fork for each file; that measures the time that a
test may take with a patch.

Red means that the test itself failed. A test whose set-up failed, or that had to
be killed, proves nothing. A patch whose test was not red is tried once more at the
end, while no other test runs: if it is red then, it is listed as a fault that shows
on some runs only. Patches that never turned red are listed last, with the output.
"""

from __future__ import annotations

import ast
import compileall
import gc
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRATCH = ROOT / "out" / "mutate"
BASE = SCRATCH / "base"
"""A copy of the working tree, to which the trees of forks are linked, so that edits made meanwhile have no effect."""
COPIED = ("server", "clients", "tests", "tools/clients", "training", "load_tests", "deploy", "pyproject.toml")
LINKED = ("models",)
LEFT_OUT = ("mutations", "node_modules", "target", "dist", "*.pyc.*")
"""Files that no test of a patch reads and that CI may be writing meanwhile: builds of clients, compiled files."""
OURS = {"safelight", "safelight_server", "tests", "tools", "load_tests", "training"}
"""Packages that a patch may change: each fork imports them from its own tree."""
TESTED = ("server", "clients", "tests/unit", "tests/integration", "tests/redis", "tests/support")
UNSAFE_BEFORE_FORK = {"onnxruntime"}  # its import starts a thread, which a fork would not have

LEAST_LIMIT_S = 8.0
LIMIT_FACTOR = 5.0
"""A patched test may take this many times as long as without the patch."""
GREEN_LIMIT_S = 60.0
GRACE_S = 45.0
"""Seconds until the fork of an overdue test is killed; before, tests/conftest.py cancels the test repeatedly."""
NUM_AT_ONCE = 3 * len(os.sched_getaffinity(0))
TAIL = 4000
"""Most characters of a test's output that are shown if it is not red."""


@dataclass(frozen=True)
class Job:
    """Tests to run in a fork, each for at most `limit_s`, with `patch` or without a patch."""

    name: str
    tests: tuple[str, ...]
    limit_s: float
    patch: Path | None = None

    @property
    def tree(self) -> Path:
        """The folder in which it runs."""
        return SCRATCH / self.name


@dataclass(frozen=True)
class Result:
    """The result of a job.

    Attributes:
        outcome: "red", "GREEN", "hung", "does not apply", or "error N" with pytest's exit code.
        passed_s: for each test that passed, the seconds that it would take alone.
    """

    outcome: str
    took_s: float
    printed: str
    passed_s: dict[str, float]


class Durations:
    """A pytest plugin that writes the durations of passed tests, including their set-up, to a JSON file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._took_s: defaultdict[str, float] = defaultdict(float)
        self._set_up_s = 0.0
        self._not_passed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Adds the time to the case and to its test, since a patch may name either."""
        if report.when == "setup":
            self._set_up_s = max(self._set_up_s, report.duration)
        for test in {report.nodeid, report.nodeid.split("[")[0]}:
            self._took_s[test] += report.duration
            if not report.passed:
                self._not_passed.add(test)

    def pytest_sessionfinish(self) -> None:
        """Writes the file. Each time includes the module's shared set-up, which a test that runs alone needs too."""
        took_s = {test: took_s + self._set_up_s for test, took_s in self._took_s.items()}
        passed = {test: took_s[test] for test in took_s if test not in self._not_passed}
        self._path.write_text(json.dumps(passed))


def main() -> int:
    """Runs every patch; the exit code is 1 if one did not turn its test red."""
    only = sys.argv[1] if len(sys.argv) > 1 else ""
    patches = [patch for patch in sorted((ROOT / "tests" / "mutations").glob("*.patch")) if only in patch.stem]
    shutil.rmtree(SCRATCH, ignore_errors=True)
    try:
        _copy_base()
        _import_third_party()
        gc.freeze()  # a garbage collection in a fork would copy the pages of all imported modules
        return _run_patches(patches)
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)


def _run_patches(patches: list[Path]) -> int:
    by_test: defaultdict[str, list[Path]] = defaultdict(list)
    for patch in patches:
        by_test[_test_of(patch)].append(patch)
    unseen: list[Path] = []
    jobs = deque(_green_jobs(by_test))
    for job, result in _run(jobs, NUM_AT_ONCE):  # many patched tests only wait for a condition that never holds
        if job.patch is not None:
            _print(job, result)
            if result.outcome != "red":
                unseen.append(job.patch)
            continue
        for test in job.tests:
            if test in result.passed_s:
                jobs.extendleft(_patch_job(patch, result.passed_s[test]) for patch in by_test[test])
            else:
                unseen += by_test[test]
        if result.outcome != "GREEN":
            _print(job, result)
    if unseen:
        print(f"once more, alone: {', '.join(patch.stem for patch in unseen)}", flush=True)
    failed = [patch.stem for patch in unseen if not _seen_alone(patch)]
    print(f"{len(patches) - len(failed)} of {len(patches)} red, {len(unseen) - len(failed)} of them at the second try")
    if failed:
        print(f"not red: {', '.join(failed)}")
    return min(len(failed), 1)


def _seen_alone(patch: Path) -> bool:
    """Whether the patch's test passes without the patch and fails with it while no other test runs."""
    test = _test_of(patch)
    [(job, result)] = _run(deque(_green_jobs([test])), 1)
    if test in result.passed_s:
        [(job, result)] = _run(deque([_patch_job(patch, result.passed_s[test])]), 1)
    _print(job, result)
    return job.patch is not None and result.outcome == "red"


def _green_jobs(tests: Iterable[str]) -> list[Job]:
    """One job per test file, the longest first."""
    by_file: defaultdict[str, list[str]] = defaultdict(list)
    for test in tests:
        by_file[test.split("::")[0]].append(test)
    files = sorted(by_file, key=lambda file: file.startswith("tests/unit"))
    return [Job("without-" + file.replace("/", "-"), tuple(by_file[file]), GREEN_LIMIT_S) for file in files]


def _patch_job(patch: Path, green_s: float) -> Job:
    return Job(patch.stem, (_test_of(patch),), max(LEAST_LIMIT_S, LIMIT_FACTOR * green_s), patch)


def _test_of(patch: Path) -> str:
    return patch.read_text().splitlines()[0].removeprefix("# test: ").strip()


def _print(job: Job, result: Result) -> None:
    """Prints a job's outcome in one line, followed by the tests' output unless the outcome is red, as it should be."""
    line = f"{result.outcome:14} {result.took_s:5.1f} s {job.name:44} {' '.join(job.tests)}"
    if result.outcome != "red":
        line += "\n" + textwrap.indent(result.printed[-TAIL:], "    ")
    print(line, flush=True)


def _run(jobs: deque[Job], num_at_once: int) -> Iterator[tuple[Job, Result]]:
    """Runs jobs until none is left, at most `num_at_once` in parallel; the caller may append jobs while iterating."""
    running: dict[int, tuple[Job, float]] = {}
    try:
        while jobs or running:
            while jobs and len(running) < num_at_once:
                job = jobs.popleft()
                printed = _make_tree(job)
                if printed is not None:
                    yield job, Result("does not apply", 0.0, printed, {})
                else:
                    running[_fork(job)] = job, time.monotonic()
            ended = [pid for pid, (job, began) in running.items() if _has_ended(pid) or _is_late(job, began)]
            for pid in ended:
                job, began = running.pop(pid)
                yield job, _result(job, began, _end(pid))
                if job.patch is None:
                    _keep_compiled(job)
                shutil.rmtree(job.tree, ignore_errors=True)
            if not ended:
                time.sleep(0.01)
    finally:
        for pid in running:
            _end(pid)


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _is_late(job: Job, began: float) -> bool:
    return time.monotonic() - began > len(job.tests) * job.limit_s + GRACE_S


def _end(pid: int) -> int | None:
    """Ends a fork and every process that it started; returns its exit code, None if it had to be killed."""
    ended = _has_ended(pid)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code if ended else None


def _result(job: Job, began: float, code: int | None) -> Result:
    printed = _log(job).read_text(errors="replace")
    if code is None:
        outcome = "hung"
    elif code == 0:
        outcome = "GREEN"
    elif code == 1 and re.search(r"^\d+ failed", printed, re.MULTILINE):
        outcome = "red"
    else:
        outcome = f"error {code}"
    passed = _durations(job)
    return Result(outcome, time.monotonic() - began, printed, json.loads(passed.read_text()) if passed.exists() else {})


def _log(job: Job) -> Path:
    return job.tree / "output.log"


def _durations(job: Job) -> Path:
    return job.tree / "durations.json"


def _fork(job: Job) -> int:
    """Starts a job in a fork that leads a session; returns its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        with _log(job).open("wb") as log:  # not a pipe, which a process that the test left behind would keep open
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.chdir(job.tree)
        sys.dont_write_bytecode = job.patch is not None
        path = [str(job.tree / folder) for folder in ("server", "clients/python", ".")]
        sys.path[:0] = path
        os.environ["PYTHONPATH"] = ":".join(path)  # for servers that the test starts
        tempfile.tempdir = os.environ["TMPDIR"] = str(job.tree / "temporary")
        job.tree.joinpath("temporary").mkdir()
        options = ["-q", "-p", "no:cacheprovider", "-p", "no:anyio", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
        limits = ["--timeout", str(job.limit_s), "--basetemp", str(job.tree / "tmp")]
        plugins = [Durations(_durations(job))] if job.patch is None else []
        code = pytest.main([*options, *limits, *(["-x"] if job.patch else []), *job.tests], plugins)
    except BaseException:  # noqa: BLE001  # a fork must never continue as the main program
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _copy_base() -> None:
    BASE.mkdir(parents=True)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, BASE / name, ignore=shutil.ignore_patterns(*LEFT_OUT))
        else:
            shutil.copy2(source, BASE / name)
    for name in ("server", "clients", "load_tests"):
        compileall.compile_dir(BASE / name, quiet=1)


def _make_tree(job: Job) -> str | None:
    """Makes the tree of a job from hard links and patches it; returns the output of `patch` if that failed."""
    shutil.rmtree(job.tree, ignore_errors=True)
    shutil.copytree(BASE, job.tree, copy_function=os.link)
    for name in LINKED:
        (job.tree / name).symlink_to(ROOT / name)
    if job.patch is None:
        return None
    for name in re.findall(r"^\+\+\+ b/(\S+)", job.patch.read_text(), re.MULTILINE):
        file = job.tree / name
        file.unlink(missing_ok=True)
        if (BASE / name).exists():
            shutil.copy2(BASE / name, file)  # a copy, since all trees share the linked file
        for compiled in file.parent.glob(f"__pycache__/{file.stem}.*.pyc"):
            compiled.unlink()  # it would count as current for a patched source of the same length and second
    command = ["patch", "-p1", "--silent", "--force", "-F0", "-i", str(job.patch)]
    applied = subprocess.run(command, cwd=job.tree, capture_output=True, text=True, check=False)
    return applied.stdout + applied.stderr if applied.returncode else None


def _keep_compiled(job: Job) -> None:
    """Keeps the tests that pytest has compiled in this fork, for later forks."""
    for compiled in (job.tree / "tests").rglob("*.pyc"):
        kept = BASE / compiled.relative_to(job.tree)
        kept.parent.mkdir(exist_ok=True)
        if not kept.exists():
            os.link(compiled, kept)


def _import_third_party() -> None:
    """Imports pytest's plugins, and third-party modules of the server and its tests, so that forks need not."""
    for plugin in entry_points(group="pytest11"):
        plugin.load()
    names = {name for folder in TESTED for path in (BASE / folder).rglob("*.py") for name in _imported(path)}
    for name in sorted(names):
        if name.split(".")[0] not in OURS | UNSAFE_BEFORE_FORK:
            with suppress(ImportError):
                importlib.import_module(name)
    assert not OURS & {name.split(".")[0] for name in sys.modules}, "a fork would test this tree, not its own"


def _imported(path: Path) -> Iterator[str]:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


if __name__ == "__main__":
    sys.exit(main())
