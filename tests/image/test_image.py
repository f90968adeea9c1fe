"""Tests of the images, run as in the chart: without capabilities, with a read-only root file system."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safelight import SyncClient
from safelight_server import __version__

from load_tests.ports import free_port

ROOT = Path(__file__).parent.parent.parent
OUT = ROOT / "out" / "image"
RESTRICTED = (
    "--ulimit=nofile=4096:4096",
    "--ulimit=nproc=4096:4096",
    "--no-healthcheck",
    "--read-only",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--tmpfs=/tmp",
)
GLOBAL = ("--runtime", "runc", "--cgroup-manager", "cgroupfs", "--events-backend", "none")
START_S = 100.0
pytestmark = pytest.mark.timeout(300)


def podman(*arguments: str, check: bool = True) -> str:
    environment = os.environ | {"CONTAINERS_STORAGE_CONF": str(OUT / "storage.conf")}
    ended = subprocess.run(
        ["podman", *GLOBAL, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert not check or ended.returncode == 0, ended.stderr
    return ended.stdout


def image(target: str) -> str:
    return f"localhost/safelight/{target}:{__version__}"


@contextmanager
def container(target: str, *arguments: str, **environment: object) -> Iterator[str]:
    """Runs a container in this machine's network, listening on loopback; yields its id."""
    variables = [f"--env={name}={value}" for name, value in environment.items()]
    made = podman("run", "--detach", "--network=host", *RESTRICTED, *variables, image(target), *arguments).strip()
    try:
        yield made
    finally:
        podman("rm", "--force", "--time=0", made)


def until_serving(made: str, *command: str) -> None:
    """Waits until a command in the container succeeds."""
    until = time.monotonic() + START_S
    while podman("exec", made, *command, check=False) == "":
        assert time.monotonic() < until, podman("logs", made)
        time.sleep(0.5)


def picture(port: int) -> str:
    """The digest of a picture's pixels."""
    with SyncClient(f"127.0.0.1:{port}") as client:
        made = client.generate("a red potion", seed=7, previews=False, media_type="application/x-raw-rgba8").picture()
    return hashlib.sha256(made.data).hexdigest()


def test_a_picture_is_developed_in_both_and_is_the_same():
    port, triton, triton_http, other = free_port(), free_port(), free_port(), free_port()
    with container("gateway", SAFELIGHT_PORT=port) as gateway:
        until_serving(gateway, "safelight", "health", "--target", f"127.0.0.1:{port}")
        embedded = picture(port)
        podman("stop", "--time=40", gateway)
        assert json.loads(podman("inspect", gateway))[0]["State"]["ExitCode"] == 0, "it drains and ends"
    ports = (f"--grpc-port={triton}", f"--http-port={triton_http}")
    ask = (
        f"import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:{triton_http}/v2/health/ready').status)"
    )
    with container("triton", *ports) as server:
        until_serving(server, "/opt/triton/bin/python", "-c", ask)
        settings = {
            "SAFELIGHT_RUNTIME": "triton",
            "SAFELIGHT_TRITON_URL": f"127.0.0.1:{triton}",
            "SAFELIGHT_PORT": other,
        }
        with container("gateway", SAFELIGHT_TRITON_SHARED_MEMORY="off", **settings) as gateway:
            until_serving(gateway, "safelight", "health", "--target", f"127.0.0.1:{other}")
            assert picture(other) == embedded


@pytest.mark.parametrize("target", ["gateway", "triton"])
def test_there_is_no_compiler_no_test_and_no_root(target):
    settings = json.loads(podman("image", "inspect", image(target)))[0]["Config"]
    assert settings["User"] == "10001:10001"
    python = f"/opt/{'safelight' if target == 'gateway' else 'triton'}/bin/python"
    code = """
import os, shutil, sys
tools = [name for name in ("gcc", "cc", "ld", "make", "pip", "apt-get", "go") if shutil.which(name)]
tests = [path for path, folders, _ in os.walk(sys.prefix) if os.path.basename(path) == "tests"]
writable = [path for path, _, _ in os.walk("/opt") if os.access(path, os.W_OK)]
print(tools, tests, writable, os.getuid())
"""
    said = podman("run", "--rm", "--network=none", *RESTRICTED, "--entrypoint", python, image(target), "-c", code)
    assert said.strip() == "[] [] [] 10001"


def test_a_server_beyond_loopback_wants_keys():
    said = subprocess.run(
        ["podman", *GLOBAL, "run", "--rm", "--network=none", *RESTRICTED, "--env=SAFELIGHT_HOST=0.0.0.0", image("gateway")],
        env=os.environ | {"CONTAINERS_STORAGE_CONF": str(OUT / "storage.conf")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert said.returncode == 2
    assert "give api_key_file or oidc_issuer, or insecure" in said.stderr


@pytest.mark.parametrize(("target", "lock"), [("gateway", "requirements.lock"), ("triton", "requirements-triton.lock")])
def test_the_bill_of_materials_is_that_of_the_lock_file_and_of_the_image(target, lock):
    bill = json.loads((OUT / f"{target}.cdx.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    locked = {line.split(" ")[0].split(";")[0] for line in (ROOT / lock).read_text().splitlines() if line[:1].isalnum()}
    listed = {f"{part['name']}=={part['version']}" for part in bill["components"]}
    assert listed == locked
    assert all(part["purl"].startswith("pkg:pypi/") for part in bill["components"])
