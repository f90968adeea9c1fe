"""A real Kubernetes of two nodes on this machine: etcd, the control plane, two kubelets with containerd and runc, CoreDNS.

It runs in the network, mount and process namespaces of its parent process, which `make test-kubernetes` makes for it: it
cannot be reached from outside, and it ends with them. Both nodes are in one network namespace. Each pod has a veth pair
and no bridge (CNI's ptp), so that every packet passes kube-proxy's rules.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.kubernetes.pki import Authority

ROOT = Path(__file__).parent.parent.parent
PROGRAMS = ROOT / ".tools" / "kubernetes"
HELM = ROOT / ".tools" / "helm"
HOST = "10.99.0.1"
"""Address of the first node, on which the control plane and programs of the tests listen."""
DNS = "10.96.0.10"
NODES = ("n1", "n2")
TOKEN = "this-cluster-lives-for-minutes"
KERNEL_SETTINGS = (
    *("vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops"),
    *("kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes"),
)
"""Kernel settings that a kubelet would change for the whole machine; tests must not."""
CGROUPS = Path("/sys/fs/cgroup")
READY_S = 180.0


class ClusterError(Exception):
    """A part of the cluster has ended or does not become ready; the message has the end of its log."""


def address(node: str) -> str:
    """A node's address; n1 has `HOST`."""
    return f"10.99.0.{node.removeprefix('n')}"


class Cluster:
    """One cluster in an empty folder.

    Attributes:
        kubeconfig: the administrator's kubeconfig file.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.kubeconfig = folder / "kubeconfig"

    def start(self) -> None:
        """Starts everything and returns when both nodes are ready.

        Raises:
            ClusterError: a part of the cluster does not start.
        """
        self._prepare_network()
        self._write_files()
        f = self._folder
        self._run(
            "etcd",
            "server",
            *_flags(
                {
                    "data-dir": f / "etcd",
                    "listen-client-urls": "http://127.0.0.1:2379",
                    "advertise-client-urls": "http://127.0.0.1:2379",
                    "listen-peer-urls": "http://127.0.0.1:2380",
                    "unsafe-no-fsync": "true",
                    "log-level": "warn",
                }
            ),
        )
        self._run(
            "apiserver",
            "kube-apiserver",
            *_flags(
                {
                    "etcd-servers": "http://127.0.0.1:2379",
                    "secure-port": 6443,
                    "bind-address": HOST,
                    "advertise-address": HOST,
                    "tls-cert-file": f / "api.crt",
                    "tls-private-key-file": f / "api.key",
                    "client-ca-file": f / "ca.crt",
                    "service-account-key-file": f / "accounts.pub",
                    "service-account-signing-key-file": f / "accounts.key",
                    "service-account-issuer": "https://kubernetes.default.svc",
                    "token-auth-file": f / "tokens.csv",
                    "authorization-mode": "RBAC",
                    "service-cluster-ip-range": "10.96.0.0/16",
                    "kubelet-client-certificate": f / "client.crt",
                    "kubelet-client-key": f / "client.key",
                    "kubelet-preferred-address-types": "InternalIP",
                    "profiling": "false",
                    # For APIs of others, such as KEDA's metrics.
                    "requestheader-client-ca-file": f / "ca.crt",
                    "requestheader-username-headers": "X-Remote-User",
                    "requestheader-group-headers": "X-Remote-Group",
                    "requestheader-extra-headers-prefix": "X-Remote-Extra-",
                    "proxy-client-cert-file": f / "client.crt",
                    "proxy-client-key-file": f / "client.key",
                    "enable-aggregator-routing": "true",
                }
            ),
        )
        self._until("the API answers", lambda: self._answers("/readyz"), "apiserver")
        config = {"kubeconfig": self.kubeconfig, "leader-elect": "false", "bind-address": "127.0.0.1"}
        self._run(
            "controllers",
            "kube-controller-manager",
            *_flags(
                config
                | {
                    "service-account-private-key-file": f / "accounts.key",
                    "root-ca-file": f / "ca.crt",
                    "cluster-signing-cert-file": f / "ca.crt",
                    "cluster-signing-key-file": f / "ca.key",
                    "secure-port": 10257,
                    "horizontal-pod-autoscaler-sync-period": "5s",
                }
            ),
        )
        self._run("scheduler", "kube-scheduler", *_flags(config | {"secure-port": 10259}))
        for node in NODES:
            self._start_node(node)
        self._run(
            "proxy",
            "kube-proxy",
            *_flags(
                {
                    "kubeconfig": self.kubeconfig,
                    "hostname-override": "n1",
                    "proxy-mode": "iptables",
                    "cluster-cidr": "10.244.0.0/16",
                    "conntrack-max-per-core": 0,
                    "healthz-bind-address": "127.0.0.1:10256",
                    "metrics-bind-address": "127.0.0.1:10249",
                }
            ),
        )
        self._run("dns", "coredns", "-conf", str(f / "Corefile"))
        self._until("both nodes are ready", self._nodes_are_ready, "kubelet-n1")

    def stop(self) -> None:
        """Ends all processes and removes the nodes' containers."""
        with contextlib.suppress(subprocess.SubprocessError):
            self.kubectl("delete", "pods", "--all", "-A", "--force", "--grace-period=0", "--wait=false", timeout_s=20)
        for name in ("kubelet-n1", "kubelet-n2"):
            self._end(name)
        for node in NODES:
            self._kill_containers(node)
        for name in reversed(list(self._processes)):
            self._end(name)
        for line in Path("/proc/self/mounts").read_text().splitlines():
            place = line.split()[1]
            if place.startswith(str(self._folder)):
                subprocess.run(["umount", "--lazy", place], check=False, stderr=subprocess.DEVNULL)
        for controller in CGROUPS.iterdir():
            for node in NODES:
                _remove_cgroups(controller / f"safelight-{node}")

    def kubectl(self, *arguments: str, given: str | None = None, timeout_s: float = 120.0) -> str:
        """Runs kubectl and returns its output.

        Raises:
            CalledProcessError: kubectl failed; the error's `stderr` has the reason.
        """
        return self._tool(PROGRAMS / "kubectl", arguments, given, timeout_s)

    def helm(self, *arguments: str, timeout_s: float = 400.0) -> str:
        """Runs helm and returns its output; raises as `kubectl` does."""
        return self._tool(HELM, arguments, None, timeout_s)

    def get(self, *arguments: str) -> dict[str, Any]:
        """One object, or a list of them, as `kubectl get` names it."""
        found: dict[str, Any] = json.loads(self.kubectl("get", *arguments, "-o", "json"))
        return found

    def apply(self, *objects: dict[str, Any]) -> None:
        """Creates or changes objects."""
        self.kubectl("apply", "-f", "-", given=yaml.safe_dump_all(objects))

    def import_image(self, archive: Path, name: str) -> str:
        """Imports an image from a Docker archive on both nodes, as NAME@DIGEST; returns its digest."""
        digest = ""
        for node in NODES:
            self._ctr(node, "images", "import", "--snapshotter=overlayfs", str(archive))
            for line in self._ctr(node, "images", "ls").splitlines():
                if line.split()[0].startswith(name + ":"):
                    reference, _, digest = line.split()[:3]
                    self._ctr(node, "images", "tag", "--force", reference, f"{name}@{digest}")
        assert digest, f"{archive} has no image {name}"
        return digest

    def kill_container(self, pod: str, namespace: str, container: str) -> None:
        """Kills the process of a pod's container, as the kernel does when memory runs out."""
        node = self.get("pod", pod, "-n", namespace)["spec"]["nodeName"]
        wanted = (f'"io.kubernetes.pod.name":"{pod}"', f'"io.kubernetes.container.name":"{container}"')
        for line in self._ctr(node, "tasks", "ls").splitlines()[1:]:
            name, pid = line.split()[:2]
            labels = json.dumps(
                json.loads(self._ctr(node, "containers", "info", name))["Labels"], separators=(",", ":")
            )
            if all(label in labels for label in wanted):
                os.kill(int(pid), signal.SIGKILL)
                return
        raise ClusterError(f"no container {container} of {pod} runs on {node}")

    def _start_node(self, node: str) -> None:
        f = self._folder / node
        for controller in CGROUPS.iterdir():
            if controller.is_dir() and not controller.is_symlink():
                _new_cgroup(controller / f"safelight-{node}")
        self._run(f"containerd-{node}", "containerd", "--config", str(f / "containerd.toml"))
        self._until("containerd answers", lambda: self._try_ctr(node, "version"), f"containerd-{node}")
        self._ctr(node, "images", "import", "--snapshotter=overlayfs", str(self._folder / "pause.tar"))
        self._run(
            f"kubelet-{node}",
            "kubelet",
            *_flags(
                {
                    "config": f / "kubelet.yaml",
                    "kubeconfig": self.kubeconfig,
                    "hostname-override": node,
                    "node-ip": address(node),
                    "root-dir": f / "kubelet",
                    "cert-dir": f / "pki",
                    "node-labels": f"topology.kubernetes.io/zone=zone-{node}",
                }
            ),
        )

    def _prepare_network(self) -> None:
        for command in (
            ["ip", "link", "set", "lo", "up"],
            *(["ip", "address", "replace", f"{address(node)}/32", "dev", "lo"] for node in NODES),
            ["ip", "address", "replace", f"{DNS}/32", "dev", "lo"],
            ["ip", "route", "replace", "default", "dev", "lo"],  # some parts look for one
            ["mount", "--make-rshared", "/"],
        ):
            subprocess.run(command, check=True)
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        for name in KERNEL_SETTINGS:  # the kubelets see and write files in their place
            setting, copy = Path("/proc/sys", name), self._folder / name.replace("/", ".")
            copy.write_text(setting.read_text())
            subprocess.run(["mount", "--bind", str(copy), str(setting)], check=True)

    def _write_files(self) -> None:
        f = self._folder
        authority = Authority()
        authority.write(f)
        cluster = {"server": f"https://{HOST}:6443", "certificate-authority": str(f / "ca.crt")}
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "here",
            "clusters": [{"name": "here", "cluster": cluster}],
            "users": [{"name": "admin", "user": {"token": TOKEN}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "admin"}}],
        }  # fmt: skip
        self.kubeconfig.write_text(yaml.safe_dump(config))
        (f / "tokens.csv").write_text(f'{TOKEN},admin,1,"system:masters"\n')
        (f / "resolv.conf").write_text("")
        (f / "Corefile").write_text(
            f".:53 {{\n  bind {DNS}\n  errors\n  kubernetes cluster.local {{\n    kubeconfig {self.kubeconfig}\n  }}\n  cache 5\n}}\n"
        )
        _pack_pause_image(f / "pause.tar")
        for node in NODES:
            place = f / node
            (place / "cni").mkdir(parents=True)
            network = {
                "cniVersion": "0.4.0", "name": "pods",
                "plugins": [{
                    "type": "ptp", "ipMasq": False, "mtu": 1500,
                    "ipam": {
                        "type": "host-local", "dataDir": str(place / "cni-data"),
                        "ranges": [[{"subnet": f"10.244.{node.removeprefix('n')}.0/24"}]],
                        "routes": [{"dst": "0.0.0.0/0"}],
                    },
                }],
            }  # fmt: skip
            (place / "cni" / "pods.conflist").write_text(json.dumps(network))
            (place / "containerd.toml").write_text(_CONTAINERD.format(f=place))
            kubelet = {
                "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
                "address": address(node), "port": 10250, "healthzPort": 0, "readOnlyPort": 0,
                "authentication": {
                    "anonymous": {"enabled": False}, "webhook": {"enabled": True},
                    "x509": {"clientCAFile": str(f / "ca.crt")},
                },
                "authorization": {"mode": "AlwaysAllow"},
                "cgroupDriver": "cgroupfs", "cgroupRoot": f"/safelight-{node}", "enforceNodeAllocatable": [],
                "failSwapOn": False, "failCgroupV1": False,
                "containerRuntimeEndpoint": f"unix://{place}/containerd.sock",
                "clusterDNS": [DNS], "clusterDomain": "cluster.local", "resolvConf": str(f / "resolv.conf"),
                "evictionHard": {"nodefs.available": "1%", "imagefs.available": "1%", "memory.available": "100Mi"},
                "localStorageCapacityIsolation": False,
                "podLogsDir": str(place / "logs"),
                "featureGates": {"KubeletInUserNamespace": True},  # what it may not set is no fault
                "nodeStatusUpdateFrequency": "4s",
            }  # fmt: skip
            (place / "kubelet.yaml").write_text(yaml.safe_dump(kubelet))

    def _run(self, name: str, program: str, *arguments: str) -> None:
        found = PROGRAMS / program if (PROGRAMS / program).exists() else shutil.which(program)
        assert found, f"no {program}: make test-kubernetes builds or installs it"
        with (self._folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen([found, *arguments], stdout=log, stderr=log, cwd=self._folder)

    def _end(self, name: str) -> None:
        if process := self._processes.pop(name, None):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _until(self, what: str, condition: Any, name: str) -> None:
        """Polls a condition; `name` is the process on which it depends."""
        until = time.monotonic() + READY_S
        while not condition():
            for each, process in self._processes.items():
                if process.poll() is not None:
                    raise ClusterError(f"{each} has ended with {process.returncode}:\n{self.log(each)}")
            if time.monotonic() > until:
                raise ClusterError(f"{what}: not within {READY_S:.0f} s:\n{self.log(name)}")
            time.sleep(0.2)

    def log(self, name: str) -> str:
        """The end of a process's log."""
        return (self._folder / f"{name}.log").read_text(errors="replace")[-4000:]

    def _answers(self, path: str) -> bool:
        try:
            self.kubectl("get", "--raw", path, timeout_s=10)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            return False
        return True

    def _nodes_are_ready(self) -> bool:
        nodes = self.get("nodes")["items"]
        ready = [
            condition["status"] == "True"
            for node in nodes
            for condition in node["status"]["conditions"]
            if condition["type"] == "Ready"
        ]
        return len(ready) == len(NODES) and all(ready)

    def _tool(self, program: Path, arguments: Sequence[str], given: str | None, timeout_s: float) -> str:
        environment = os.environ | {"KUBECONFIG": str(self.kubeconfig), "HELM_CACHE_HOME": str(self._folder / "helm")}
        ended = subprocess.run(
            [program, *arguments], input=given, capture_output=True, text=True, env=environment, timeout=timeout_s, check=False
        )  # fmt: skip
        if ended.returncode:
            raise subprocess.CalledProcessError(
                ended.returncode, [program.name, *arguments], ended.stdout, ended.stderr
            )
        return ended.stdout

    def _ctr(self, node: str, *arguments: str) -> str:
        command = [
            "ctr",
            "--address",
            str(self._folder / node / "containerd.sock"),
            "--namespace",
            "k8s.io",
            *arguments,
        ]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout

    def _try_ctr(self, node: str, *arguments: str) -> bool:
        try:
            self._ctr(node, *arguments)
        except subprocess.SubprocessError:
            return False
        return True

    def _kill_containers(self, node: str) -> None:
        with contextlib.suppress(subprocess.SubprocessError):
            for task in self._ctr(node, "tasks", "ls", "-q").split():
                self._try_ctr(node, "tasks", "kill", "--signal=SIGKILL", task)
                self._try_ctr(node, "tasks", "delete", "--force", task)


_CONTAINERD = """version = 2
root = "{f}/root"
state = "{f}/state"
[grpc]
address = "{f}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "localhost/pause:1"
disable_apparmor = true
restrict_oom_score_adj = true
stream_server_port = "0"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{f}/cni"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.internal.v1.opt"]
path = "{f}/opt"
"""


def _flags(values: dict[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


def _pack_pause_image(archive: Path) -> None:
    """Writes the image of the container that holds a pod's namespaces: Debian's catatonit in its pause mode."""
    storage = archive.with_name("pause-storage")
    buildah = [
        "buildah",
        "--root",
        str(storage),
        "--runroot",
        str(archive.with_name("pause-run")),
        "--storage-driver",
        "vfs",
    ]

    def run(*arguments: str) -> str:
        return subprocess.run([*buildah, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    container = run("from", "scratch")
    run("add", container, shutil.which("catatonit") or "/usr/bin/catatonit", "/pause")
    run("config", "--entrypoint", '["/pause", "-P"]', container)
    run("commit", "--format", "docker", container, "localhost/pause:1")
    run("push", "localhost/pause:1", f"docker-archive:{archive}:localhost/pause:1")
    run("rm", container)


def _new_cgroup(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for file in ("cpuset.cpus", "cpuset.mems"):  # empty ones take no process
        if (folder / file).exists():
            (folder / file).write_text((folder.parent / file).read_text())


def _remove_cgroups(folder: Path) -> None:
    if not folder.is_dir():
        return
    for below in sorted(folder.rglob("*"), key=lambda path: -len(path.parts)):
        if below.is_dir():
            with contextlib.suppress(OSError):
                below.rmdir()
    with contextlib.suppress(OSError):
        folder.rmdir()


def http_get(url: str) -> str:
    """The body of a page."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        body: bytes = answer.read()
        return body.decode()
