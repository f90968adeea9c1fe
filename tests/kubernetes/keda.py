"""KEDA's operator and metrics server, built of KEDA's own source, and the Prometheus that the scaler asks.

Only the scalers of other systems are left out (tools/keda/without_scalers.py), since they are most of its build.
They run beside the kubelets and not in pods, since there is no image of them; to the API server they are the same.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.kubernetes.cluster import DNS, HOST, PROGRAMS, Cluster
from tests.support.prometheus_server import PrometheusServer, prometheus

ROOT = Path(__file__).parent.parent.parent
METRICS_PORT = 16444
SCRAPE = """
global: {{scrape_interval: 1s}}
scrape_configs:
  - job_name: pictures
    kubernetes_sd_configs:
      - {{role: pod, kubeconfig_file: "{kubeconfig}", namespaces: {{names: ["{namespace}"]}}}}
    relabel_configs:
      - {{source_labels: [__meta_kubernetes_pod_container_port_name], regex: metrics, action: keep}}
      - {{source_labels: [__meta_kubernetes_namespace], target_label: namespace}}
      - {{source_labels: [__meta_kubernetes_pod_name], target_label: pod}}
"""


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
    """Lets programs beside the kubelets find services by name, as those in pods do."""
    (folder / "resolv.conf").write_text(f"nameserver {DNS}\nsearch svc.cluster.local\noptions ndots:5\n")
    subprocess.run(["mount", "--bind", folder / "resolv.conf", "/etc/resolv.conf"], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "/etc/resolv.conf"], check=True)


@contextmanager
def keda(cluster: Cluster, folder: Path) -> Iterator[None]:
    """KEDA in a cluster while the block runs: its definitions, its operator, and its metrics server as an API."""
    for definition in sorted((source() / "config" / "crd" / "bases").glob("*.yaml")):
        cluster.kubectl("apply", "--server-side", "-f", str(definition))
    cluster.kubectl("wait", "--for=condition=Established", "crd/scaledobjects.keda.sh", "--timeout=60s")
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "keda"}})
    certificates = folder / "certificates"
    certificates.mkdir()
    for name, of_the_cluster in (("ca.crt", "ca.crt"), ("tls.crt", "api.crt"), ("tls.key", "api.key")):
        (certificates / name).write_bytes((cluster.kubeconfig.parent / of_the_cluster).read_bytes())
    environment = {"KUBECONFIG": str(cluster.kubeconfig), "POD_NAMESPACE": "keda", "WATCH_NAMESPACE": ""}
    operator = [
        str(PROGRAMS / "keda" / "operator"),
        f"--cert-dir={certificates}",
        "--metrics-bind-address=127.0.0.1:18080",
        "--health-probe-bind-address=127.0.0.1:18081",
        f"--metrics-service-bind-address={HOST}:9666",
    ]
    adapter = [
        str(PROGRAMS / "keda" / "adapter"),
        f"--kubeconfig={cluster.kubeconfig}",
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
            {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
             "metadata": service | {"labels": {"kubernetes.io/service-name": service["name"]}},
             "addressType": "IPv4", "ports": [port],
             "endpoints": [{"addresses": [HOST], "conditions": {"ready": True}}]},
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


@contextmanager
def scraping(cluster: Cluster, folder: Path, namespace: str) -> Iterator[PrometheusServer]:
    """A Prometheus that scrapes the pods of a namespace; pods reach it too."""
    config = SCRAPE.format(kubeconfig=cluster.kubeconfig, namespace=namespace)
    with prometheus(folder, config, host=HOST) as server:
        yield server
