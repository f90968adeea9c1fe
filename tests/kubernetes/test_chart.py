"""The chart on a real cluster: install, upgrade, rollback, drain and death of pods, while clients watch."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import eventually
from tests.kubernetes.cluster import NODES, Cluster
from tests.kubernetes.conftest import CHART, NAMESPACE, ROOT, values
from tests.kubernetes.keda import source
from tests.kubernetes.load import SEEDS, Access, develop, under_load

pytestmark = pytest.mark.timeout(900)


def pods(cluster: Cluster, release: str = "safelight") -> list[dict[str, Any]]:
    """The gateway's pods that are not terminating."""
    label = f"app.kubernetes.io/name=safelight,app.kubernetes.io/instance={release}"
    found = cluster.get("pods", "-n", NAMESPACE, "-l", label)["items"]
    return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]


def service(cluster: Cluster, name: str = "safelight") -> str:
    """HOST:PORT of a service."""
    return cluster.get("service", name, "-n", NAMESPACE)["spec"]["clusterIP"] + ":8421"


async def all_ready(cluster: Cluster, count: int) -> None:
    """Waits until exactly `count` pods are ready and none is terminating."""
    while True:
        label = "app.kubernetes.io/name=safelight,app.kubernetes.io/instance=safelight"
        found = (await asyncio.to_thread(cluster.get, "pods", "-n", NAMESPACE, "-l", label))["items"]
        ready = [
            pod
            for pod in found
            if "deletionTimestamp" not in pod["metadata"]
            and all(status["ready"] for status in pod["status"].get("containerStatuses", [{"ready": False}]))
        ]
        if len(ready) == len(found) == count:
            return
        await asyncio.sleep(0.5)


@pytest.fixture(scope="module")
def expected(cluster: Cluster, release: list[str], access: Access) -> dict[int, str]:
    """The digests of undisturbed pictures, by seed."""

    async def ask() -> dict[int, str]:
        async with access.client(service(cluster)) as client:
            return {seed: (await develop(client, seed))[0] for seed in SEEDS}

    return asyncio.run(ask())


def test_helm_test_develops_a_picture(cluster, release):
    said = cluster.helm("test", "safelight", "--namespace", NAMESPACE, "--logs", "--timeout", "200s")
    assert "Succeeded" in said
    assert "/tmp/picture.png" in said


def test_pods_are_spread_and_have_no_token(cluster, release):
    found = pods(cluster)
    assert {pod["spec"]["nodeName"] for pod in found} == set(NODES)
    for pod in found:
        mounts = [mount["mountPath"] for each in pod["spec"]["containers"] for mount in each["volumeMounts"]]
        assert not [mount for mount in mounts if "serviceaccount" in mount]


def test_pod_security_restricted_is_enforced(cluster, release):
    """The chart's pods exist, so they comply; a pod that does not comply is refused."""
    with pytest.raises(subprocess.CalledProcessError) as refused:
        cluster.kubectl("run", "root", "-n", NAMESPACE, "--image=localhost/x:1", "--restart=Never")
    assert "violates PodSecurity" in refused.value.stderr


def test_replicas_find_each_other_by_the_headless_service(cluster, release):
    name = "safelight-headless.safelight.svc.cluster.local"
    code = f"import socket; print(*{{a[4][0] for a in socket.getaddrinfo('{name}', 8421)}})"
    pod = pods(cluster)[0]["metadata"]["name"]
    said = cluster.kubectl("exec", pod, "-n", NAMESPACE, "--", "/opt/safelight/bin/python", "-c", code)
    assert set(said.split()) == {pod["status"]["podIP"] for pod in pods(cluster)}


@pytest.mark.parametrize("profile", sorted(path.stem for path in (CHART / "profiles").glob("*.yaml")))
def test_the_api_server_accepts_every_profile(cluster, access, gateway, tmp_path, profile):
    crd = json.loads(
        subprocess.run(
            ["go", "mod", "download", "-json", "sigs.k8s.io/gateway-api@v1.3.0"],
            cwd=ROOT / "tools" / "kubernetes", check=True, capture_output=True, text=True,
        ).stdout
    )  # fmt: skip
    cluster.kubectl(
        "apply", "--server-side", "-f", crd["Dir"] + "/config/crd/standard/gateway.networking.k8s.io_grpcroutes.yaml"
    )
    cluster.kubectl("wait", "--for=condition=Established", "crd/grpcroutes.gateway.networking.k8s.io")
    for definition in sorted((source() / "config" / "crd" / "bases").glob("*scaledobjects.yaml")):
        cluster.kubectl("apply", "--server-side", "-f", str(definition))
    cluster.kubectl("wait", "--for=condition=Established", "crd/scaledobjects.keda.sh")
    given = {"image": gateway}
    if profile == "triton-cpu":
        given["triton"] = {"image": gateway}
    if profile == "to-zero":
        given["scaling"] = {"scaler": {"image": gateway}}
    names = ("cpu", profile) if profile in ("critical", "spot", "to-zero") else (profile,)
    profiles = [argument for name in names for argument in ("--values", str(CHART / "profiles" / f"{name}.yaml"))]
    file = [*profiles, *values(tmp_path, **given)]
    rendered = cluster.helm("template", "other", str(CHART), "--namespace", NAMESPACE, *file)
    kinds = {document["kind"] for document in yaml.safe_load_all(rendered) if document}
    assert "Deployment" in kinds
    cluster.kubectl("apply", "--server-side", "--dry-run=server", "-n", NAMESPACE, "-f", "-", given=rendered)


async def test_an_upgrade_under_load_loses_no_generation_and_no_bit(cluster, release, access, expected, tmp_path):
    before = {pod["metadata"]["name"] for pod in pods(cluster)}
    async with under_load(access, service(cluster), expected) as load:
        changed = values(tmp_path, podAnnotations={"changed": "yes"})
        await asyncio.to_thread(cluster.helm, "upgrade", *release, *changed)
        await all_ready(cluster, 2)
    assert before.isdisjoint(pod["metadata"]["name"] for pod in pods(cluster))
    assert load.faults == []
    print(f"{load.pictures} pictures, {load.previews} previews")


async def test_a_broken_revision_is_rolled_back(cluster, release, access, expected, gateway, tmp_path):
    before = {pod["metadata"]["name"] for pod in pods(cluster)}
    broken = values(tmp_path, image=gateway | {"digest": "sha256:" + "0" * 64})
    arguments = [*release, *broken, "--rollback-on-failure", "--timeout", "30s"]
    async with under_load(access, service(cluster), expected) as load:
        with pytest.raises(subprocess.CalledProcessError):
            await asyncio.to_thread(cluster.helm, "upgrade", *arguments)
        await all_ready(cluster, 2)
    assert load.faults == []
    assert before == {pod["metadata"]["name"] for pod in pods(cluster)}, "no pod that served was touched"
    history = json.loads(cluster.helm("history", "safelight", "--namespace", NAMESPACE, "--output", "json"))
    assert history[-1]["status"] == "deployed"
    assert "Rollback" in history[-1]["description"]


async def test_a_drained_node_loses_no_generation_and_no_bit(cluster, release, access, expected):
    async with under_load(access, service(cluster), expected) as load:
        try:
            drain = ("drain", "n1", "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=300s")
            await asyncio.to_thread(lambda: cluster.kubectl(*drain, timeout_s=320))
            await all_ready(cluster, 2)
            assert {pod["spec"]["nodeName"] for pod in pods(cluster)} == {"n2"}
        finally:
            cluster.kubectl("uncordon", "n1")
    assert load.faults == []
    print(f"{load.pictures} pictures, {load.previews} previews")


async def test_a_killed_pod_loses_no_generation_and_no_bit(cluster, release, access, expected):
    async with under_load(access, service(cluster), expected) as load:
        for pod in pods(cluster):
            await asyncio.to_thread(cluster.kill_container, pod["metadata"]["name"], NAMESPACE, "gateway")
            until = load.pictures + 4
            await eventually(lambda: load.pictures >= until or bool(load.faults), 200.0)
            await all_ready(cluster, 2)
    assert load.faults == []
    restarts = [status["restartCount"] for pod in pods(cluster) for status in pod["status"]["containerStatuses"]]
    assert restarts == [1, 1]
    print(f"{load.pictures} pictures, {load.previews} previews")


async def test_the_budget_keeps_the_second_pod(cluster, release):
    """While one pod is being evicted, the other one may not be."""
    refused = []
    for pod in pods(cluster):
        name = pod["metadata"]["name"]
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": NAMESPACE}}
        path = f"/api/v1/namespaces/{NAMESPACE}/pods/{name}/eviction"
        try:
            cluster.kubectl("create", "--raw", path, "-f", "-", given=json.dumps(eviction))
        except subprocess.CalledProcessError as error:
            refused.append(error.stderr)
    assert len(refused) == 1
    assert "disruption budget" in refused[0]
    await all_ready(cluster, 2)


async def test_triton_beside_the_gateway_gives_the_same_bits(
    cluster, release, access, expected, gateway, triton, tmp_path
):
    small = {"requests": {"cpu": "200m", "memory": "300Mi"}, "limits": {"memory": "1Gi"}}
    given = values(
        Path(tmp_path), image=gateway, replicas=1, resources=small, drainSeconds=10,
        triton={"image": triton, "resources": small},
    )  # fmt: skip
    profile = ["--values", str(CHART / "profiles" / "triton-cpu.yaml")]
    cluster.helm(
        "install", "triton", str(CHART), "--namespace", NAMESPACE, *profile, *given, "--wait", "--timeout", "380s"
    )
    try:
        async with access.client(service(cluster, "triton-safelight")) as client:
            assert {seed: (await develop(client, seed))[0] for seed in SEEDS} == expected
        [pod] = pods(cluster, "triton")
        regions = cluster.kubectl(
            "exec", pod["metadata"]["name"], "-n", NAMESPACE, "-c", "gateway", "--", "ls", "/dev/shm"
        )
        assert regions.strip(), "no tensor goes through shared memory"
    finally:
        cluster.helm("uninstall", "triton", "--namespace", NAMESPACE, "--wait")
