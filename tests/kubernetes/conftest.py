"""One cluster for all tests, with the chart's CPU profile installed in it."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safelight_server.api.identity import new_key

from tests.kubernetes.cluster import HOST, Cluster
from tests.kubernetes.load import Access
from tests.support.certificates import new_pair

ROOT = Path(__file__).parent.parent.parent
CHART = ROOT / "deploy" / "helm" / "safelight"
NAMESPACE = "safelight"
REDIS_PORT = 6379
SMALL = {"requests": {"cpu": "200m", "memory": "300Mi"}, "limits": {"memory": "1Gi"}}
"""Resources of the pods: two, and a third while they are replaced, must fit two cores."""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An empty cluster."""
    assert os.environ.get("SAFELIGHT_TEST_CLUSTER") == "unshared", "run these tests with `make test-kubernetes`"
    made = Cluster(tmp_path_factory.mktemp("k"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


def imported(cluster: Cluster, target: str) -> dict[str, str]:
    """Imports an image on both nodes; returns its repository and digest, as the chart's values."""
    name = f"localhost/safelight/{target}"
    digest = cluster.import_image(ROOT / "out" / "image" / f"{target}.tar", name)
    return {"repository": name, "digest": digest}


@pytest.fixture(scope="session")
def gateway(cluster: Cluster) -> dict[str, str]:
    """The gateway's image on both nodes: repository and digest, as the chart's values."""
    return imported(cluster, "gateway")


@pytest.fixture(scope="session")
def triton(cluster: Cluster) -> dict[str, str]:
    """Triton's image on both nodes."""
    return imported(cluster, "triton")


@pytest.fixture(scope="session")
def redis(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Redis outside of the cluster."""
    folder = tmp_path_factory.mktemp("redis")
    options = ["--port", str(REDIS_PORT), "--bind", HOST, "--dir", str(folder), "--save", "", "--protected-mode", "no"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(["redis-server", *options], stdout=log, stderr=log)
    yield f"redis://{HOST}:{REDIS_PORT}/0"
    server.terminate()
    server.wait()


def values(folder: Path, **changes: Any) -> list[str]:
    """helm's arguments for these values, which are added to those of the profile."""
    file = folder / f"values-{len(list(folder.iterdir()))}.json"
    file.write_text(json.dumps(changes))
    return ["--values", str(file)]


def secret(name: str, namespace: str, kind: str = "Opaque", **data: bytes) -> dict[str, Any]:
    """A Secret; underscores in the names of its entries stand for dots."""
    encoded = {key.replace("_", "."): base64.b64encode(value).decode() for key, value in data.items()}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": kind,
        "metadata": {"name": name, "namespace": namespace},
        "data": encoded,
    }


def prepare(cluster: Cluster, namespace: str, redis: str, folder: Path) -> Access:
    """Makes a namespace, under Pod Security `restricted`, with all the Secrets of the profiles; and a caller's key."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": labels}})
    certificate, key = new_pair("safelight")
    caller, entry = new_key("test", "studio", admin=False)
    seals = folder / "cache.keys"
    subprocess.run([ROOT / ".venv/bin/safelight", "keys", "cache", seals], check=True, stdout=subprocess.DEVNULL)
    cluster.apply(
        secret("safelight-tls", namespace, "kubernetes.io/tls", tls_crt=certificate, tls_key=key, ca_crt=certificate),
        secret("safelight-keys", namespace, keys_json=f'{{"keys": [{entry}]}}'.encode()),
        secret("safelight-redis", namespace, url=redis.encode()),
        secret("safelight-cache", namespace, cache_keys=seals.read_bytes()),
        secret("safelight-test-key", namespace, key=caller.encode()),
    )
    return Access(certificate, caller)


@pytest.fixture(scope="session")
def access(cluster: Cluster, redis: str, tmp_path_factory: pytest.TempPathFactory) -> Access:
    """The namespace of the release with its Secrets, and a caller's key."""
    return prepare(cluster, NAMESPACE, redis, tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="session")
def release(
    cluster: Cluster, gateway: dict[str, str], access: Access, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """The chart's CPU profile, installed as `safelight`; the arguments of `helm upgrade` that change nothing."""
    profile = ["--values", str(CHART / "profiles" / "cpu.yaml")]
    small = values(tmp_path_factory.mktemp("values"), image=gateway, resources=SMALL, drainSeconds=30)
    arguments = ["safelight", str(CHART), "--namespace", NAMESPACE, *profile, *small, "--wait", "--timeout", "300s"]
    cluster.helm("install", *arguments)
    return arguments
