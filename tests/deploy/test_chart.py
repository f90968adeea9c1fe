"""Tests of the chart without a cluster: lint, every profile against Kubernetes' schemas, and required properties."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safelight_server.scaler.trigger import trigger as read_trigger
from safelight_server.settings import Settings

ROOT = Path(__file__).parent.parent.parent
CHART = ROOT / "deploy" / "helm" / "safelight"
HELM = ROOT / ".tools" / "helm"
VALIDATE = ROOT / ".venv" / "bin" / "kubernetes-validate"
PROFILES = sorted(path.stem for path in (CHART / "profiles").glob("*.yaml"))
IMAGE = {"repository": "registry.example/gateway", "digest": "sha256:" + "1" * 64}
ON_TOP = ("critical", "spot", "to-zero")
"""Profiles that are used on top of another one, here cpu."""
SCALER = {"repository": "registry.example/scaler", "digest": "sha256:" + "3" * 64}
SCALING = {"enabled": True, "prometheus": "http://prometheus:9090", "scaler": {"image": SCALER}}
UNKNOWN_KINDS = ("GRPCRoute", "ScaledObject")
"""Kinds of other APIs, for which there are no schemas here; make test-kubernetes checks them on a real API server."""
TRITON = {"repository": "registry.example/triton", "digest": "sha256:" + "2" * 64}
VERSIONS = ("1.30", "1.33", "1.36")


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HELM, *arguments], capture_output=True, text=True, check=False)


def values_file(folder: Path, values: dict[str, Any]) -> Path:
    file = folder / "values.json"
    file.write_text(json.dumps(values))
    return file


def given(folder: Path, profile: str, **changes: Any) -> list[str | Path]:
    """helm's arguments for a profile, with images and the changes."""
    changes = {"image": IMAGE} | changes
    if profile == "triton-cpu":
        changes = {"triton": {"image": TRITON}} | changes
    if profile == "to-zero":
        changes = {"scaling": {"scaler": {"image": SCALER}}} | changes
    names = ("cpu", profile) if profile in ON_TOP else (profile,)
    profiles = [argument for name in names for argument in ("--values", CHART / "profiles" / f"{name}.yaml")]
    return ["--namespace", "studio", *profiles, "--values", values_file(folder, changes)]


def rendered(folder: Path, profile: str, **changes: Any) -> list[dict[str, Any]]:
    """The objects of a profile."""
    made = helm("template", "safelight", CHART, *given(folder, profile, **changes))
    assert made.returncode == 0, made.stderr
    return [document for document in yaml.safe_load_all(made.stdout) if document]


def one(objects: list[dict[str, Any]], kind: str, name: str = "safelight") -> Any:
    [found] = [each for each in objects if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def policy(objects: list[dict[str, Any]], name: str = "safelight") -> Any:
    return one(objects, "NetworkPolicy", name)["spec"]


def pod_specs(objects: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for each in objects:
        if each["kind"] == "Deployment":
            yield each["spec"]["template"]["spec"]
        elif each["kind"] == "CronJob":
            yield each["spec"]["jobTemplate"]["spec"]["template"]["spec"]
        elif each["kind"] == "Pod":
            yield each["spec"]


def containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def environment(container: dict[str, Any]) -> dict[str, Any]:
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in container["env"]}


def assert_valid(folder: Path, objects: list[dict[str, Any]]) -> None:
    """Asserts that the schemas of all versions of Kubernetes admit the objects."""
    manifest = folder / "manifest.yaml"
    manifest.write_text(yaml.safe_dump_all(each for each in objects if each["kind"] not in UNKNOWN_KINDS))
    for version in VERSIONS:
        checked = subprocess.run(
            [VALIDATE, "--strict", "--kubernetes-version", version, manifest],
            capture_output=True,
            text=True,
            check=False,
        )
        assert checked.returncode == 0, f"{version}: {checked.stdout}{checked.stderr}"


def assert_restricted(objects: list[dict[str, Any]]) -> None:
    """Asserts what every pod has: no token, no rights, a pinned image, bounded memory."""
    for spec in pod_specs(objects):
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
def test_every_profile_is_linted_and_valid_in_every_version(tmp_path, profile):
    linted = helm("lint", "--strict", CHART, *given(tmp_path, profile))
    assert linted.returncode == 0, linted.stdout + linted.stderr
    assert_valid(tmp_path, rendered(tmp_path, profile))


@pytest.mark.parametrize("profile", PROFILES)
def test_every_pod_is_restricted_and_pinned(tmp_path, profile):
    objects = rendered(tmp_path, profile)
    assert len(list(pod_specs(objects))) == (4 if profile == "to-zero" else 2)
    assert_restricted(objects)


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
    anywhere, metadata = policy(rendered(tmp_path, "spot"))["egress"]
    assert {port["port"] for port in anywhere["ports"]} == {53, 6379}, "what the profile below it allows stays allowed"
    assert metadata["to"] == [{"ipBlock": {"cidr": "169.254.169.254/32"}}]
    assert [port["port"] for port in metadata["ports"]] == [80]


def test_what_someone_waits_for_is_on_nodes_that_stay(tmp_path):
    [deployment] = [each for each in rendered(tmp_path, "critical") if each["kind"] == "Deployment"]
    spec = deployment["spec"]["template"]["spec"]
    assert spec["nodeSelector"] == {"capacity": "on-demand"}
    assert "tolerations" not in spec
    assert spec["priorityClassName"] == "pictures-critical"
    assert "SAFELIGHT_SPOT_NOTICE" not in environment(spec["containers"][0])


def test_calls_are_held_where_there_may_be_no_replica(tmp_path):
    """The service selects the replicas and the activator; the service that the activator uses selects only replicas."""
    objects = rendered(tmp_path, "to-zero")
    replica = one(objects, "Deployment")["spec"]
    assert "replicas" not in replica, "KEDA's"
    activator = one(objects, "Deployment", "safelight-activator")["spec"]["template"]
    entry = one(objects, "Service")["spec"]["selector"].items()
    for labels in (replica["template"]["metadata"]["labels"], activator["metadata"]["labels"]):
        assert entry <= labels.items()
    fleet = one(objects, "Service", "safelight-headless")["spec"]["selector"].items()
    assert fleet <= replica["template"]["metadata"]["labels"].items()
    assert not fleet <= activator["metadata"]["labels"].items()
    assert "--fleet=safelight-headless.studio.svc.cluster.local.:8421" in activator["spec"]["containers"][0]["args"]
    without = rendered(tmp_path, "to-zero", scaling={"scaler": {"image": SCALER}, "minReplicas": 1})
    assert not [each for each in without if each["metadata"]["name"] == "safelight-activator"]
    assert one(without, "Service")["spec"]["selector"] == dict(fleet), "the activator is with minReplicas: 0 alone"


def test_http_is_held_too(tmp_path):
    """The activator has the port of the replicas, and the limits that it applies in their place."""
    limits = {"max_prompt_chars": 300, "http_cors_origins": "https://studio.example", "preview_share": 0.5}
    changes = {"ports": {"http": 8080}, "settings": limits}
    objects = rendered(tmp_path, "to-zero", **changes)
    [container] = one(objects, "Deployment", "safelight-activator")["spec"]["template"]["spec"]["containers"]
    found = environment(container)
    assert (found["SAFELIGHT_HTTP_PORT"], found["SAFELIGHT_MAX_PROMPT_CHARS"]) == ("8080", "300")
    assert found["SAFELIGHT_HTTP_CORS_ORIGINS"] == "https://studio.example"
    assert "SAFELIGHT_PREVIEW_SHARE" not in found
    assert {"name": "http", "containerPort": 8080} in container["ports"]
    allowed = policy(objects, "safelight-activator")
    for rule in (allowed["ingress"][0], allowed["egress"][-1]):
        assert {"port": 8080, "protocol": "TCP"} in rule["ports"]
    without = one(rendered(tmp_path, "to-zero"), "Deployment", "safelight-activator")["spec"]["template"]["spec"]
    assert "http" not in [port["name"] for port in without["containers"][0]["ports"]]


def test_with_mtls_the_activator_wants_certificates_and_has_one(tmp_path):
    tls = {"secret": "safelight-tls", "clientCaSecret": "client-authority"}
    activator = {"clientCertSecret": "activator-client", "clientCertSecretKey": "tls-combined.pem"}
    scaling = {"scaler": {"image": SCALER}, "activator": activator}
    objects = rendered(tmp_path, "to-zero", tls=tls, scaling=scaling)
    spec = one(objects, "Deployment", "safelight-activator")["spec"]["template"]["spec"]
    [container] = spec["containers"]
    assert environment(container)["SAFELIGHT_TLS_CLIENT_CA_FILE"] == "/etc/safelight/client-ca/ca.crt"
    assert "--client-cert-file=/etc/safelight/client/tls-combined.pem" in container["args"]
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert (mounts["client-ca"], mounts["client"]) == ("/etc/safelight/client-ca", "/etc/safelight/client")
    volumes = {each["name"]: each.get("secret", {}).get("secretName") for each in spec["volumes"]}
    assert (volumes["client-ca"], volumes["client"]) == ("client-authority", "activator-client")


def archive(**changes: Any) -> dict[str, Any]:
    """The values for the job that copies bills."""
    image = {"repository": "registry.example/archiver", "digest": "sha256:" + "4" * 64}
    return {"archive": {"enabled": True, "table": "safelight-bills", "image": image} | changes}


def test_bills_are_archived_by_one_job_at_a_time(tmp_path):
    """It has the Redis and the keys of the replicas, a service account of its own, and may call what they may call."""
    role = {"eks.amazonaws.com/role-arn": "arn:aws:iam::123456789012:role/safelight-archiver"}
    given_values = {"serviceAccount": {"annotations": role}, "region": "eu-west-1", "environmentSecret": "aws"}
    objects = rendered(tmp_path, "cpu", bills=archive(**given_values), networkPolicy={"egressPorts": [6379, 443]})
    job = one(objects, "CronJob", "safelight-archiver")["spec"]
    assert (job["concurrencyPolicy"], job["timeZone"], job["schedule"]) == ("Forbid", "Etc/UTC", "17 * * * *")
    run = job["jobTemplate"]["spec"]
    assert run["backoffLimit"] == 0, "a second try would hide what the first one told"
    spec = run["template"]["spec"]
    assert (spec["restartPolicy"], spec["serviceAccountName"]) == ("Never", "safelight-archiver")
    assert one(objects, "ServiceAccount", "safelight-archiver")["metadata"]["annotations"] == role
    [container] = spec["containers"]
    assert container["args"] == ["bills", "archive"]
    found = environment(container)
    replica = environment(one(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0])
    for name in ("SAFELIGHT_REDIS_URL", "SAFELIGHT_CACHE_KEY_FILE"):
        assert found[name] == replica[name]
    assert (found["SAFELIGHT_BILLS_TABLE"], found["SAFELIGHT_DEPLOYMENT"]) == ("safelight-bills", "studio.safelight")
    assert found["AWS_DEFAULT_REGION"] == "eu-west-1" and "AWS_ENDPOINT_URL_DYNAMODB" not in found
    assert container["envFrom"] == [{"secretRef": {"name": "aws"}}]
    assert found["SAFELIGHT_CACHE_KEY_FILE"].startswith(container["volumeMounts"][1]["mountPath"])
    labels = run["template"]["metadata"]["labels"]
    allowed = policy(objects, "safelight-archiver")
    assert allowed["podSelector"]["matchLabels"].items() <= labels.items()
    assert {port["port"] for port in allowed["egress"][0]["ports"]} == {53, 6379, 443}
    assert "ingress" not in allowed and allowed["policyTypes"] == ["Ingress", "Egress"]
    for selecting in (policy(objects)["podSelector"]["matchLabels"], one(objects, "Service")["spec"]["selector"]):
        assert not selecting.items() <= labels.items(), "no calls are sent to it"
    assert not [each for each in rendered(tmp_path, "cpu") if each["metadata"]["name"] == "safelight-archiver"]


@pytest.mark.parametrize("profile", ["cpu", "triton-cpu"])
def test_the_job_is_linted_valid_in_every_version_and_restricted(tmp_path, profile):
    linted = helm("lint", "--strict", CHART, *given(tmp_path, profile, bills=archive()))
    assert linted.returncode == 0, linted.stdout + linted.stderr
    objects = rendered(tmp_path, profile, bills=archive())
    assert_restricted(objects)
    assert_valid(tmp_path, objects)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"bills": archive(table="")}, "bills.archive.enabled needs bills.archive.table and bills.archive.image"),
        ({"bills": archive(image={})}, "bills.archive.enabled needs bills.archive.table and bills.archive.image"),
        ({"bills": archive(schedule="hourly")}, "schedule"),
        ({"bills": archive(deployment="a b")}, "deployment"),
        ({"bills": archive(deployments="a")}, "deployments"),
    ],
)
def test_a_job_that_could_not_run_is_refused(tmp_path, values, said):
    made = helm("template", "safelight", CHART, *given(tmp_path, "cpu", **values))
    assert made.returncode != 0 and said in made.stderr


def test_a_job_without_redis_or_with_too_long_a_name_is_refused(tmp_path):
    made = helm("template", "safelight", CHART, *given(tmp_path, "trial", bills=archive()))
    assert "bills.archive.enabled needs redis.url or redis.secret" in made.stderr
    made = helm("template", "safelight" * 5, CHART, *given(tmp_path, "cpu", bills=archive()), "--namespace", "n" * 30)
    assert "bills.archive.deployment is needed" in made.stderr


def test_keda_asks_the_scaler(tmp_path):
    objects = rendered(tmp_path, "to-zero")
    scaled = one(objects, "ScaledObject")["spec"]
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (0, 4)
    [trigger] = scaled["triggers"]
    read = read_trigger(trigger["metadata"])
    assert read.selector == 'namespace="studio"'
    assert (read.policy.min_replicas, read.policy.max_replicas, read.policy.utilization) == (0, 4, 0.8)
    host, _, port = trigger["metadata"]["scalerAddress"].partition(":")
    service = one(objects, "Service", host.partition(".")[0])["spec"]
    assert service["ports"][0]["port"] == int(port)
    pod = one(objects, "Deployment", "safelight-scaler")["spec"]["template"]
    assert service["selector"].items() <= pod["metadata"]["labels"].items()
    [container] = pod["spec"]["containers"]
    assert environment(container) == {"SAFELIGHT_SCALER_PROMETHEUS": "http://prometheus.observability:9090"}
    assert [port["port"] for port in policy(objects, "safelight-scaler")["egress"][0]["ports"]] == [53, 53, 9090]
    behind_a_service = {"scaler": {"image": SCALER}, "prometheus": "http://prometheus-server", "prometheusPort": 9091}
    mapped = policy(rendered(tmp_path, "to-zero", scaling=behind_a_service), "safelight-scaler")
    assert [port["port"] for port in mapped["egress"][0]["ports"]] == [53, 53, 9091]


@pytest.mark.parametrize("profile", PROFILES)
def test_policies_name_ports_by_number_and_admit_nobody_by_an_empty_list(tmp_path, profile):
    """An empty list of peers or ports means all of them; not every plugin finds a named port."""
    changes = {"networkPolicy": {"clients": []}} if profile != "gpu" else {}
    policies = [each["spec"] for each in rendered(tmp_path, profile, **changes) if each["kind"] == "NetworkPolicy"]
    assert policies
    for spec in policies:
        assert spec["policyTypes"] == ["Ingress", "Egress"]
        for rule in spec["ingress"]:
            assert rule["from"]
        for rule in [*spec["ingress"], *spec["egress"]]:
            assert all(isinstance(port["port"], int) for port in rule["ports"])
            assert rule["ports"]


def test_the_pod_of_helm_test_may_always_call(tmp_path):
    objects = rendered(tmp_path, "to-zero", networkPolicy={"clients": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]})
    labels = one(objects, "Pod", "safelight-test-picture")["metadata"]["labels"]
    for name in ("safelight", "safelight-activator"):
        calls = policy(objects, name)["ingress"][0]["from"]
        assert calls[0] == {"ipBlock": {"cidr": "10.0.0.0/8"}}
        [test] = [peer["podSelector"]["matchLabels"] for peer in calls if "-test" in json.dumps(peer)]
        assert test.items() <= labels.items()


def test_clients_show_a_certificate(tmp_path):
    changes = {
        "tls": {"secret": "safelight-tls", "clientCaSecret": "client-authority"},
        "test": {"apiKeySecret": "safelight-test-key", "clientCertSecret": "test-client"},
    }
    gateway, test = pod_specs(rendered(tmp_path, "cpu", **changes))
    found = environment(gateway["containers"][0])
    assert found["SAFELIGHT_TLS_CLIENT_CA_FILE"] == "/etc/safelight/client-ca/ca.crt"
    [mount] = [each for each in gateway["containers"][0]["volumeMounts"] if each["name"] == "client-ca"]
    assert mount == {"name": "client-ca", "mountPath": "/etc/safelight/client-ca", "readOnly": True}
    assert {"secretName": "client-authority", "defaultMode": 0o440} in [
        each.get("secret") for each in gateway["volumes"]
    ]
    assert environment(test["containers"][0])["SAFELIGHT_CLIENT_CERT_FILE"] == "/etc/safelight/client/client.pem"
    assert {"secretName": "test-client", "defaultMode": 0o440} in [each.get("secret") for each in test["volumes"]]


def test_the_gpu_profile_is_for_the_nodes_that_terraform_makes(tmp_path):
    """The GPU profile fits a p4d.24xlarge, which has A100 of 40 GB."""
    [spec, _] = pod_specs(rendered(tmp_path, "gpu"))
    fleet = (ROOT / "deploy" / "terraform" / "fleet" / "main.tf").read_text()
    for label, value in spec["nodeSelector"].items():
        assert f'"{label}" = "{value}"' in fleet
    assert 'instance_types = ["p4d.24xlarge"]' in fleet


def test_triton_outlives_the_gateway_and_is_reached_by_nobody_else(tmp_path):
    """Triton is a restartable init container, which ends after the others; an ordinary container might end before they
    have drained."""
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
        for spec in pod_specs(rendered(tmp_path, profile)):
            [container] = spec["containers"]
            if container["name"] in ("gateway", "activator"):
                assert environment(container).keys() <= names


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


def test_tokens_of_an_openid_provider_take_the_place_of_keys(tmp_path):
    """The replicas and the activator check them alike, and both may reach the provider."""
    settings = {"oidc_issuer": "https://provider.example", "oidc_required": "scope=safelight/generate"}
    more = {"apiKeys": {"secret": ""}, "networkPolicy": {"egressPorts": [443]}}
    objects = rendered(tmp_path, "to-zero", settings=settings, **more)
    for name in ("safelight", "safelight-activator"):
        [container] = one(objects, "Deployment", name)["spec"]["template"]["spec"]["containers"]
        variables = environment(container)
        assert "SAFELIGHT_API_KEY_FILE" not in variables
        assert variables["SAFELIGHT_OIDC_ISSUER"] == "https://provider.example"
        assert variables["SAFELIGHT_OIDC_REQUIRED"] == "scope=safelight/generate"
        assert {"port": 443, "protocol": "TCP"} in policy(objects, name)["egress"][0]["ports"]
    without = rendered(tmp_path, "to-zero", networkPolicy={"egressPorts": [443]})
    assert {"port": 443, "protocol": "TCP"} not in policy(without, "safelight-activator")["egress"][0]["ports"]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"image": {"repository": "x", "digest": "latest"}}, "digest"),
        ({"replica": 3}, "replica"),
        ({"settings": {"max_waiting_output": 1}}, "max_waiting_output"),
        ({"settings": {"tls_cert_file": "x"}}, "tls_cert_file"),
        ({"resources": {"request": {}}}, "request"),
        ({"tls": {"secret": ""}}, "give tls.secret and apiKeys.secret (or settings.oidc_issuer), or insecure: true"),
        ({"redis": {"secret": ""}}, "replicas above 1 need redis.url or redis.secret"),
        ({"cache": {"keySecret": ""}}, "need cache.keySecret"),
        ({"redis": {"url": "redis://x"}}, "exclude each other"),
        ({"runtime": "triton"}, "needs triton.image"),
        ({"models": {"url": "s3://x/y"}}, "needs models.sha256sums"),
        ({"route": {"enabled": True}}, "needs route.parentRefs"),
        (
            {"route": {"enabled": True, "parentRefs": [{"name": "public", "namespace": "gateways"}]}},
            "networkPolicy.clients must admit its pods",
        ),
        ({"networkPolicy": {"egressPorts": []}}, "need networkPolicy.egressPorts or networkPolicy.egress"),
        (
            {
                "replicas": 1,
                "redis": {"secret": ""},
                "networkPolicy": {"egressPorts": []},
                "settings": {"oidc_issuer": "https://provider.example", "oidc_audience": "safelight"},
            },
            "settings.oidc_issuer need networkPolicy.egressPorts",
        ),
        ({"scaling": SCALING | {"keda": []}}, "keda"),
        ({"tls": {"secret": "", "clientCaSecret": "x"}, "insecure": True}, "tls.clientCaSecret needs tls.secret"),
        ({"scaling": {"enabled": True}}, "scaling.enabled needs scaling.prometheus"),
        ({"scaling": SCALING | {"minReplicas": 5}}, "scaling.maxReplicas must be at least"),
        ({"scaling": SCALING, "redis": {"secret": ""}}, "scaling.maxReplicas above 1 needs redis"),
        (
            {"scaling": SCALING | {"minReplicas": 0}, "tls": {"secret": "x", "clientCaSecret": "y"}},
            "needs scaling.activator.clientCertSecret",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_it_is_installed(tmp_path, changes, fault):
    made = helm("template", "safelight", CHART, *given(tmp_path, "cpu", **changes))
    assert made.returncode != 0
    assert fault in made.stderr
