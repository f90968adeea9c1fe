"""`deploy.verify --release` against a real cluster: it finds what was changed by hand, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kubernetes.cluster import PROGRAMS, Cluster
from tests.kubernetes.conftest import CHART, ROOT, values

pytestmark = pytest.mark.timeout(300)
NAMESPACE = "verified"
NO_IMAGE = {"repository": "localhost/none", "digest": "sha256:" + "0" * 64}
"""Objects are compared, so no pod has to start."""


def drifts(cluster: Cluster, files: list[str]) -> list[dict[str, Any]]:
    """What the command prints; its exit status says the same."""
    ended = subprocess.run(
        [sys.executable, "-m", "deploy.verify", "--json", "--release", "safelight", "--namespace", NAMESPACE, *files],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
        env=os.environ | {"KUBECONFIG": str(cluster.kubeconfig), "PATH": f"{PROGRAMS}:{os.environ['PATH']}"},
    )  # fmt: skip
    found = [json.loads(line) for line in ended.stdout.splitlines()]
    assert ended.returncode == (1 if found else 0), ended.stderr
    return found


@pytest.mark.parametrize("profile", ["cpu", "triton-cpu"])
def test_what_is_changed_by_hand_is_named(cluster, tmp_path: Path, profile):
    images = {"image": NO_IMAGE} | ({"triton": {"image": NO_IMAGE}} if profile == "triton-cpu" else {})
    files = ["--values", str(CHART / "profiles" / f"{profile}.yaml"), *values(tmp_path, **images)]
    where = ("--namespace", NAMESPACE)
    cluster.helm("install", "safelight", str(CHART), *where, "--create-namespace", *files)
    try:
        assert drifts(cluster, files) == []
        cluster.kubectl("delete", "poddisruptionbudget", "safelight", *where)
        everybody = {"spec": {"ingress": [{}]}}
        cluster.kubectl(
            "patch", "networkpolicy", "safelight", *where, "--type=merge", f"--patch={json.dumps(everybody)}"
        )
        cluster.kubectl("set", "env", "deployment/safelight", "SAFELIGHT_INSECURE=true", *where)
        found = drifts(cluster, files)
        assert {each["resource"] for each in found} == {
            "Deployment safelight", "NetworkPolicy safelight", "PodDisruptionBudget safelight"
        }  # fmt: skip
        [environment] = [each for each in found if each["resource"].startswith("Deployment")]
        assert (environment["declared"], environment["deployed"]) == ("false", "true")
    finally:
        cluster.helm("uninstall", "safelight", *where)
