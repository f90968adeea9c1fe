"""KEDA's operator and metrics server, built from source, and the Prometheus that the scaler queries.

Only the scalers of other systems are left out (tools/keda/without_scalers.py), since they are most of its build.
They run as processes beside the kubelets and not in pods, since there is no image of them; the API server does not notice.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.kubernetes.cluster import DNS, HOST, PROGRAMS, Cluster
from tests.support.prometheus_server import PrometheusServer, prometheus

ROOT = Path(__file__).parent.parent.parent
METRICS_PORT = 16444
SCRAPE = """
global: {scrape_interval: 1s}
scrape_configs: [{job_name: pictures, file_sd_configs: [{files: [targets.json], refresh_interval: 1s}]}]
"""
METRICS = 9464


def source() -> Path:
    """The folder of KEDA's source."""
    command = ["go", "mod", "download", "-json", "github.com/kedacore/keda/v2"]
    found = subprocess.run(command, cwd=ROOT / "tools" / "keda", check=True, capture_output=True, text=True).stdout
    return Path(json.loads(found)["Dir"])


@contextmanager
def running(name: str, folder: Path, command: list[str], **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a program with its log in `folder`."""
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | environment, cwd=folder)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def cluster_names(folder: Path) -> Iterator[None]:
    """Lets programs beside the kubelets resolve services' names, like programs in pods."""
    (folder / "resolv.conf").write_text(f"nameserver {DNS}\nsearch svc.cluster.local\noptions ndots:5\n")
    subprocess.run(["mount", "--bind", folder / "resolv.conf", "/etc/resolv.conf"], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "/etc/resolv.conf"], check=True)


@contextmanager
def keda(cluster: Cluster, folder: Path) -> Iterator[None]:
    """Runs KEDA in a cluster during the block: its definitions, its operator, and its metrics server as an API."""
    for definition in sorted((source() / "config" / "crd" / "bases").glob("*.yaml")):
        cluster.kubectl("apply", "--server-side", "-f", str(definition))
    cluster.kubectl("wait", "--for=condition=Established", "crd/scaledobjects.keda.sh", "--timeout=60s")
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "keda"}})
    certificates = folder / "certificates"
    certificates.mkdir()
    for name, of_the_cluster in (("ca.crt", "ca.crt"), ("tls.crt", "api.crt"), ("tls.key", "api.key")):
        (certificates / name).write_bytes((cluster.kubeconfig.parent / of_the_cluster).read_bytes())
    environment = {
        "KUBECONFIG": str(cluster.kubeconfig), "WATCH_NAMESPACE": "",
        "POD_NAMESPACE": "keda", "KEDA_CLUSTER_OBJECT_NAMESPACE": "keda",
    }  # fmt: skip
    operator = [
        str(PROGRAMS / "keda" / "operator"),
        f"--cert-dir={certificates}",
        "--metrics-bind-address=127.0.0.1:18080",
        "--health-probe-bind-address=127.0.0.1:18081",
        f"--metrics-service-bind-address={HOST}:9666",
    ]
    adapter = [
        str(PROGRAMS / "keda" / "adapter"),
        f"--lister-kubeconfig={cluster.kubeconfig}",
        f"--authentication-kubeconfig={cluster.kubeconfig}",
        f"--authorization-kubeconfig={cluster.kubeconfig}",
        f"--bind-address={HOST}",
        f"--secure-port={METRICS_PORT}",
        f"--cert-dir={certificates}",
        f"--tls-cert-file={certificates / 'tls.crt'}",
        f"--tls-private-key-file={certificates / 'tls.key'}",
        f"--metrics-service-address={HOST}:9666",
    ]
    service = {"name": "keda-metrics-apiserver", "namespace": "keda"}
    port: dict[str, Any] = {"name": "https", "port": METRICS_PORT, "protocol": "TCP"}
    with ExitStack() as ends:
        ends.enter_context(cluster_names(folder))
        ends.enter_context(running("operator", folder, operator, **environment))
        ends.enter_context(running("adapter", folder, adapter, **environment))
        cluster.apply(
            {"apiVersion": "v1", "kind": "Service", "metadata": service,
             "spec": {"ports": [{"name": "https", "port": 443, "targetPort": METRICS_PORT}]}},
            # Not an EndpointSlice: the API server looks for this one; the slice is made of it.
            {"apiVersion": "v1", "kind": "Endpoints", "metadata": service,
             "subsets": [{"addresses": [{"ip": HOST}], "ports": [port]}]},
            {"apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService",
             "metadata": {"name": "v1beta1.external.metrics.k8s.io"},
             "spec": {"group": "external.metrics.k8s.io", "version": "v1beta1", "groupPriorityMinimum": 100,
                      "versionPriority": 100, "insecureSkipTLSVerify": True, "service": service}},
        )  # fmt: skip
        try:
            cluster.kubectl(
                "wait", "--for=condition=Available", "apiservice/v1beta1.external.metrics.k8s.io", "--timeout=90s"
            )
            yield
        except BaseException:
            for name in ("operator", "adapter"):
                print(f"----- {name}\n{(folder / f'{name}.log').read_text(errors='replace')[-6000:]}")
            raise
        finally:
            cluster.kubectl("delete", "apiservice", "v1beta1.external.metrics.k8s.io", "--ignore-not-found")


def targets(cluster: Cluster, namespace: str) -> list[dict[str, Any]]:
    """Scrape targets: the pods of a namespace that have metrics. Debian's Prometheus lacks Kubernetes discovery."""
    found = []
    for pod in cluster.get("pods", "-n", namespace)["items"]:
        ports = [port["name"] for each in pod["spec"]["containers"] for port in each.get("ports", ())]
        if "metrics" in ports and pod["status"].get("podIP"):
            labels = {"namespace": namespace, "pod": pod["metadata"]["name"]}
            found.append({"targets": [f"{pod['status']['podIP']}:{METRICS}"], "labels": labels})
    return found


@contextmanager
def scraping(cluster: Cluster, folder: Path, namespace: str) -> Iterator[PrometheusServer]:
    """A Prometheus that scrapes the pods of a namespace; pods reach it too."""
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(1.0):
            with contextlib.suppress(subprocess.SubprocessError):  # it is tried again
                (folder / "targets.new").write_text(json.dumps(targets(cluster, namespace)))
                (folder / "targets.new").replace(folder / "targets.json")

    following = threading.Thread(target=follow)
    following.start()
    try:
        with prometheus(folder, SCRAPE, host=HOST) as server:
            yield server
    finally:
        ended.set()
        following.join()
