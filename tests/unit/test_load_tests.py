"""The benchmarks of the caches run, with the smallest sizes that say anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def run(module: str, out: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", f"load_tests.{module}", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(120)
def test_replay_counts_what_was_served(tmp_path: Path) -> None:
    run("replay", tmp_path, "--seeds", "11", "--modes", "exact", "--requests", "40", "--steps", "2", "--clients", "2")
    result = json.loads((tmp_path / "exact-11.json").read_text())
    kinds = [one["kind"] for one in result["served"]]
    assert len(kinds) == 40
    assert {"miss", "exact"} == set(kinds)
    assert all(one["num_steps_skipped"] == (2 if one["kind"] == "exact" else 0) for one in result["served"])


@pytest.mark.timeout(120)
def test_hits_are_hits(tmp_path: Path) -> None:
    run("hits", tmp_path / "hits.json", "--rate", "10", "--seconds", "0.5", "--pictures", "2")
    figures = json.loads((tmp_path / "hits.json").read_text())
    assert (figures["hits"], figures["no_hits"]) == (5, 0)


@pytest.mark.timeout(120)
def test_overhead_compares_with_bypass(tmp_path: Path) -> None:
    sizes = ("--requests", "2", "--rounds", "1", "--clients", "2", "--steps", "3", "--base-ms", "0", "--row-ms", "0")
    run("overhead", tmp_path / "overhead.json", *sizes)
    figures = json.loads((tmp_path / "overhead.json").read_text())
    assert figures["bypass"]["cpu_of_bypass"] == 1
    assert figures["exact"]["cpu_ms"] > 0
