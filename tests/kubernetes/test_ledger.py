"""The chart's job that copies bills from Redis to a table of DynamoDB, here moto's, under its NetworkPolicy."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator

import boto3
import pytest
from safelight_server.storage.dynamodb import PARTITION, SORT

from tests.kubernetes.cluster import HOST, Cluster
from tests.kubernetes.conftest import CHART, ROOT, SMALL, imported, prepare, values
from tests.kubernetes.load import develop
from tests.support.moto_server import moto_server

pytestmark = pytest.mark.timeout(600)
NAMESPACE, TABLE, DATABASE = "ledger", "bills", "/3"
SEEDS = (1, 2, 3)
ANYONE = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """moto, outside of the cluster, with the table."""
    with moto_server(HOST) as url:
        keys = {PARTITION: "HASH", SORT: "RANGE"}
        boto3.client(
            "dynamodb", endpoint_url=url, region_name="us-east-1", aws_access_key_id="testing",
            aws_secret_access_key="testing",
        ).create_table(
            TableName=TABLE, BillingMode="PAY_PER_REQUEST",
            AttributeDefinitions=[{"AttributeName": key, "AttributeType": "S"} for key in keys],
            KeySchema=[{"AttributeName": key, "KeyType": kind} for key, kind in keys.items()],
        )  # fmt: skip
        yield url


def copied(cluster: Cluster, job: str) -> str:
    """What a run of the job says."""
    where = ("-n", NAMESPACE)
    cluster.kubectl("create", "job", job, "--from=cronjob/safelight-archiver", *where)
    cluster.kubectl("wait", "--for=condition=Complete", f"job/{job}", "--timeout=200s", *where, timeout_s=220)
    return cluster.kubectl("logs", f"job/{job}", *where)


async def test_the_job_copies_each_bill_once(cluster, gateway, redis, endpoint, tmp_path):
    url = redis.replace("/0", DATABASE)
    access = prepare(cluster, NAMESPACE, url, tmp_path)
    aws = {"name": "aws", "namespace": NAMESPACE}
    cluster.apply({"apiVersion": "v1", "kind": "Secret", "metadata": aws, "stringData": ANYONE})
    dynamo = {"to": [{"ipBlock": {"cidr": f"{HOST}/32"}}], "ports": [{"port": int(endpoint.rpartition(":")[2])}]}
    archive = {
        "enabled": True, "schedule": "0 0 1 1 *", "table": TABLE, "deployment": "here", "endpoint": endpoint,
        "environmentSecret": "aws", "image": imported(cluster, "archiver"),
    }  # fmt: skip
    given = values(
        tmp_path, image=gateway, resources=SMALL, drainSeconds=10, preStopSeconds=3, replicas=1,
        bills={"archive": archive}, networkPolicy={"egress": [dynamo]},
    )  # fmt: skip
    profile = ["--values", str(CHART / "profiles" / "cpu.yaml")]
    where = ("--namespace", NAMESPACE)
    cluster.helm("install", "safelight", str(CHART), *where, *profile, *given, "--wait", "--timeout", "300s")
    try:
        target = cluster.get("service", "safelight", "-n", NAMESPACE)["spec"]["clusterIP"] + ":8421"
        async with access.client(target) as client:
            for seed in SEEDS:
                await develop(client, seed)
        assert f"copied {len(SEEDS)} bills to {TABLE}" in copied(cluster, "first")
        assert f"copied 0 bills to {TABLE}" in copied(cluster, "second")
    finally:
        cluster.helm("uninstall", "safelight", *where, "--wait", "--timeout", "120s")
    by_redis = sums("--redis-url", url, "--cache-key-file", str(tmp_path / "cache.keys"))
    assert sums("--table", TABLE, AWS_ENDPOINT_URL_DYNAMODB=endpoint) == by_redis
    assert [(one["tenant"], one["pictures"]) for one in by_redis] == [("studio", len(SEEDS))]


def sums(*source: str, **environment: str) -> list[dict[str, object]]:
    """What `safelight bills` adds up."""
    ended = subprocess.run(
        [ROOT / ".venv/bin/safelight", "bills", *source, "--json"],
        capture_output=True, text=True, check=True, timeout=60, env=os.environ | ANYONE | environment,
    )  # fmt: skip
    return [json.loads(line) for line in ended.stdout.splitlines()]
