"""moto's server, and a fleet in it. Without terraform, or without its provider for AWS, the tests that need them are skipped."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest

from tests.support.fleet import PLUGINS, Fleet, NoProviderError, moto_environment
from tests.support.moto_server import moto_server

REGION = "us-east-1"


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """The address of moto's server, with AWS' managed policies."""
    with moto_server(MOTO_IAM_LOAD_MANAGED_POLICIES="true") as address:
        yield address


@pytest.fixture(scope="session")
def initialised(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Fleet]:
    """Makes initialized copies of the root module for an endpoint; empty: without any cloud."""

    def make(address: str) -> Fleet:
        if shutil.which("terraform") is None:
            pytest.skip("no terraform on PATH: CONTRIBUTING.md says what test-cloud needs")
        fleet = Fleet(tmp_path_factory.mktemp("fleet"), address)
        try:
            fleet.init(*([] if address else ["-backend=false"]))
        except NoProviderError as error:
            pytest.skip(f"terraform has no provider for AWS, {PLUGINS} may name a folder with it: {error}")
        return fleet

    return make


@pytest.fixture(scope="session")
def fleet(initialised: Callable[[str], Fleet], endpoint: str) -> Fleet:
    """A fleet that was applied to moto."""
    made = initialised(endpoint)
    made.apply()
    return made


@pytest.fixture
def client(endpoint: str) -> Iterator[Callable[[str], Any]]:
    """Makes boto3 clients of moto's services."""
    made = []

    def of(service: str) -> Any:
        made.append(
            boto3.client(
                service,
                endpoint_url=endpoint,
                region_name=REGION,
                aws_access_key_id="test",
                aws_secret_access_key="test",
            )
        )
        return made[-1]

    yield of
    for each in made:
        each.close()


@pytest.fixture
def cloud(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets this process' environment so that boto3 and terraform use moto."""
    for name, value in moto_environment(endpoint).items():
        monkeypatch.setenv(name, value)
    if "TF_CLI_CONFIG_FILE" not in moto_environment(endpoint):
        monkeypatch.delenv("TF_CLI_CONFIG_FILE", raising=False)
