"""Quotas over gRPC: a tenant beyond its limits is refused with a retry time; others are not affected."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from safelight import Client, Finished, GenerationError
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight.v1 import quotas_pb2
from safelight_server import files
from safelight_server.api.identity import new_key
from safelight_server.app.server import Running
from safelight_server.telemetry.figures import by_label

from load_tests.ports import free_port
from tests.conftest import eventually, serving_here
from tests.integration.test_cache import kept
from tests.integration.test_requests import SIMULATED, refusal, request
from tests.support.http import GENERATIONS, body
from tests.support.http import client as http_client
from tests.unit.test_token_buckets import Clock

TENANTS = ("studio", "lab")
FEW = {"requests": {"per_s": 2, "burst": 3}}


class Studios:
    """A server with two tenants and an administrator, and a client for each."""

    def __init__(self, running: Running, keys: dict[str, str]) -> None:
        self.running = running
        self.keys = keys
        self.clients = {name: Client(running.address, api_key=key) for name, key in keys.items()}

    def generate(self, tenant: str, **spec: object) -> Any:
        message = request(**{"num_inference_steps": 2} | spec)
        message.cache.mode = pb.CachePolicy.MODE_BYPASS
        return self.send(tenant, message)

    def send(self, tenant: str, message: pb.GenerateRequest) -> Any:
        stub = stubs.GenerationServiceStub(self.clients[tenant].channel)
        return stub.Generate(message, metadata=(("authorization", f"Bearer {self.keys[tenant]}"),))

    async def finish(self, tenant: str, **spec: object) -> pb.Finished:
        events = [answer.event async for answer in self.generate(tenant, **spec)]
        return events[-1].finished

    async def left(self, tenant: str) -> quotas_pb2.TenantQuota:
        return next(one for one in await self.clients["admin"].quotas() if one.tenant == tenant)


@contextlib.asynccontextmanager
async def opened(folder: Path, quotas: dict[str, object], **settings: object) -> AsyncIterator[Studios]:
    made = {name: new_key(name, name, admin=name == "admin") for name in (*TENANTS, "admin")}
    keys, limits = folder / "keys.json", folder / "quotas.json"
    keys.write_text(f'{{"keys": [{", ".join(entry for _, entry in made.values())}]}}')
    limits.write_text(json.dumps(quotas))
    given = SIMULATED | {"api_key_file": keys, "quota_file": limits} | settings
    async with serving_here(**given) as running:
        studios = Studios(running, {name: key for name, (key, _) in made.items()})
        try:
            yield studios
        finally:
            for client in studios.clients.values():
                await client.close()


async def test_one_tenant_is_beyond_its_rate_and_the_other_is_undisturbed(tmp_path: Path) -> None:
    async with opened(tmp_path, {"tenants": {"studio": {"requests": {"per_s": 0.01, "burst": 2}}}}) as studios:
        for _ in range(2):
            assert (await studios.finish("studio")).status.code == 0
        code, found = await refusal(studios.generate("studio"))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        info = found["ErrorInfo"]
        assert info.reason == "REQUEST_RATE_EXCEEDED"
        assert dict(info.metadata) == {
            "subject": "tenant studio", "bound": "requests", "limit_per_s": "0.01", "burst": "2"
        }  # fmt: skip
        [violation] = found["QuotaFailure"].violations
        assert violation.subject == "tenant studio"
        assert violation.description.startswith("tenant studio sends too many requests")
        assert 0 < found["RetryInfo"].retry_delay.ToNanoseconds() / 1e9 <= 100.01
        for _ in range(5):
            assert (await studios.finish("lab")).status.code == 0
        refused = by_label(studios.running.generations._metrics._refused, "reason")
        assert {reason: count for reason, count in refused.items() if count} == {"REQUEST_RATE_EXCEEDED": 1}, (
            "by reason, whoever the tenant is"
        )


async def test_compute_is_charged_as_the_usage_says_and_a_cached_picture_costs_none(tmp_path: Path) -> None:
    limit = {"compute_s": {"per_s": 1e-5, "burst": 0.02}}
    async with opened(tmp_path, {"default": limit, "tenants": {"lab": {"compute_s": None}}}) as studios:
        message = request(num_inference_steps=20)
        message.spec.outputs.add(seed=3)
        events = [answer.event async for answer in studios.send("lab", message)]
        assert events[-1].finished.usage.compute_time.ToNanoseconds() > 0
        assert not (await studios.left("lab")).HasField("compute_seconds")

        usage = (await studios.finish("studio", num_inference_steps=20)).usage
        left = (await studios.left("studio")).compute_seconds
        assert left.used == pytest.approx(usage.compute_time.ToNanoseconds() / 1e9, abs=0.002)
        assert left.left < 0, "it went into debt by what it cost"
        code, found = await refusal(studios.generate("studio"))
        assert (code, found["ErrorInfo"].reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "COMPUTE_QUOTA_EXCEEDED")
        wait_s = found["RetryInfo"].retry_delay.ToNanoseconds() / 1e9
        assert wait_s == pytest.approx(-left.left / 1e-5, rel=0.1)
        assert (await studios.finish("lab")).status.code == 0


async def test_cached_pictures_count_as_requests_and_cost_no_compute(tmp_path: Path) -> None:
    limits = {"requests": {"per_s": 0.001, "burst": 3}, "compute_s": {"per_s": 1e-6, "burst": 100}}
    async with opened(tmp_path, {"default": limits}) as studios:
        message = request(num_inference_steps=2)
        message.spec.outputs.add(seed=3)
        for number in range(3):
            if number == 1:
                used = (await studios.left("studio")).compute_seconds.used
            events = [answer.event async for answer in studios.send("studio", message)]
            assert events[-1].finished.status.code == 0
            await kept(studios.running)
        after = await studios.left("studio")
        assert after.compute_seconds.used == pytest.approx(used, abs=1e-4)
        assert after.requests.left == pytest.approx(0, abs=0.1)
        code, _ = await refusal(studios.send("studio", message))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_request_that_is_sent_again_with_its_id_counts_once(tmp_path: Path) -> None:
    async with opened(tmp_path, {"default": {"requests": {"per_s": 0.001, "burst": 1}}}) as studios:
        message = request(num_inference_steps=2)
        message.request_id = "c2f1b4de-0000-4000-8000-000000000001"
        names = set()
        for _ in range(3):
            names |= {answer.event.generation async for answer in studios.send("studio", message)}
        assert len(names) == 1
        message.request_id = "c2f1b4de-0000-4000-8000-000000000002"
        code, _ = await refusal(studios.send("studio", message))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_refused_client_waits_as_long_as_it_is_told_and_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path, {"default": {"requests": {"per_s": 5, "burst": 1}}}) as studios:
        clock, slept = Clock(), []
        studios.running.quotas._local._clock = clock
        mine, sleep = asyncio.current_task(), asyncio.sleep

        async def noted(delay: float) -> None:
            if asyncio.current_task() is mine:
                slept.append(delay)
                clock.now += delay
                delay = 0.0
            await sleep(delay)

        monkeypatch.setattr(asyncio, "sleep", noted)
        for _ in range(3):
            events = [event async for event in studios.clients["studio"].generate("a red potion", steps=2)]
            assert isinstance(events[-1], Finished)
        assert len(slept) == 2, "it asks once more for each refusal, when that can succeed"
        assert all(0.2 <= delay <= 0.25 for delay in slept)


async def test_a_client_does_not_wait_beyond_its_deadline_or_its_patience(tmp_path: Path) -> None:
    async with opened(tmp_path, {"default": {"requests": {"per_s": 0.01, "burst": 1}}}) as studios:
        await studios.finish("studio")
        hasty = Client(studios.running.address, api_key=studios.keys["studio"], patience_s=1)
        for client, timeout_s in ((studios.clients["studio"], 30.0), (hasty, None)):
            with pytest.raises(GenerationError) as caught:
                async for _ in client.generate("a red potion", steps=2, timeout_s=timeout_s):
                    pass
            assert caught.value.reason == "REQUEST_RATE_EXCEEDED"
            assert caught.value.retry_after_s is not None and 30 < caught.value.retry_after_s <= 100.01
        await hasty.close()


async def test_new_limits_count_while_the_server_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LOOK_EVERY_S", 0.01)
    async with opened(tmp_path, {}) as studios:
        assert not (await studios.left("studio")).HasField("requests")
        new = tmp_path / "new.json"
        new.write_text(json.dumps({"default": FEW}))  # a few bytes
        new.replace(tmp_path / "quotas.json")
        quotas = studios.running.quotas
        await eventually(lambda: quotas._limits.of("studio").requests is not None)
        assert (await studios.left("studio")).requests.burst == 3


async def test_administrators_list_the_quotas_of_all_tenants_page_by_page(tmp_path: Path) -> None:
    tenants = {f"tenant-{number:03}": FEW for number in range(120)}
    async with opened(tmp_path, {"tenants": tenants}) as studios:
        found = await studios.clients["admin"].quotas()
        assert [one.tenant for one in found] == sorted([*tenants, *TENANTS, "admin"])
        assert [one.HasField("requests") for one in found].count(True) == 120
        with pytest.raises(GenerationError) as caught:
            await studios.clients["studio"].quotas()
        assert caught.value.reason == "ADMIN_ONLY"


async def test_the_command_prints_a_row_for_each_limit(tmp_path: Path) -> None:
    limits = {"requests": {"per_s": 0.5, "burst": 3}, "compute_s": {"per_s": 2, "burst": 90}}
    async with opened(tmp_path, {"tenants": {"studio": limits}}) as studios:
        await studios.finish("studio")
        command = (sys.executable, "-m", "safelight_server.cli.main", "quotas")
        known = {"SAFELIGHT_TARGET": studios.running.address, "SAFELIGHT_API_KEY": studios.keys["admin"]}
        ran = await asyncio.create_subprocess_exec(
            *command, env={**os.environ, **known, "COLUMNS": "120"}, stdout=PIPE, stderr=PIPE
        )
        out, errors = (part.decode() for part in await ran.communicate())
        assert (ran.returncode, errors) == (0, "")
        rows = {tuple(line.replace("│", " ").split()[:4]) for line in out.splitlines()}
        assert {("studio", "requests", "0.5", "3"), ("studio", "compute", "2", "s")} <= rows
        assert ("lab", "no", "limits") in rows


async def test_requests_over_http_count_for_the_same_quota(tmp_path: Path) -> None:
    quotas = {"tenants": {"studio": {"requests": {"per_s": 0.01, "burst": 2}}}}
    async with opened(tmp_path, quotas, http_port=free_port()) as studios, http_client(studios.running) as http:
        assert (await studios.finish("studio")).status.code == 0
        statuses = []
        for tenant in ("studio", "studio", "lab"):
            headers = {"authorization": f"Bearer {studios.keys[tenant]}"}
            response = await http.post(GENERATIONS, json=body(), headers=headers)
            statuses.append(response.status_code)
            if response.status_code == 429:
                assert response.json()["error"]["code"] == "REQUEST_RATE_EXCEEDED"
                assert 0 < int(response.headers["retry-after"]) <= 101
        assert statuses == [200, 429, 200]
