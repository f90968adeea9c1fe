"""The benchmarks that need Triton run on tiny plans, and their counts are consistent."""

from __future__ import annotations

from load_tests.bench import merging, triton


def test_embedded_and_triton() -> None:
    report = triton.measure(triton.SMOKE)
    rows = report.tables["Embedded and Triton"]
    assert [(row["runtime"], row["generations"]) for row in rows] == [
        (runtime, count) for count in (1, 2) for runtime in ("embedded", "grpc", "shared memory")
    ]
    assert all(float(row["of_embedded_per_cpu_s"]) > 0 for row in rows)
    assert [row["kills"] for row in report.tables["Recovery after kill -9"]] == [1, 1]
    assert len(report.targets) == 3


def test_one_owner_against_tritons_batcher() -> None:
    [rows] = merging.measure(merging.SMOKE).tables.values()
    found = {(row["generations"], row["merging"]): float(row["rows_a_call"]) for row in rows}
    assert all(float(row["triton_cpu_us_per_row"]) > 1 for row in rows), "a server that answers uses its processor"
    assert found[2, "one owner"] == 2
    assert found[4, "one owner"] == 4
    assert all(1 <= found[count, way.name] <= count for count in (2, 4) for way in merging.WAYS)
