"""`python -m tests.simulation --schedules N --seed S`: prints the seeds that fail; exit status 1 if any does."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time

from tests.simulation.schedule import Result, run, run_many

SLICE = 200
"""Schedules of one process. It frees nothing (140 MB at its end) and exits, which is quicker than the collector."""


def main() -> int:
    """Runs the schedules on all cores, or one of them with its trace."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--schedules", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1, help="of the first schedule; the others follow")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--trace", action="store_true", help="run the one schedule of --seed and print what happened")
    parser.add_argument("--max-failures", type=int, default=20, help="stop after so many")
    given = parser.parse_args()
    if given.trace:
        result = run(given.seed, trace=True)
        print("\n".join(result.trace))
        _print(result)
        return bool(result.wrong)
    began, failed = time.perf_counter(), []
    starts = range(given.seed, given.seed + given.schedules, SLICE)
    slices = [(start, min(SLICE, given.seed + given.schedules - start)) for start in starts]
    done = 0
    with multiprocessing.get_context("fork").Pool(given.processes, maxtasksperchild=1) as pool:  # its end ends all
        for (_, count), results in zip(slices, pool.imap(_run_slice, slices), strict=True):
            done += count
            failed += results
            for result in results:
                _print(result)
            if len(failed) >= given.max_failures:
                break
    seconds = time.perf_counter() - began
    print(
        f"{done} schedules from seed {given.seed} on in {seconds:.1f} s ({done / seconds * 60:.0f} a minute); {len(failed)} failed"
    )
    return bool(failed)


def _run_slice(slice_: tuple[int, int]) -> list[Result]:
    return run_many(*slice_, frees=False)


def _print(result: Result) -> None:
    for what in result.wrong:
        print(f"seed {result.seed}: {what}")


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # sets of strings have the same order in every run
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]])
    sys.exit(main())
