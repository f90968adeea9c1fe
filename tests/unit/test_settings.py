"""Settings: all faults at once, safe by default, and a reference page that is current."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safelight_server.settings import Settings, SettingsError, is_loopback, load

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


def test_beyond_loopback_needs_tls_and_keys_or_insecure():
    with pytest.raises(SettingsError, match=r"tls_cert_file.*api_key_file"):
        load(host="0.0.0.0")
    assert load(host="0.0.0.0", insecure=True).insecure
    assert load(host="127.0.0.1").host == "127.0.0.1"


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("unix:/x", True), ("0.0.0.0", False), ("a.b", False)],
)
def test_what_loopback_is(host, loopback):
    assert is_loopback(host) is loopback


def safelight(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "safelight_server.cli", *arguments]
    env = {"PYTHONPATH": f"{ROOT}/server:{ROOT}/clients/python", "PATH": "/usr/bin", "NO_COLOR": "1"} | environment
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=50, check=False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("serve", "--host", "0.0.0.0"), "is not loopback"),
        (("serve", "--models-dir", "/nowhere"), "no pipelines"),
        (("serve", "--api-key-file", "/nowhere"), "/nowhere"),
        (("generate", "a potion", "--target", "127.0.0.1:1"), "UNAVAILABLE"),
        (("generate", "a potion", "--out", "potion.gif"), ".png"),
        (("models", "--target", "127.0.0.1:1"), "UNAVAILABLE"),
        (("health", "--target", "127.0.0.1:1"), "127.0.0.1:1"),
        (("keys", "new", "a b"), "caller"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(arguments, says):
    done = safelight(*arguments)
    assert done.returncode in (1, 2), done
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
