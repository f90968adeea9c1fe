"""Every benchmark runs on a tiny plan and gives plausible figures; its speed is not tested."""

from __future__ import annotations

import asyncio
import dataclasses
import json

import grpc
import numpy as np
import pytest
from safelight.v1 import generation_pb2_grpc as stubs
from safelight_server.catalog import catalog

from load_tests.bench import (
    cheaper,
    clients,
    hits,
    kinds,
    latency,
    loop,
    overhead,
    running_server,
    scheduler,
    surge,
    throughput,
    transports,
    watchers,
)
from load_tests.bench.bare import BareLoop
from load_tests.bench.requests import PROMPT, request
from load_tests.calibration import eviction, index, replay
from tests.conftest import MODELS
from tools.clients import runners

pytestmark = pytest.mark.timeout(240)


def only_table(report):
    assert len(report.tables) == 1
    return next(iter(report.tables.values()))


async def test_the_bare_loop_computes_what_the_server_computes(start):
    async with start() as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        served = []
        for seed in (3, 4):
            data = b""
            async for response in stub.Generate(request(seed, 4, "none")):
                if response.event.HasField("artifact_chunk"):
                    data += response.event.artifact_chunk.data
            served.append(np.frombuffer(data, np.uint8).reshape(128, 128, 4)[..., :3])
    bare = BareLoop(catalog.load(MODELS).get("")).develop([PROMPT] * 2, [3, 4], 4)
    for ours, theirs in zip(bare, served, strict=True):
        assert np.array_equal(ours, theirs)


def test_throughput():
    plan = dataclasses.replace(throughput.SMOKE, models=MODELS)
    rows = only_table(throughput.measure(plan))
    assert [(row["clients"], row["previews"]) for row in rows] == [
        (clients, previews) for clients in plan.num_clients for previews in ("bare", *throughput.PREVIEWS)
    ]
    for row in rows:
        assert row["pictures_per_s"] > 0
        assert row["pictures_per_cpu_s"] > 0
        expected = 0 if row["previews"] == "bare" else plan.num_steps
        assert row["previews_per_picture"] <= expected
        if row["previews"] == "bare":
            assert row["of_bare_per_s"] == row["of_bare_per_cpu_s"] == 1
        else:
            assert row["previews_per_picture"] > 0


def test_scheduler():
    report = scheduler.measure(scheduler.SMOKE)
    ratios, costs = report.tables.values()
    assert [row["generations"] for row in ratios] == list(scheduler.SMOKE.num_generations)
    for row in ratios:
        assert 0 < row["of_ideal"] <= 1.01, "faster than the curve of its own runtime"
    for row in costs:
        assert row["cpu_us_per_row_step"] > 0
    assert len(report.targets) == len(ratios)


def test_loop():
    streams, outputs = only_table(loop.measure(loop.SMOKE))
    for row in (streams, outputs):
        assert row["calls"] > 0
        assert 0 <= row["critical_share"] < 1 and 0 < row["idle_share"] < 1
        assert 0 < row["gap_cpu_ms_p50"] <= row["gap_cpu_ms_p99"]


def test_watchers():
    (row,) = only_table(watchers.measure(watchers.SMOKE))
    assert row["streams"] == watchers.SMOKE.num_streams
    assert row["healthy_events_per_s"] > row["slow_events_per_s"] > 0
    assert 0 <= row["late_ms_p50"] <= row["late_ms_p99"]


def test_clients(monkeypatch):
    monkeypatch.setattr(runners, "is_here", lambda language: language != "go")
    report = clients.measure(dataclasses.replace(clients.SMOKE, clients=(*clients.SMOKE.clients, "go")))
    by_client, by_way = report.tables.values()
    assert [(row["client"], row["preview_kib"]) for row in by_client] == [("python", 16)]
    for row in by_client:
        assert row["previews_per_s"] > 0
        assert row["late_ms_p50"] <= row["late_ms_p99"]
    assert [row["way"] for row in by_way] == ["gRPC, Python", "server-sent events, Python"]
    for row in by_way:
        assert 0 < row["previews_a_picture"] <= transports.NUM_PREVIEWS
        assert row["server_cpu_ms_a_preview"] > 0 and row["client_cpu_ms_a_preview"] > 0
        assert 0 < row["late_ms_p50"] <= row["late_ms_p99"]
    assert report.notes == ["left out, their toolchains are not on this machine: go"]


def test_latency_without_peers():
    plan = dataclasses.replace(latency.SMOKE, models=MODELS, peers=())
    report = latency.measure(plan)
    capacities, rows = report.tables.values()
    assert [row["server"] for row in capacities] == ["safelight"]
    assert [row["load"] for row in rows] == ["70 % of its own", "70 % of the slowest"]
    for row in rows:
        assert row["failed"] == 0
        assert row["pictures"] >= 1
        assert 0 < row["first_pixel_ms_p50"] <= row["picture_ms_p50"]
    assert report.targets == []


def test_surge():
    report = surge.measure(surge.SMOKE)
    phases, classes = report.tables.values()
    assert [row["phase"] for row in phases] == ["before", "surge", "after"]
    assert all(row["requests"] > 0 for row in phases)
    assert [row["class"] for row in classes] == ["interactive", "standard", "batch"]
    assert sum(row["requests"] for row in classes) == phases[1]["requests"]
    assert 0 < phases[1]["interactive_first_ms_p50"] <= phases[1]["interactive_first_ms_p99"]


def test_kinds():
    rows = only_table(kinds.measure(dataclasses.replace(kinds.SMOKE, models=MODELS)))
    by_kind = {row["kind"]: row for row in rows}
    assert len(by_kind) == len(rows) == 8
    plain = by_kind[kinds.PLAIN]
    assert plain["rows"] == 2 * kinds.SMOKE.num_steps and plain["cpu_of_text"] == plain["rate_of_text"] == 1
    assert by_kind["interval 0:0.5"]["rows"] == 3 and by_kind["interval beside text"]["rows"] == 3.5
    assert all(row["pictures_per_s"] > 0 and row["cpu_ms_per_picture"] > 0 for row in rows)


def test_cheaper():
    rows = only_table(cheaper.measure(dataclasses.replace(cheaper.SMOKE, models=MODELS)))
    assert [(row["way"], row["rows"], row["rows_skipped"]) for row in rows] == [
        (cheaper.PLAIN, 8, 0),
        ("interval 0:0.5", 6, 0.25),
    ]
    assert rows[0]["cpu_of_plain"] == rows[0]["wall_of_plain"] == 1
    assert 10 < rows[1]["psnr_db"] < 100


def test_the_psnr_of_pictures():
    black = np.zeros((2, 2, 4), np.uint8)
    assert cheaper.psnr(black, black) == 100
    assert cheaper.psnr(black, black + np.uint8(255)) == 0


def test_hits():
    report = hits.measure(hits.SMOKE)
    [row] = only_table(report)
    assert row["hits"] == 10
    assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
    assert report.targets[0].figure == pytest.approx(hits.BAR_MS / row["p99_ms"])


async def test_the_cost_of_caches_is_not_measured_on_what_repeats(start):
    async with start(runtime="simulated", simulated_base_ms=1.0, simulated_row_ms=0.0) as running:
        asked = running.address, "exact", range(2), 1, 2, False
        await overhead.ask(*asked)
        with pytest.raises(RuntimeError, match="request 0 repeats an earlier one"):
            await overhead.ask(*asked)


def test_overhead():
    rows = only_table(overhead.measure(overhead.SMOKE))
    assert {row["mode"] for row in rows} == set(overhead.MODES)
    assert {row["throughput_of_bypass"] for row in rows if row["mode"] == "bypass"} == {1.0}


def test_replay(tmp_path):
    plan = dataclasses.replace(replay.SMOKE, models=MODELS, out=tmp_path)
    rows = {row["mode"]: row for row in only_table(replay.measure(plan))}
    assert [rows[mode]["requests"] for mode in ("off", "exact", "similar")] == [2, 6, 6]
    assert rows["off"]["steps_saved"] == 0
    assert all(sum(row[kind] for kind in replay.KINDS) == row["requests"] for row in rows.values())
    assert {file.name for file in tmp_path.glob("*.npz")} == {"off-1.npz", "similar-1.npz"}, "what the judge needs"


def test_replay_counts_what_was_served(tmp_path):
    plan = dataclasses.replace(
        replay.SMOKE, seeds=(11,), modes=("exact",), num_requests=40, num_clients=1, models=MODELS, out=tmp_path
    )
    (row,) = only_table(replay.measure(plan))
    served = json.loads((tmp_path / "exact-11.json").read_text())["served"]
    alone = [one for one in served if one["kind"] != "coalesced"]  # the next request may come before it is kept
    assert {one["kind"] for one in alone} == {"miss", "exact"}
    for one in alone:
        assert one["num_steps_skipped"] == (plan.num_steps if one["kind"] == "exact" else 0)
    assert row["steps_saved"] == row["exact"] / 40


def test_eviction():
    by_settings, by_policy = eviction.measure(eviction.SMOKE).tables.values()
    assert {row["settings"] for row in by_settings} == set(eviction.SETTINGS)
    assert all(sum(row[kind] for kind in eviction.KINDS) == 20 for row in by_settings)
    assert all(0 <= row[name] <= 1 for row in by_policy for name in eviction.POLICIES)


def test_index(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where it keeps its vectors
    report = index.measure(index.SMOKE)
    assert len(report.tables) == 2
    for rows in report.tables.values():
        assert rows[0]["index"] == "faiss Flat"
        assert {rows[0][name] for name in ("any_near", "best_near")} <= {1.0, None}, "what is exact finds all"
        assert all(row["cpu_ms_p50"] <= row["cpu_ms_p99"] for row in rows)
    with_something_to_find = [rows for rows in report.tables.values() if rows[0]["any_near"] is not None]
    assert with_something_to_find
    assert len(report.targets) == len(report.tables) + len(with_something_to_find)


async def test_load_on_a_running_server(start, capsys):
    async with start() as running:
        await asyncio.to_thread(
            running_server.main, ["--target", running.address, "--clients", "2", "--pictures", "3", "--steps", "2"]
        )
    assert "2 clients, 3 pictures in" in capsys.readouterr().out
