"""The latency benchmark with its peers, on a tiny plan; `make test-peers` has the environment for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from load_tests.bench import latency
from load_tests.bench.peers import diffusers_server

MODELS = Path(__file__).parent.parent.parent / "models"
WEIGHT_BYTES = 2


def test_every_server_is_measured_at_every_load():
    plan = dataclasses.replace(latency.SMOKE, models=MODELS)
    report = latency.measure(plan)
    capacities, rows = report.tables.values()
    assert all(row["pictures_per_s"] > 0 for row in capacities)
    assert [(row["load"], row["server"]) for row in rows] == [
        (load, server)
        for load in ("70 % of its own", "70 % of the slowest")
        for server in ("safelight", "litserve", "diffusers")
    ]
    for row in rows:
        assert row["failed"] == 0
        assert row["pictures"] >= 1
        if row["server"] == "safelight":
            assert row["first_pixel_ms_p50"] <= row["picture_ms_p50"]
        else:
            assert row["first_pixel_ms_p99"] == row["picture_ms_p99"]
    assert len(report.targets) == 4
    assert any(note.startswith("left out, slower: litserve") for note in report.notes) or len(capacities) == 3


def test_the_diffusers_peer_has_the_size_of_the_shipped_model():
    pipeline = diffusers_server.build()
    for network, folder in ((pipeline.unet, "icons_denoiser"), (pipeline.vae.decoder, "icons_decoder")):
        num_bytes = WEIGHT_BYTES * sum(weights.numel() for weights in network.parameters())
        shipped = (MODELS / "repository" / folder / "1" / "model.onnx").stat().st_size
        assert 0.8 < num_bytes / shipped <= 1.0, folder


def test_the_diffusers_peer_draws_pictures_of_the_shipped_size():
    pipeline = diffusers_server.build()
    assert len(diffusers_server.develop(pipeline, "a red potion", 1, 2)) == 128 * 128 * 3
