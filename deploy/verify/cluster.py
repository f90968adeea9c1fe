"""Compares the objects that the chart renders with those in the cluster; runs helm and kubectl."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from deploy.verify.drift import ABSENT, PRESENT, Drift, differences

BETWEEN = "chart and cluster"
CHART = Path(__file__).parent.parent / "helm" / "safelight"
BUILT_HELM = Path(__file__).parent.parent.parent / ".tools" / "helm"


class ClusterError(Exception):
    """helm or kubectl is missing or failed; the message has what it printed."""


def _run(program: str, *arguments: str) -> str:
    ran = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise ClusterError(f"{Path(program).name} {arguments[0]}: {ran.stderr.strip()}")
    return ran.stdout


def _found(program: str) -> str:
    found = shutil.which(program) or (str(BUILT_HELM) if program == "helm" and BUILT_HELM.exists() else None)
    if found is None:
        raise ClusterError(f"{program} is not on PATH")
    return found


def rendered(release: str, namespace: str, values: Sequence[Path]) -> list[dict[str, Any]]:
    """Renders the chart's objects, without those of `helm test`.

    Raises:
        ClusterError: helm refuses the values.
    """
    files = [part for file in values for part in ("--values", str(file))]
    made = _run(_found("helm"), "template", release, str(CHART), "--namespace", namespace, *files)
    objects = [each for each in yaml.safe_load_all(made) if each]
    return [each for each in objects if "helm.sh/hook" not in each["metadata"].get("annotations", {})]


def kubectl(namespace: str) -> Callable[[str, str], dict[str, Any] | None]:
    """Returns a function that reads an object of the current cluster by kind and name; None if it does not exist."""

    def get(kind: str, name: str) -> dict[str, Any] | None:
        arguments = ("get", kind, name, "--namespace", namespace, "--ignore-not-found", "--output", "json")
        text = _run(_found("kubectl"), *arguments)
        found: dict[str, Any] | None = json.loads(text) if text.strip() else None
        return found

    return get


def object_drifts(
    objects: Sequence[Mapping[str, Any]], get: Callable[[str, str], Mapping[str, Any] | None]
) -> Iterator[Drift]:
    """Yields where the cluster's objects differ from the chart's. What Kubernetes adds to them is not compared."""
    for each in objects:
        kind, name = each["kind"], each["metadata"]["name"]
        deployed = get(kind, name)
        if deployed is None:
            yield Drift(BETWEEN, f"{kind} {name}", "", PRESENT, ABSENT)
            continue
        for path, should, is_ in differences(each, deployed, whole=False):
            if not should and is_ is ABSENT:
                continue  # the API server leaves out empty and false values
            if (kind, path) == ("Deployment", "spec.replicas"):
                continue  # an autoscaler may have changed it
            yield Drift(BETWEEN, f"{kind} {name}", path, should, is_)
