"""KEDA scales pods as `safelight scaler` computes: up under load, to zero, and back for a held call."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import grpc
import pytest
import safelight

from tests.conftest import eventually
from tests.kubernetes.cluster import Cluster
from tests.kubernetes.conftest import CHART, SMALL, imported, prepare, values
from tests.kubernetes.keda import keda, scraping
from tests.kubernetes.load import SEEDS, Access, develop, under_load
from tests.support.prometheus_server import PrometheusServer

pytestmark = pytest.mark.timeout(900)
NAMESPACE = "scaled"
WAIT_S = 300.0
LITTLE = {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"memory": "512Mi"}}


def replicas(cluster: Cluster) -> tuple[int, int]:
    """The numbers of wanted and of ready replicas."""
    deployment = cluster.get("deployment", "safelight", "-n", NAMESPACE)
    return deployment["spec"]["replicas"], deployment["status"].get("readyReplicas", 0)


async def until(cluster: Cluster, what: str, wanted: range) -> None:
    """Waits until the number of replicas that are wanted and ready is in the range, and no other pod exists."""
    seen: list[tuple[int, int]] = []
    label = "app.kubernetes.io/name=safelight,app.kubernetes.io/instance=safelight"
    end = asyncio.get_running_loop().time() + WAIT_S
    while True:
        now = await asyncio.to_thread(replicas, cluster)
        if not seen or seen[-1] != now:
            seen.append(now)
        if now[0] == now[1] and now[0] in wanted:
            pods = await asyncio.to_thread(cluster.get, "pods", "-n", NAMESPACE, "-l", label)
            if len(pods["items"]) == now[0]:
                return
        assert asyncio.get_running_loop().time() < end, f"{what}: (wanted, ready) was {seen}"
        await asyncio.sleep(0.5)


@pytest.fixture(scope="module")
def fleet(cluster, gateway, redis, tmp_path_factory) -> Iterator[tuple[Access, str, PrometheusServer]]:
    """A fleet that may scale to zero: its callers' key, HOST:PORT of its service, and the Prometheus that scrapes it."""
    folder = tmp_path_factory.mktemp("keda")
    access = prepare(cluster, NAMESPACE, redis.replace("/0", "/1"), folder)
    with ExitStack() as ends:
        ends.enter_context(keda(cluster, folder))
        server = ends.enter_context(scraping(cluster, tmp_path_factory.mktemp("prometheus"), NAMESPACE))
        scaling = {
            "prometheus": server.url,
            "maxReplicas": 3,
            "utilization": 0.05,  # so low that the test's few clients need several replicas
            "pollingSeconds": 5,
            "cooldownSeconds": 15,
            "scaler": {"image": imported(cluster, "scaler"), "replicas": 1, "resources": LITTLE},
            "activator": {"replicas": 1, "holdSeconds": 240, "resources": LITTLE},
        }
        profiles = [
            part for name in ("cpu", "to-zero") for part in ("--values", str(CHART / "profiles" / f"{name}.yaml"))
        ]
        given = values(folder, image=gateway, resources=SMALL, drainSeconds=10, preStopSeconds=3, scaling=scaling)
        where = ("--namespace", NAMESPACE)
        cluster.helm("install", "safelight", str(CHART), *where, *profiles, *given, "--timeout", "300s")
        try:
            for name in ("scaler", "activator"):
                cluster.kubectl(
                    "rollout",
                    "status",
                    f"deployment/safelight-{name}",
                    "-n",
                    NAMESPACE,
                    "--timeout=240s",
                    timeout_s=260,
                )
            address = cluster.get("service", "safelight", "-n", NAMESPACE)["spec"]["clusterIP"]
            yield access, f"{address}:8421", server
        finally:
            cluster.helm("uninstall", "safelight", *where, "--wait", "--timeout", "120s")


async def test_an_idle_fleet_goes_and_a_call_that_is_held_brings_it_back(cluster, fleet):
    access, target, server = fleet
    await until(cluster, "idle", range(1))
    async with replace(access, api_key="not-a-key").client(target) as stranger:
        with pytest.raises(safelight.GenerationError) as refused:
            await stranger.generate("a red potion", seed=1).picture()
        assert refused.value.code is grpc.StatusCode.UNAUTHENTICATED
    assert replicas(cluster) == (0, 0), "who has no key wakes nobody"
    async with access.client(target) as client:
        asked = asyncio.create_task(develop(client, SEEDS[0]))
        await eventually(lambda: [one["value"][1] for one in server.ask("sum(safelight_held_calls)")] == ["1"], 60.0)
        digest, previews = await asyncio.wait_for(asked, WAIT_S)
        assert previews > 0
        assert replicas(cluster)[0] >= 1
        assert (await develop(client, SEEDS[0]))[0] == digest


async def test_the_fleet_follows_its_load(cluster, fleet):
    access, target, _ = fleet
    async with access.client(target) as client:
        expected = {seed: (await develop(client, seed))[0] for seed in SEEDS}
    async with under_load(access, target, expected) as load:
        await until(cluster, "load", range(2, 4))
        before = load.pictures
        await eventually(lambda: load.pictures >= before + 2 * len(SEEDS) or bool(load.faults), 200.0)
    assert load.faults == []
    await until(cluster, "no load", range(1))
    async with access.client(target) as client:
        assert (await develop(client, SEEDS[0]))[0] == expected[SEEDS[0]]
    print(f"{load.pictures} pictures, {load.previews} previews")
