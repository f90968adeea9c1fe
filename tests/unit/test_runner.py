"""The reports that the benchmarks print and write."""

from __future__ import annotations

import json

from rich.console import Console

from load_tests.bench import runner
from load_tests.bench.runner import Report, Target, median_by

ROWS = [
    {"clients": 1, "what": "a", "per_s": 1.0},
    {"clients": 1, "what": "b", "per_s": 9.0},
    {"clients": 1, "what": "a", "per_s": 5.0},
    {"clients": 1, "what": "a", "per_s": 2.0},
]


def test_medians_are_by_key_in_order_of_appearance():
    assert median_by(ROWS, ("clients", "what")) == [
        {"clients": 1, "what": "a", "per_s": 2.0},
        {"clients": 1, "what": "b", "per_s": 9.0},
    ]


def test_a_report_is_printed_and_written_with_the_machine(tmp_path):
    targets = [Target("enough", 0.9, 0.95), Target("more than enough", 6.0, 5.0)]
    console = Console(record=True, width=120)
    runner.run(lambda: Report("part", {"a table": ROWS}, targets, ["a note"]), console, tmp_path)
    shown = console.export_text()
    assert "BELOW: enough" in shown
    assert "met: more than enough" in shown
    assert "load average before" in shown
    written = json.loads((tmp_path / "part.json").read_text())
    assert [target["is_met"] for target in written["targets"]] == [False, True]
    assert written["tables"]["a table"] == ROWS
    machine = written["machine"]
    assert machine["cores"] >= 1
    assert len(machine["load_before"]) == len(machine["load_after"]) == 3
    assert {"grpcio", "onnxruntime", "numpy"} <= set(machine["versions"])
