"""The chart without a cluster: lint, every profile against the schemas of Kubernetes, and what must be in it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safelight_server.settings import Settings

ROOT = Path(__file__).parent.parent.parent
CHART = ROOT / "deploy" / "helm" / "safelight"
HELM = ROOT / ".tools" / "helm"
VALIDATE = ROOT / ".venv" / "bin" / "kubernetes-validate"
PROFILES = sorted(path.stem for path in (CHART / "profiles").glob("*.yaml"))
IMAGE = {"repository": "registry.example/gateway", "digest": "sha256:" + "1" * 64}
ON_TOP = ("critical", "spot")
"""Profiles that are given after another one, here cpu."""
TRITON = {"repository": "registry.example/triton", "digest": "sha256:" + "2" * 64}
VERSIONS = ("1.30", "1.33", "1.36")


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HELM, *arguments], capture_output=True, text=True, check=False)


def values_file(folder: Path, values: dict[str, Any]) -> Path:
    file = folder / "values.json"
    file.write_text(json.dumps(values))
    return file


def given(folder: Path, profile: str, **changes: Any) -> list[str | Path]:
    """The arguments for a profile with images and these changes."""
    changes = {"image": IMAGE} | changes
    if profile == "triton-cpu":
        changes = {"triton": {"image": TRITON}} | changes
    names = ("cpu", profile) if profile in ON_TOP else (profile,)
    profiles = [argument for name in names for argument in ("--values", CHART / "profiles" / f"{name}.yaml")]
    return ["--namespace", "studio", *profiles, "--values", values_file(folder, changes)]


def rendered(folder: Path, profile: str, **changes: Any) -> list[dict[str, Any]]:
    """The objects of a profile."""
    made = helm("template", "safelight", CHART, *given(folder, profile, **changes))
    assert made.returncode == 0, made.stderr
    return [document for document in yaml.safe_load_all(made.stdout) if document]


def one(objects: list[dict[str, Any]], kind: str) -> Any:
    [found] = [each for each in objects if each["kind"] == kind]
    return found


def pod_specs(objects: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for each in objects:
        if each["kind"] == "Deployment":
            yield each["spec"]["template"]["spec"]
        elif each["kind"] == "Pod":
            yield each["spec"]


def containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def environment(container: dict[str, Any]) -> dict[str, Any]:
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in container["env"]}


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_is_linted_and_valid_in_every_version(tmp_path, profile):
    linted = helm("lint", "--strict", CHART, *given(tmp_path, profile))
    assert linted.returncode == 0, linted.stdout + linted.stderr
    objects = rendered(tmp_path, profile)
    known = [each for each in objects if each["kind"] != "GRPCRoute"]  # a real API server has its schema
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text(yaml.safe_dump_all(known))
    for version in VERSIONS:
        checked = subprocess.run(
            [VALIDATE, "--strict", "--kubernetes-version", version, manifest],
            capture_output=True,
            text=True,
            check=False,
        )
        assert checked.returncode == 0, f"{version}: {checked.stdout}{checked.stderr}"


@pytest.mark.parametrize("profile", PROFILES)
def test_every_pod_is_restricted_and_pinned(tmp_path, profile):
    specs = list(pod_specs(rendered(tmp_path, profile)))
    assert len(specs) == 2
    for spec in specs:
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(spec):
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert "@sha256:" in container["image"]
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("profile", PROFILES)
def test_a_pod_goes_only_when_another_is_there_and_it_has_drained(tmp_path, profile):
    objects = rendered(tmp_path, profile, drainSeconds=77, preStopSeconds=9)
    deployment = one(objects, "Deployment")["spec"]
    assert deployment["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    spec = deployment["template"]["spec"]
    [gateway] = spec["containers"]
    assert environment(gateway)["SAFELIGHT_DRAIN_GRACE_S"] == "77"
    assert gateway["lifecycle"]["preStop"] == {"sleep": {"seconds": 9}}
    assert spec["terminationGracePeriodSeconds"] > 77 + 9
    assert one(objects, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert gateway[probe]["grpc"]["port"] == 8422
    assert gateway["livenessProbe"]["grpc"]["service"] == "grpc.health.v1.Health", "it lives while it drains"


def test_what_may_wait_is_on_spot_nodes_and_hears_that_they_go(tmp_path):
    [deployment] = [each for each in rendered(tmp_path, "spot") if each["kind"] == "Deployment"]
    spec = deployment["spec"]["template"]["spec"]
    assert spec["nodeSelector"] == {"capacity": "spot"}
    assert spec["tolerations"][0]["value"] == "spot"
    assert spec["priorityClassName"] == "pictures-deferrable"
    [gateway] = spec["containers"]
    assert environment(gateway)["SAFELIGHT_SPOT_NOTICE"] == "aws"
    assert json.loads(environment(gateway)["SAFELIGHT_CLASS_WAIT_S"])["batch"] == 120
    assert spec["terminationGracePeriodSeconds"] < 100, "of the 120 s that the node has"
    [policy] = [each for each in rendered(tmp_path, "spot") if each["kind"] == "NetworkPolicy"]
    ports = [port["port"] for rule in policy["spec"]["egress"] for port in rule.get("ports", ())]
    assert {80, 6379} <= set(ports)


def test_what_someone_waits_for_is_on_nodes_that_stay(tmp_path):
    [deployment] = [each for each in rendered(tmp_path, "critical") if each["kind"] == "Deployment"]
    spec = deployment["spec"]["template"]["spec"]
    assert spec["nodeSelector"] == {"capacity": "on-demand"}
    assert "tolerations" not in spec
    assert spec["priorityClassName"] == "pictures-critical"
    assert "SAFELIGHT_SPOT_NOTICE" not in environment(spec["containers"][0])


def test_triton_outlives_the_gateway_and_is_reached_by_nobody_else(tmp_path):
    """An init container that goes on running ends after the others; an ordinary one would end before they have drained."""
    for profile in ("triton-cpu", "gpu"):
        objects = rendered(tmp_path, profile)
        [spec, _] = pod_specs(objects)
        [triton] = [each for each in spec["initContainers"] if each["name"] == "triton"]
        assert triton["restartPolicy"] == "Always"
        shared = {"name": "shared-memory", "mountPath": "/dev/shm"}
        assert shared in triton["volumeMounts"]
        assert shared in spec["containers"][0]["volumeMounts"]
        assert environment(spec["containers"][0])["SAFELIGHT_TRITON_SHARED_MEMORY"] == "on"
        assert not [each for each in triton.get("args", []) if "address=0.0.0.0" in each and "metrics" not in each]
    assert triton["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert triton["resources"]["limits"]["memory"] == "64Gi"


def test_models_are_fetched_with_their_digests(tmp_path):
    [spec, _] = pod_specs(rendered(tmp_path, "gpu"))
    models, repository, _ = spec["initContainers"]
    assert models["args"][:2] == ["fetch", "s3://safelight-models/icons-1.0"]
    assert {"name": "models", "mountPath": "/models"} in models["volumeMounts"]
    assert {"name": "models", "mountPath": "/models", "readOnly": True} in spec["containers"][0]["volumeMounts"]
    assert {"name": "models", "mountPath": "/models", "readOnly": True} in repository["volumeMounts"]


def test_settings_and_secrets_reach_the_server(tmp_path):
    objects = rendered(tmp_path, "gpu", settings={"max_waiting_outputs": 1024, "log_level": "debug"})
    [spec, _] = pod_specs(objects)
    found = environment(spec["containers"][0])
    assert found["SAFELIGHT_MAX_WAITING_OUTPUTS"] == "1024"
    assert found["SAFELIGHT_LOG_LEVEL"] == "debug"
    assert found["SAFELIGHT_REDIS_URL"] == {"secretKeyRef": {"name": "safelight-redis", "key": "url"}}
    assert found["SAFELIGHT_OTLP_ENDPOINT"] == "http://otel-collector.observability:4317"
    assert found["SAFELIGHT_INSECURE"] == "false"
    assert len(found) == len(spec["containers"][0]["env"]), "no variable is there twice"


def test_the_bucket_and_the_disk_reach_the_server(tmp_path):
    s3 = {"url": "s3://b/p", "endpoint": "http://minio:9000", "region": "eu", "credentialsSecret": "s3"}
    [spec, _] = pod_specs(rendered(tmp_path, "cpu", cache={"keySecret": "k", "diskGiB": 16, "s3": s3}))
    found = environment(spec["containers"][0])
    given_url = (
        "s3://b/p?region=eu&endpoint_url=http%3A%2F%2Fminio%3A9000&credentials_file=/etc/safelight/s3/credentials"
    )
    assert found["SAFELIGHT_CACHE_S3_URL"] == given_url
    assert found["SAFELIGHT_CACHE_DISK_BYTES"] == str(16 << 30)
    [volume] = [each for each in spec["volumes"] if each["name"] == "cache"]
    assert volume["emptyDir"]["sizeLimit"] == "19Gi"


def test_all_settings_that_the_chart_writes_are_the_servers(tmp_path):
    names = {f"SAFELIGHT_{name.upper()}" for name in Settings.model_fields}
    for profile in PROFILES:
        [spec, _] = pod_specs(rendered(tmp_path, profile))
        assert environment(spec["containers"][0]).keys() <= names


def test_the_route_has_the_services_and_not_health(tmp_path):
    [rule] = one(rendered(tmp_path, "gpu"), "GRPCRoute")["spec"]["rules"]
    services = {match["method"]["service"] for match in rule["matches"]}
    protos = (ROOT / "proto" / "safelight" / "v1").glob("*.proto")
    declared = {
        f"safelight.v1.{line.split()[1]}"
        for proto in protos
        for line in proto.read_text().splitlines()
        if line.startswith("service ")
    }
    assert services == declared


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"image": {"repository": "x", "digest": "latest"}}, "digest"),
        ({"replica": 3}, "replica"),
        ({"settings": {"max_waiting_output": 1}}, "max_waiting_output"),
        ({"settings": {"tls_cert_file": "x"}}, "tls_cert_file"),
        ({"resources": {"request": {}}}, "request"),
        ({"tls": {"secret": ""}}, "give tls.secret and apiKeys.secret, or insecure: true"),
        ({"redis": {"secret": ""}}, "replicas above 1 need redis.url or redis.secret"),
        ({"cache": {"keySecret": ""}}, "need cache.keySecret"),
        ({"redis": {"url": "redis://x"}}, "exclude each other"),
        ({"runtime": "triton"}, "needs triton.image"),
        ({"models": {"url": "s3://x/y"}}, "needs models.sha256sums"),
        ({"route": {"enabled": True}}, "needs route.parentRefs"),
    ],
)
def test_what_cannot_work_is_refused_before_it_is_installed(tmp_path, changes, fault):
    made = helm("template", "safelight", CHART, *given(tmp_path, "cpu", **changes))
    assert made.returncode != 0
    assert fault in made.stderr
