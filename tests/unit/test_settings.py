"""Settings: all faults are reported at once, defaults are safe, and the reference page is current."""

from __future__ import annotations

import asyncio
import math
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safelight_server import __version__
from safelight_server.app.errors import StartError
from safelight_server.app.server import build_runtime, serving
from safelight_server.catalog.catalog import ManifestError
from safelight_server.runtime.simulated import SimulatedRuntime
from safelight_server.settings import REMOVED, Settings, SettingsError, is_loopback, load, misspelt
from safelight_server.storage.keyring import new_key_file

ROOT = Path(__file__).parent.parent.parent


def test_every_setting_says_what_it_means():
    for name, field in Settings.model_fields.items():
        assert field.description, name


def test_all_bad_values_are_named(monkeypatch):
    monkeypatch.setenv("SAFELIGHT_PORT", "99999")
    monkeypatch.setenv("SAFELIGHT_RUNTIME", "abacus")
    with pytest.raises(SettingsError) as caught:
        load(max_running_outputs=0)
    for name in ("port", "runtime", "max_running_outputs"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("max_prompt_chars", 1_000_000, 1_000_001),
        ("max_running_outputs", 65_536, 65_537),
        ("http_cors_origins", "https://a.example, http://localhost:3000", "https://a.example/"),
        ("http_cors_origins", "*", "a.example"),
        ("http_cors_origins", "", "https://*.example"),
        ("http_port", 8080, 65_536),
        ("http_max_connections", 1, 0),
        ("simulated_base_ms", 1e6, float("inf")),
        ("simulated_row_ms", 0.0, float("inf")),
        ("otlp_endpoint", "http://127.0.0.1:4317", "127.0.0.1:4317"),
        ("otlp_endpoint", "https://collector", "https://"),
        ("otlp_endpoint", "", "http://[:4317"),
        ("otlp_endpoint", "http://[::1]:4317", "http://collector:99999"),
    ],
)
def test_what_could_not_work_is_refused(name, good, bad):
    assert getattr(load(**{name: good}), name) == good
    with pytest.raises(SettingsError, match=name):
        load(**{name: bad})


def test_a_setting_that_is_gone_is_refused_and_says_what_to_use(monkeypatch):
    monkeypatch.setenv("SAFELIGHT_CACHE_S3_ENDPOINT", "http://127.0.0.1:9000")
    monkeypatch.setenv("SAFELIGHT_MAX_WAITING_STANDARD", "10")
    monkeypatch.setenv("SAFELIGHT_BREAKER_FAILURES", "")
    with pytest.raises(SettingsError) as caught:
        load()
    assert str(caught.value) == (
        "max_waiting_standard is gone: use max_waiting_outputs\n"
        "cache_s3_endpoint is gone: use ?endpoint_url=... in cache_s3_url"
    )
    assert not REMOVED.keys() & Settings.model_fields.keys()


def test_a_default_model_that_is_not_there_is_refused_by_the_simulated_runtime_too():
    assert build_runtime(load(runtime="simulated", default_model="simulated"))
    with pytest.raises(ManifestError, match="there is no 'icons'"):
        build_runtime(load(runtime="simulated", default_model="icons"))


def test_certificates_of_clients_need_one_of_the_server():
    with pytest.raises(SettingsError, match="tls_client_ca_file needs tls_cert_file and tls_key_file"):
        load(tls_client_ca_file="clients.pem")
    assert load(tls_client_ca_file="clients.pem", tls_cert_file="a", tls_key_file="b").tls_client_ca_file


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"oidc_issuer": "https://a/b"}, "needs oidc_audience or oidc_required"),
        ({"oidc_audience": "x"}, "oidc_audience needs oidc_issuer"),
        ({"oidc_admin": "scope=x"}, "oidc_admin needs oidc_issuer"),
        ({"oidc_issuer": "http://a", "oidc_audience": "x"}, "must have https"),
        ({"oidc_issuer": "https://a?b", "oidc_audience": "x"}, "must be https://HOST"),
        ({"oidc_issuer": "a", "oidc_audience": "x"}, "must be https://HOST"),
        ({"oidc_issuer": "https://a", "oidc_audience": "x,,y"}, "oidc_audience must be texts"),
        ({"oidc_issuer": "https://a", "oidc_required": "scope"}, "oidc_required must be CLAIM=VALUE"),
        ({"oidc_issuer": "https://a", "oidc_required": "a=b", "oidc_admin": "=b"}, "oidc_admin must be CLAIM=VALUE"),
    ],
)
def test_tokens_of_any_service_are_not_accepted(given, fault):
    with pytest.raises(SettingsError, match=re.escape(fault)):
        load(**given)


def test_an_issuer_is_enough_beyond_loopback():
    given = {"host": "0.0.0.0", "tls_cert_file": "a", "tls_key_file": "b", "oidc_required": "realm.roles=a b"}
    assert load(oidc_issuer="https://a", **given).requires_credentials
    assert load(oidc_issuer="http://127.0.0.1:1/realm", oidc_audience="x, y").oidc_audiences == {"x", "y"}
    assert load(oidc_issuer="http://keycloak:8080", oidc_audience="x", insecure=True).requires_credentials
    assert not load().requires_credentials


def test_beyond_loopback_needs_tls_and_keys_or_insecure():
    with pytest.raises(SettingsError, match=r"tls_cert_file.*api_key_file"):
        load(host="0.0.0.0")
    assert load(host="0.0.0.0", insecure=True).insecure
    assert load(host="127.0.0.1").host == "127.0.0.1"


def test_http_is_not_served_on_a_unix_socket():
    assert load(host="unix:/tmp/x").http_port == 0
    with pytest.raises(SettingsError, match="http_port"):
        load(host="unix:/tmp/x", http_port=8080)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("unix:/x", True), ("0.0.0.0", False), ("a.b", False)],
)
def test_what_loopback_is(host, loopback):
    assert is_loopback(host) is loopback


def test_an_empty_variable_is_none_at_all(monkeypatch):
    for name in ("REDIS_URL", "API_KEY_FILE", "PORT"):
        monkeypatch.setenv(f"SAFELIGHT_{name}", "")
    settings = load()
    assert (settings.redis_url, settings.api_key_file, settings.port) == (None, None, 8421)


def test_a_variable_that_is_almost_a_settings_is_told_and_others_are_left_alone():
    """Others are the command line's own, those of tests, and those that Kubernetes sets for a Service of this name."""
    given = ["SAFELIGHT_MODEL_DIR", "SAFELIGHT_REDISURL", "SAFELIGHT_PORT", "SAFELIGHT_TARGET", "SAFELIGHT_API_KEY"]
    given += [
        "SAFELIGHT_CA_FILE",
        "SAFELIGHT_CLIENT_CERT_FILE",
        "SAFELIGHT_SERVER_NAME",
        "SAFELIGHT_STORM",
        "SAFELIGHT_SERVICE_HOST",
        "HOSTS",
    ]
    given += ["SAFELIGHT_SERVICE_PORT", "SAFELIGHT_PORT_8421_TCP_ADDR", "SAFELIGHT_SERVICE_PORT_GRPC"]
    assert misspelt(dict.fromkeys(given, "")) == {
        "SAFELIGHT_MODEL_DIR": "SAFELIGHT_MODELS_DIR",
        "SAFELIGHT_REDISURL": "SAFELIGHT_REDIS_URL",
    }


def test_replicas_need_a_place_that_they_share(tmp_path):
    given = {"redis_url": "redis://127.0.0.1:6379/0", "cache_redis": False, "cache_key_file": tmp_path / "keys"}
    with pytest.raises(SettingsError, match="cache_redis=false needs cache_s3_url"):
        load(**given)
    assert load(**given, cache_s3_url="s3://pictures").cache_redis is False
    assert load(cache_redis=False).redis_url is None


def test_times_that_classes_may_wait_are_positive_and_of_classes_that_there_are(monkeypatch):
    monkeypatch.setenv("SAFELIGHT_CLASS_WAIT_S", '{"batch": 2.5}')
    assert load().class_wait_s == {"batch": 2.5}
    for wrong in ({"batch": 0}, {"urgent": 1.0}, {"standard": math.inf}):
        with pytest.raises(SettingsError, match="class_wait_s"):
            load(class_wait_s=wrong)


def test_the_address_of_spot_notices_is_one():
    for wrong in ("169.254.169.254", "ftp://169.254.169.254", ""):
        with pytest.raises(SettingsError, match="spot_notice_url must be http"):
            load(spot_notice_url=wrong)


def test_a_variable_that_is_no_json_is_a_fault(monkeypatch):
    monkeypatch.setenv("SAFELIGHT_CACHE_POOLS", "{")
    with pytest.raises(SettingsError, match="cache_pools"):
        load()


def safelight(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "safelight_server.cli.main", *arguments]
    env = {"PYTHONPATH": f"{ROOT}/server:{ROOT}/clients/python", "PATH": "/usr/bin", "NO_COLOR": "1"} | environment
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=50, check=False)


def test_the_version_is_printed():
    assert safelight("--version").stdout == f"safelight {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("serve", "--host", "0.0.0.0"), "is not loopback"),
        (("serve", "--models-dir", "/nowhere"), "/nowhere has no model"),
        (("serve", "--api-key-file", "/nowhere"), "/nowhere"),
        (("generate", "a potion", "--target", "127.0.0.1:1"), "UNAVAILABLE"),
        (("generate", "a potion", "--out", "potion.gif"), ".png"),
        (("models", "--target", "127.0.0.1:1"), "UNAVAILABLE"),
        (("health", "--target", "127.0.0.1:1"), "127.0.0.1:1"),
        (("keys", "new", "a b"), "caller"),
        (("models", "--api-key", "clé"), "--api-key / SAFELIGHT_API_KEY: must be visible ASCII"),
        (("generate", "\udcff\udcfe"), "PROMPT: is not UTF-8"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(arguments, says):
    done = safelight(*arguments)
    assert done.returncode in (1, 2), done
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.fixture
def taken():
    """A port that is already in use."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


async def refusal(**settings: object) -> str:
    """Why a server does not start."""
    given = {"runtime": "simulated", "port": 0, "log_level": "error"} | settings
    with pytest.raises(StartError) as caught:
        async with serving(load(**given)):
            pass
    return str(caught.value)


async def test_what_keeps_the_server_from_starting_is_told_in_words(taken, tmp_path):
    not_pem = tmp_path / "not.pem"
    not_pem.write_text("not PEM")
    assert f"cannot bind 127.0.0.1:{taken}" in await refusal(port=taken)
    assert f"metrics_port {taken} of 127.0.0.1" in await refusal(metrics_port=taken)
    assert f"metrics_port {taken} of 127.0.0.1" in await refusal(
        metrics_port=taken, host=f"unix:{tmp_path}/socket", insecure=True
    )
    assert f"tls_cert_file {not_pem}" in await refusal(tls_cert_file=not_pem, tls_key_file=not_pem)
    assert "No such file" in await refusal(tls_cert_file=not_pem, tls_key_file=tmp_path / "none")
    assert "not.pem" in await refusal(cache_key_file=not_pem)
    keys = tmp_path / "keys"
    keys.write_text(new_key_file())
    assert "s3://" in await refusal(cache_key_file=keys, cache_s3_url="http://x")
    assert "redis://" in await refusal(cache_key_file=keys, redis_url="http://x")


async def test_a_start_that_fails_leaves_nothing_running(taken, monkeypatch):
    closed = []

    async def close(runtime):
        closed.append(runtime)

    monkeypatch.setattr(SimulatedRuntime, "close", close)
    before = asyncio.all_tasks()
    await refusal(port=taken)
    assert len(closed) == 1, "what holds shared memory must let it go"
    assert asyncio.all_tasks() == before


def test_a_signal_ends_a_start_that_takes_long():
    """There is no Triton; the start would wait a minute for one."""
    command = [
        sys.executable,
        "-m",
        "safelight_server.cli.main",
        "serve",
        "--runtime",
        "triton",
        "--triton-url",
        "127.0.0.1:1",
    ]
    env = {"PYTHONPATH": f"{ROOT}/server:{ROOT}/clients/python", "PATH": "/usr/bin", "SAFELIGHT_TRITON_START_S": "600"}
    env["SAFELIGHT_TRITON_START"] = "1"  # almost a setting's
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env) as process:
        assert process.stderr is not None
        assert '"meant": "SAFELIGHT_TRITON_START_S"' in process.stderr.readline()
        assert "server_not_usable" in process.stderr.readline()
        process.terminate()
        said = process.stderr.read()
        assert process.wait() == 2
    assert said.strip() == "safelight: a signal came before the server had started"
