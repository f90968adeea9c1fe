"""The NetworkPolicies of the chart and of deploy/README.md, enforced by kube-router: who reaches what, and who does not."""

from __future__ import annotations

import asyncio
import json
import re
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest
import yaml

from tests.kubernetes.cluster import HOST, Cluster
from tests.kubernetes.conftest import CHART, REDIS_PORT, ROOT, SMALL, imported, prepare, values
from tests.kubernetes.keda import define
from tests.kubernetes.test_keda import LITTLE

pytestmark = pytest.mark.timeout(900)
NAMESPACE = "policed"
PYTHON = "/opt/safelight/bin/python"
PROMETHEUS_PORT, ARCHIVE_PORT, OTHER_PORT = 9090, 5433, 5432
"""Where something listens outside of the cluster: what the scaler asks, what a rule of `networkPolicy.egress` allows at
this address alone, and what nobody in the release may call."""
HTTP_PORT = 8080
LISTEN = """
import socketserver, sys
socketserver.TCPServer(("0.0.0.0", int(sys.argv[1])), socketserver.BaseRequestHandler).serve_forever()
"""
CALL = """
import json, socket, sys
from concurrent.futures import ThreadPoolExecutor

def answers(target):
    host, _, port = target.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 5).close()
    except OSError:
        return False
    return True

targets = json.loads(sys.argv[1])
with ThreadPoolExecutor(len(targets)) as at_once:
    found = zip(targets, at_once.map(answers, targets.values()))
    print(json.dumps([name for name, answered in found if answered]))
"""
READY_S = 240.0
BOX = re.compile(r"^```yaml\n(.*?)^```", re.DOTALL | re.MULTILINE)


@contextmanager
def listening(port: int) -> Iterator[None]:
    """Takes connections outside of the cluster while the block runs, and closes them."""
    with socketserver.TCPServer((HOST, port), socketserver.BaseRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def standing(name: str, namespace: str, image: dict[str, str], port: int, **labels: str) -> list[dict[str, object]]:
    """A namespace and a pod in it that listens at a port and calls whom a test wants."""
    container = {
        "name": "python",
        "image": f"{image['repository']}@{image['digest']}",
        "command": [PYTHON, "-c", LISTEN, str(port)],
        "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}},
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": 10001, "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"},
        },
    }  # fmt: skip
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}},
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace, "labels": labels},
            "spec": {
                "automountServiceAccountToken": False,
                "terminationGracePeriodSeconds": 1,
                "containers": [container],
            },
        },
    ]


@dataclass(frozen=True)
class Scene:
    """Pods that call each other.

    Attributes:
        callers: namespace and pod of each caller, by its name in `REACHES`.
        targets: HOST:PORT by the name in `REACHES`.
    """

    cluster: Cluster
    callers: dict[str, tuple[str, str]]
    targets: dict[str, str]

    def reached(self, caller: str) -> set[str]:
        """What a caller reaches now. Its own ports, and the service of which it may be a part, do not count."""
        namespace, pod = self.callers[caller]
        mine = (caller, "service") if caller in ("gateway", "activator") else (caller,)
        targets = {name: target for name, target in self.targets.items() if not name.startswith(mine)}
        command = ("exec", pod, "-n", namespace, "--", PYTHON, "-c", CALL, json.dumps(targets))
        return set(json.loads(self.cluster.kubectl(*command)))

    async def reaches(self, caller: str, wanted: set[str]) -> None:
        """Waits until a caller reaches exactly this: rules follow pods and policies with some delay."""
        end = time.monotonic() + READY_S
        while (found := await asyncio.to_thread(self.reached, caller)) != wanted:
            assert time.monotonic() < end, (
                f"{caller} reaches {sorted(found - wanted)} and must not, does not reach {sorted(wanted - found)}"
            )
            await asyncio.sleep(0.5)


GATEWAY = {"gateway grpc", "gateway http", "gateway metrics", "gateway probe"}
BESIDE = {"activator grpc", "activator http", "activator metrics", "scaler grpc"}
OUTSIDE = {"Redis", "Prometheus", "archive", "other"}
"""What no policy of the chart protects; their owners do."""
CALLS = {"gateway grpc", "gateway http", "activator grpc", "activator http", "service"}
REACHES = {
    "client": CALLS | OUTSIDE,
    "scraper": {"gateway metrics", "activator metrics"} | OUTSIDE | {"client's port"},
    "keda": {"scaler grpc"} | OUTSIDE | {"client's port"},
    "stranger": OUTSIDE | {"client's port"},
    "neighbour": OUTSIDE | {"client's port"},
    "gateway": {"Redis", "archive", "Redis in the cluster"},
    "activator": {"gateway grpc", "gateway http"},
    "scaler": {"Prometheus"},
}
"""`client` is one that `networkPolicy.clients` admits, `neighbour` a pod of the release's namespace that it does not."""


@pytest.fixture(scope="module")
def scene(cluster, gateway, redis, tmp_path_factory) -> Iterator[Scene]:
    """A fleet with scaler and activator, without KEDA, whose policies admit the namespace `callers`, and pods around it."""
    folder = tmp_path_factory.mktemp("policed")
    prepare(cluster, NAMESPACE, redis.replace("/0", "/2"), folder)
    define(cluster)
    standers = {
        "client": ("callers", ARCHIVE_PORT),
        "scraper": ("observability", OTHER_PORT),
        "keda": ("keda", OTHER_PORT),
        "stranger": ("strangers", OTHER_PORT),
        "redis": ("data", REDIS_PORT),
    }
    for name, (namespace, port) in standers.items():
        cluster.apply(*standing(name, namespace, gateway, port, app=name))
    cluster.apply(standing("neighbour", NAMESPACE, gateway, OTHER_PORT)[1])
    [of_redis] = BOX.findall((ROOT / "deploy" / "README.md").read_text())
    cluster.apply(yaml.safe_load(of_redis.replace("pictures", NAMESPACE)))
    archive = {"to": [{"ipBlock": {"cidr": f"{HOST}/32"}}], "ports": [{"port": ARCHIVE_PORT, "protocol": "TCP"}]}
    scaling = {
        "prometheus": f"http://{HOST}:{PROMETHEUS_PORT}",
        "scaler": {"image": imported(cluster, "scaler"), "replicas": 1, "resources": LITTLE},
        "activator": {"replicas": 1, "resources": LITTLE},
    }
    clients = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "callers"}}}]
    given = values(
        folder, image=gateway, resources=SMALL, drainSeconds=10, preStopSeconds=3, scaling=scaling,
        ports={"http": HTTP_PORT}, networkPolicy={"clients": clients, "egress": [archive]},
    )  # fmt: skip
    profiles = [part for name in ("cpu", "to-zero") for part in ("--values", str(CHART / "profiles" / f"{name}.yaml"))]
    where = ("--namespace", NAMESPACE)
    cluster.helm("install", "safelight", str(CHART), *where, *profiles, *given)
    with ExitStack() as ends:
        ends.callback(cluster.helm, "uninstall", "safelight", *where, "--wait", "--timeout", "120s")
        for port in (PROMETHEUS_PORT, ARCHIVE_PORT, OTHER_PORT):
            ends.enter_context(listening(port))
        for name in ("safelight", "safelight-scaler", "safelight-activator"):
            wait = ("rollout", "status", f"deployment/{name}", *where, "--timeout=240s")
            cluster.kubectl(*wait, timeout_s=260)
        callers = {name: (namespace, name) for name, (namespace, _) in standers.items()}
        callers["neighbour"] = (NAMESPACE, "neighbour")
        for namespace, pod in callers.values():
            cluster.kubectl(
                "wait", "--for=condition=Ready", f"pod/{pod}", "-n", namespace, "--timeout=120s", timeout_s=140
            )
        for name, label in (
            ("gateway", "safelight"),
            ("activator", "safelight-activator"),
            ("scaler", "safelight-scaler"),
        ):
            [pod] = cluster.get("pods", *where, "-l", f"app.kubernetes.io/name={label}")["items"]
            callers[name] = (NAMESPACE, pod["metadata"]["name"])
        address = {
            name: cluster.get("pod", pod, "-n", namespace)["status"]["podIP"]
            for name, (namespace, pod) in callers.items()
        }
        service = cluster.get("service", "safelight", *where)["spec"]["clusterIP"]
        targets = {
            "gateway grpc": f"{address['gateway']}:8421",
            "gateway http": f"{address['gateway']}:{HTTP_PORT}",
            "gateway metrics": f"{address['gateway']}:9464",
            "gateway probe": f"{address['gateway']}:8422",
            "service": f"{service}:8421",
            "activator grpc": f"{address['activator']}:8421",
            "activator http": f"{address['activator']}:{HTTP_PORT}",
            "activator metrics": f"{address['activator']}:9464",
            "scaler grpc": f"{address['scaler']}:8431",
            "Redis": f"{HOST}:{REDIS_PORT}",
            "Prometheus": f"{HOST}:{PROMETHEUS_PORT}",
            "archive": f"{HOST}:{ARCHIVE_PORT}",
            "other": f"{HOST}:{OTHER_PORT}",
            "Redis in the cluster": f"{address['redis']}:{REDIS_PORT}",
            "client's port": f"{address['client']}:{ARCHIVE_PORT}",
        }
        yield Scene(cluster, callers, targets)


@pytest.mark.parametrize("caller", REACHES)
async def test_each_reaches_what_its_policies_admit_and_nothing_else(scene, caller):
    await scene.reaches(caller, REACHES[caller])


def test_helm_test_develops_a_picture_where_only_others_are_clients(cluster, scene):
    said = cluster.helm("test", "safelight", "--namespace", NAMESPACE, "--logs", "--timeout", "200s")
    assert "Succeeded" in said


async def test_a_policy_that_is_changed_is_enforced_at_pods_that_run(cluster, scene):
    """And the ports that a stranger did not reach are ports at which someone listens."""
    cluster.kubectl("label", "namespace", "strangers", "guest=yes")
    guests = [{"from": [{"namespaceSelector": {"matchLabels": {"guest": "yes"}}}]}]
    everything = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
                  "metadata": {"name": "guests", "namespace": NAMESPACE},
                  "spec": {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": guests}}  # fmt: skip
    cluster.apply(everything)
    await scene.reaches("stranger", REACHES["stranger"] | GATEWAY | BESIDE | {"service"})
    cluster.kubectl("delete", "networkpolicy", "guests", "-n", NAMESPACE)
    await scene.reaches("stranger", REACHES["stranger"])


def test_no_probe_of_the_kubelet_was_kept_out(cluster, scene):
    pods = cluster.get("pods", "-n", NAMESPACE)["items"]
    restarts = {
        pod["metadata"]["name"]: status["restartCount"]
        for pod in pods
        for status in pod["status"].get("containerStatuses", ())
    }
    assert set(restarts.values()) == {0}, restarts
