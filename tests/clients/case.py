"""Sets up a case of clients/conformance/cases.json: its servers, its network, and the input of the runner."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import hashlib
import json
import re
import signal
import urllib.request
import uuid
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safelight_server.app.server import Running

from load_tests.ports import free_port
from tests.clients.runner import Runner
from tests.conftest import serving_here
from tests.integration.test_images import MASK, PHOTO
from tests.support.certificates import self_signed
from tests.support.draining import draining
from tests.support.redis_server import RedisServer
from tests.support.relay import Relay
from tests.support.replicas import Replica, replicas
from tools.clients import runners
from tools.clients.commands import ROOT

CASES: list[dict[str, Any]] = json.loads((ROOT / "clients/conformance/cases.json").read_text())
NAME = "safelight.example"
KEYS = {"good": "a-key-of-this-test", "wrong": "another-key", "missing": ""}
SIMULATED = {"runtime": "simulated", "simulated_base_ms": 20, "simulated_row_ms": 0}


@dataclass(frozen=True, slots=True)
class Tls:
    """The client's TLS settings; all empty: plain text.

    Attributes:
        ca_file: the certificate authority that the client trusts.
        server_name: the name that it expects in the server's certificate.
        cert_file, key_file: the client's own certificate and key.
    """

    ca_file: str = ""
    server_name: str = ""
    cert_file: str = ""
    key_file: str = ""


@dataclass(slots=True)
class Setting:
    """The environment in which a case runs.

    Attributes:
        targets: the client's targets, in order.
        relay: the relay in front of the first server.
        metrics_port: metrics port of the first server, if the case checks metrics.
        refused: reasons with which the first server has refused requests, at the end of the case.
        init_image_file, mask_file: pictures that the client uploads; empty: none.
    """

    targets: list[str]
    relay: Relay | None = None
    tls: Tls = field(default_factory=lambda: Tls())
    metrics_port: int = 0
    refused: frozenset[str] = frozenset()
    init_image_file: str = ""
    mask_file: str = ""


def is_of_http(case: dict[str, Any]) -> bool:
    """Whether the case is one for pages too, over gRPC-Web at the server's HTTP port.

    A page cannot choose certificate authorities or control its connections, does not notice a frozen server, cannot
    upload, and has no flow-control window or message limit of its own. The frames of a cancelled call belong to HTTP/2.
    """
    of_grpc = {"pause_s", "max_message_bytes"} & set(case.get("client", {}))
    elsewhere = case.get("own_process") or case.get("drains") or case.get("init_image") or "tls" in case
    cancelled = case.get("weather", {}).get("do") == "cancel"
    return case.get("servers", 1) == 1 and not elsewhere and not cancelled and not of_grpc


async def run(
    case: dict[str, Any], runner: Runner, folder: Path, *, http: bool = False, shared: Running | None = None
) -> tuple[dict[str, Any], Setting]:
    """Runs a case with a runner; returns the runner's output and the setting at the end.

    Args:
        http: whether the client uses the HTTP port.
        shared: the server that all languages use, if the case has one.
    """
    async with set_up(case, folder, http=http, shared=shared) as setting:
        report = await runner.run(told(case, setting))
        if setting.metrics_port:
            setting.refused = await asyncio.to_thread(_refused, setting.metrics_port)
    return report, setting


def told(case: dict[str, Any], setting: Setting) -> dict[str, Any]:
    """The runner's input: the case without its expectations and set-up."""
    images = {"init_image_file": setting.init_image_file, "mask_file": setting.mask_file}
    key = KEYS[case["key"]] if "key" in case else ""
    client = images | case.get("client", {})
    return runners.told(case["name"], setting.targets, requests(case), api_key=key, **asdict(setting.tls), **client)


def requests(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a case. Copies have different seeds, unless they have one request id."""
    made = []
    request_id = str(uuid.uuid4())
    for index in range(case.get("copies", 1)):
        request = copy.deepcopy(case["request"])
        same = case.get("same_request_id")
        request["requestId"] = request_id if same else str(uuid.uuid4())
        for output in request["spec"].get("outputs", []):
            output["seed"] += 0 if same else index
        if size := case.get("long_prompt_bytes"):
            request["spec"]["prompt"] = "x" * size
        made.append(request)
    return made


@contextlib.asynccontextmanager
async def shared_server(case: dict[str, Any]) -> AsyncIterator[Running | None]:
    """The server that all languages share, in cases in which the server starts slowly and is not disturbed."""
    if not case.get("one_server_for_all"):
        yield None
        return
    async with serving_here(**SIMULATED | case.get("settings", {}) | {"http_port": free_port()}) as running:
        yield running


@contextlib.asynccontextmanager
async def set_up(
    case: dict[str, Any], folder: Path, *, http: bool = False, shared: Running | None = None
) -> AsyncIterator[Setting]:
    """Starts the servers of a case and the relay before the first one."""
    settings = SIMULATED | case.get("settings", {})
    async with contextlib.AsyncExitStack() as ends:
        if (count := case.get("servers", 1)) == 0:
            relay = await Relay.start("127.0.0.1:1")
            relay.cut()
            yield Setting([relay.address])
            return
        tls = _tls(case, folder, settings)
        if "key" in case:
            settings["api_key_file"] = folder / "keys.json"
            entry = {"sha256": hashlib.sha256(KEYS["good"].encode()).hexdigest(), "caller": "game", "tenant": "studio"}
            settings["api_key_file"].write_text(json.dumps({"keys": [entry]}))
        metrics_port = 0
        if any("refused" in outcome for outcome in case["expect"]):
            settings["metrics_port"] = metrics_port = free_port()
        running: list[Replica] = []
        if count > 1:
            redis = RedisServer(folder)
            redis.start()
            ends.callback(redis.kill)
            running = await ends.enter_async_context(replicas(redis.url, folder, count, **settings))
        elif case.get("own_process"):
            running = await ends.enter_async_context(replicas("", folder, 1, **settings))
        if running:
            addresses = [replica.address for replica in running]
        else:
            here = shared or await ends.enter_async_context(
                serving_here(**settings | ({"http_port": free_port()} if http else {}))
            )
            addresses = [here.http_address if http else here.address]
        before = [(await ends.enter_async_context(draining(**settings))).address] if case.get("drains") else []
        relay = await Relay.start(*before, addresses[0])
        ends.callback(relay.cut)
        _forecast(case.get("weather", {}), relay, running)
        setting = Setting([relay.address, *addresses[1:]], relay, tls, metrics_port)
        if case.get("init_image"):
            photo, mask = folder / "photo.png", folder / "mask.png"
            photo.write_bytes(PHOTO)
            mask.write_bytes(MASK)
            setting.init_image_file, setting.mask_file = str(photo), str(mask)
        yield setting


def _tls(case: dict[str, Any], folder: Path, settings: dict[str, Any]) -> Tls:
    """Gives the server its certificate; returns the client's settings."""
    if "tls" not in case:
        return Tls()
    own, other = (tuple(map(str, self_signed(folder, name))) for name in (NAME, "other.example"))
    if case["tls"] != "client_only":
        settings["tls_cert_file"], settings["tls_key_file"] = own
    if case["tls"].startswith("mutual"):
        settings["tls_client_ca_file"] = other[0]
    match case["tls"]:
        case "trusted" | "client_only" | "mutual_without":
            return Tls(own[0], NAME)
        case "untrusted":
            return Tls(other[0], NAME)
        case "other_name":
            return Tls(own[0], "other.example")
        case "mutual":
            return Tls(own[0], NAME, *other)
        case "mutual_untrusted":
            return Tls(own[0], NAME, *own)
        case "server_only":
            return Tls()
        case unknown:
            raise ValueError(unknown)


def _forecast(weather: dict[str, Any], relay: Relay, running: list[Replica]) -> None:
    """Arranges the disturbances of the network between the client and the first server."""
    relay.delay_s = weather.get("delay_s", 0.0)
    if "do" not in weather:
        return
    if weather["do"] == "cancel":
        relay.cancel_after(weather["after_bytes"])
        return

    async def happen() -> None:
        match weather["do"]:
            case "cut":
                relay.reset()
            case "truncate":
                relay.end()
            case "kill":
                running[0].signal(signal.SIGKILL)
            case "freeze":
                running[0].signal(signal.SIGSTOP)
            case "drain":
                running[0].signal(signal.SIGTERM)

    relay.after(weather["after_bytes"], happen)


def _refused(metrics_port: int) -> frozenset[str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics") as page:
        return frozenset(re.findall(r'safelight_refused_total{reason="(\w+)"} [1-9]', page.read().decode()))
