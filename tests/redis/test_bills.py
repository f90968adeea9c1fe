"""`safelight bills` lists the bills of two tenants from the replicas' Redis."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import sys
from asyncio.subprocess import PIPE

import pytest
from safelight.v1 import generation_pb2 as pb
from safelight_server.api.identity import new_key
from safelight_server.coordination.redis import BILLS
from safelight_server.storage.keyring import new_key_file

from tests.integration.test_cache import kept
from tests.redis.test_ownership import servers
from tests.redis.test_replicas import BYPASS, request
from tests.support.bills import Ran
from tests.support.replicas import bills, collect, key_file

STEPS = 3
DAY_MS = 86_400_000
AT_MS = 1_767_225_600_000
"""2026-01-01, UTC."""


async def test_the_bills_of_a_server_are_summed_by_tenant_model_and_beginning(redis_server, tmp_path):
    made = {tenant: new_key(tenant, tenant) for tenant in ("lab", "studio")}
    callers = tmp_path / "callers.json"
    callers.write_text(f'{{"keys": [{", ".join(entry for _, entry in made.values())}]}}')
    async with servers(redis_server.url, tmp_path, count=1, api_key_file=callers) as [server]:

        async def finish(tenant: str, message: pb.GenerateRequest) -> pb.GenerationEvent:
            metadata = (("authorization", f"Bearer {made[tenant][0]}"),)
            events = await collect(server.stub.Generate(message, metadata=metadata))
            await kept(server.running)
            return events[-1]

        first = await finish("studio", request(1, STEPS))
        branched = request(2, STEPS, branch=pb.Branch(generation=first.generation, step=1))
        for tenant, message in (
            ("studio", request(1, STEPS)),  # from the cache: no bill
            ("studio", request(1, STEPS, cache=BYPASS)),
            ("studio", branched),
            ("lab", request(1, STEPS)),
        ):
            await finish(tenant, message)
    environment = {"SAFELIGHT_REDIS_URL": redis_server.url, "SAFELIGHT_CACHE_KEY_FILE": str(key_file(tmp_path))}
    ran = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "safelight_server.cli.main", "bills", "--json"),
        env=os.environ | environment,
        stdout=PIPE,
        stderr=PIPE,
    )
    out, errors = (part.decode() for part in await ran.communicate())
    found = Ran(ran.returncode or 0, out, errors).rows()
    assert {one["model_revision"] for one in found} == {"simulated/1"}
    assert [(one["tenant"], one["disposition"], one["pictures"], one["steps"]) for one in found] == [
        ("lab", "miss", 1, STEPS),
        ("studio", "branched", 1, STEPS - 1),
        ("studio", "miss", 2, 2 * STEPS),
    ]
    written = sum(float(str(bill["compute_s"])) for bill in await bills(redis_server.url, tmp_path))
    assert sum(float(str(one["compute_s"])) for one in found) == pytest.approx(written, abs=1e-5)


def test_models_are_apart_and_a_bill_without_one_is_of_an_unknown_model(command, stream):
    for model in ("icons/1", "icons/2", "icons/2"):
        stream.add(AT_MS, "studio", model_revision=model, disposition="miss", of_a_later_version=1)
    stream.add(AT_MS, "studio")
    found = command("--json").rows()
    assert [(one["model_revision"], one["disposition"], one["pictures"]) for one in found] == [
        ("icons/1", "miss", 1), ("icons/2", "miss", 2), ("unknown", "unknown", 1)
    ]  # fmt: skip
    assert found[1] | {"rows": 4, "steps": 2, "compute_s": 1.0} == found[1]
    lines = list(csv.DictReader(command("--csv").out.splitlines()))
    assert [{name: str(value) for name, value in one.items()} for one in found] == lines
    shown = command().out
    assert ["studio", "icons/2", "miss", "2", "4", "2", "1.0", "s"] in [
        line.replace("│", " ").split() for line in shown.splitlines()
    ]


def test_bills_are_told_apart_by_what_is_asked_for_and_priced(command, stream, tmp_path):
    for tenant, model, began in (("lab", "a/1", "miss"), ("lab", "b/1", "latent"), ("studio", "a/1", "miss")):
        stream.add(AT_MS, tenant, model_revision=model, disposition=began)
    assert command("--json", "--by", "disposition").rows() == [
        {"disposition": "latent", "pictures": 1, "rows": 2, "steps": 1, "compute_s": 0.5},
        {"disposition": "miss", "pictures": 2, "rows": 4, "steps": 2, "compute_s": 1.0},
    ]
    prices = tmp_path / "prices.toml"
    prices.write_text('currency = "USD"\n[instance_types.gpu]\nper_hour = 3.6\n')
    by_model = command("--json", "--by", "model_revision", "--price-file", str(prices), "--instance-type", "gpu").rows()
    assert [(one["model_revision"], one["cost"], one["currency"]) for one in by_model] == [
        ("a/1", 0.001, "USD"), ("b/1", 0.0005, "USD")
    ]  # fmt: skip
    assert "--by colour: must be of tenant, model_revision, disposition" in command("--by", "colour").errors
    assert "go together" in command("--price-file", str(prices)).errors


def test_a_time_has_its_first_moment_and_not_its_last(command, stream):
    for at_ms in (AT_MS - 1, AT_MS, AT_MS + DAY_MS - 1, AT_MS + DAY_MS):
        stream.add(at_ms, "studio")

    def pictures(*arguments: str) -> int:
        return sum(int(str(one["pictures"])) for one in command("--json", *arguments).rows())

    assert pictures("--since", "2026-01-01", "--until", "2026-01-02") == 2
    assert pictures("--since", "2026-01-02") == 1
    assert pictures("--until", "2026-01-01T00:00:00") == 1
    assert pictures("--tenant", "lab") == 0


def test_more_bills_than_a_page_are_all_counted_and_expired_ones_are_not(command, stream):
    for number in range(2100):
        stream.add(AT_MS + number, "studio")
    stream.add(AT_MS + 3000, "studio", until_s=1.0)
    assert [one["pictures"] for one in command("--json").rows()] == [2100]


def test_bills_that_cannot_be_opened_are_counted_and_the_others_are_shown(command, stream, tmp_path):
    others = tmp_path / "others.keys"
    others.write_text(new_key_file())
    stream.add(AT_MS, "lab", keys=others)
    stream.client.xadd(BILLS, {"x": b"no server wrote this"})
    stream.add(4 * AT_MS, "studio")
    ran = command("--json")
    assert (ran.code, json.loads(ran.out)["tenant"]) == (2, "studio")
    assert ran.errors.startswith("safelight: 2 bills are missing above: ")


def test_what_is_wrong_is_said_in_one_line(command, stream, tmp_path):
    empty = tmp_path / "empty.keys"
    empty.touch()
    stream.client.set(BILLS, "no stream")
    for arguments, said in (
        (("--json", "--csv"), "--json, --csv: give one of them"),
        (("--since", "2026-01-02", "--until", "2026-01-02"), "--until: must be after --since"),
        (("--cache-key-file", str(tmp_path / "absent")), "--cache-key-file / SAFELIGHT_CACHE_KEY_FILE: "),
        (("--cache-key-file", str(empty)), "--cache-key-file / SAFELIGHT_CACHE_KEY_FILE: "),
        (("--redis-url", "127.0.0.1"), "--redis-url / SAFELIGHT_REDIS_URL: Redis URL must specify"),
        (("--redis-url", "redis://127.0.0.1:1/0"), "--redis-url / SAFELIGHT_REDIS_URL: redis: Error 111"),
        ((), "--redis-url / SAFELIGHT_REDIS_URL: redis: WRONGTYPE"),
    ):
        ran = command(*arguments)
        assert (ran.code, ran.out, ran.errors.count("\n")) == (2, "", 1), ran.errors
        assert ran.errors.startswith(f"safelight: {said}")
