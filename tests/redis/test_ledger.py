"""`safelight bills archive` copies bills from a real Redis to a table in moto, and `safelight bills --table` sums them up."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safelight_server.cluster import bill_archive
from safelight_server.cluster.bill_archive import ArchiveReport, BillArchive
from safelight_server.cluster.ledger import Ledger
from safelight_server.coordination.redis import BILLS, RedisCoordinator
from safelight_server.storage.dynamodb import STALLED_ROUNDS, DynamoTable, TableError
from safelight_server.storage.keyring import Keyring, new_key_file
from safelight_server.storage.sealed import Sealer

from tests.redis.test_bills import AT_MS, DAY_MS
from tests.support.bills import Ran
from tests.support.dynamodb import Answer, Forward, TableServer, forwarded
from tests.support.moto_server import moto_server
from tests.support.redis_server import RedisServer
from tests.support.replicas import key_file

WAIT_S = 30
FEBRUARY_MS = AT_MS + 31 * DAY_MS
"""2026-02-01, UTC."""
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
}

DENIED = (400, {"__type": "com.amazon.coral.service#AccessDeniedException", "message": "not allowed"})
"""DynamoDB's answer to who may not do that."""

Command = Callable[..., Ran]


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    with moto_server() as endpoint:
        yield endpoint


@pytest.fixture
def dynamodb(moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[TableServer]:
    """Tables in moto, where boto3 finds them."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    with TableServer(moto).running() as server:
        for name, value in (ENVIRONMENT | {"AWS_ENDPOINT_URL_DYNAMODB": server.endpoint}).items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def table(dynamodb: TableServer) -> str:
    """An empty table."""
    return dynamodb.make_table()


@pytest.fixture
def archived(
    redis_server: RedisServer, tmp_path: Path, table: str, replicas: Callable[..., RedisCoordinator]
) -> Iterator[Callable[..., Any]]:
    """Copies the bills as one run of the command does, and as one of several that are under way at once."""
    opened = []

    async def run(deployment: str = "studio-1", **options: Any) -> ArchiveReport:
        # No call may be repeated because a test holds its answer back.
        opened.append(DynamoTable(table, timeout_s=2 * WAIT_S, **options))
        sealer = Sealer(Keyring.load(key_file(tmp_path)))
        return await BillArchive(replicas(redis_server.url), opened[-1], deployment, sealer).run()

    yield run
    for each in opened:
        each.close()


@pytest.fixture
def read(table: str) -> Iterator[Callable[..., list[Any]]]:
    """The bills of the table."""
    opened = []

    def bills(**options: Any) -> list[Any]:
        opened.append(DynamoTable(table))
        return list(Ledger(opened[-1], **options).bills())

    yield bills
    for each in opened:
        each.close()


def archive(command: Command, table: str, deployment: str = "studio-1", *more: str) -> Ran:
    return command("archive", "--table", table, "--deployment", deployment, *more)


def copied(ran: Ran) -> int:
    """The number of bills that a run without faults has copied."""
    assert (ran.code, ran.errors) == (0, ""), ran
    assert ran.out.startswith("copied ")
    return int(ran.out.split()[1])


def test_both_sources_have_the_same_sums(command, stream, table, tmp_path):
    """Over two months, with the figures as they come: 0.1 has no exact binary form."""
    for number in range(60):
        tenant, model, began = ("studio", "lab")[number % 2], f"icons/{number % 3}", ("miss", "latent")[number % 5 == 0]
        at_ms = AT_MS + number * DAY_MS
        stream.add(at_ms, tenant, model_revision=model, disposition=began, compute_s=0.1 * number, rows=2 * number)
    stream.add(FEBRUARY_MS + 40 * DAY_MS, "studio")  # of an earlier version, without model and beginning
    assert copied(archive(command, table)) == 61
    prices = tmp_path / "prices.toml"
    prices.write_text('currency = "USD"\n[instance_types.gpu]\nper_hour = 3.6\n')
    for arguments in (
        (),
        ("--json",),
        ("--csv", "--by", "tenant"),
        ("--json", "--by", "model_revision,disposition"),
        ("--json", "--tenant", "lab"),
        ("--json", "--tenant", "nobody"),
        ("--json", "--since", "2026-01-31", "--until", "2026-02-03"),
        ("--json", "--since", "2026-02-10T12:00:00"),
        ("--csv", "--until", "2026-01-07", "--tenant", "studio"),
        ("--csv", "--since", "2031-01-01"),
        ("--json", "--price-file", str(prices), "--instance-type", "gpu"),
    ):
        redis, table_ = command(*arguments), command("--table", table, *arguments)
        assert (redis.code, redis.errors) == (0, "")
        assert table_ == redis, arguments
    assert command("--json", "--by", "tenant").out.count("\n") == 2


def test_a_second_run_copies_what_is_new(command, stream, table, dynamodb):
    assert copied(archive(command, table)) == 0, "an empty stream"
    for number in range(3):
        stream.add(AT_MS + number, "studio")
    assert copied(archive(command, table)) == 3
    before = dynamodb.items(table)
    assert copied(archive(command, table)) == 0
    assert dynamodb.items(table) == before
    stream.add(AT_MS + 2, "studio")  # in the millisecond of the last one
    stream.add(FEBRUARY_MS, "lab")
    assert copied(archive(command, table)) == 2
    assert len(dynamodb.items(table)) == 5


def test_the_table_has_what_the_page_says_and_nothing_else(command, stream, table, dynamodb):
    stream.add(AT_MS, "studio", model_revision="icons/1", disposition="miss", prompt="of a later version")
    copied(archive(command, table))
    [((partition, sort_key), item)] = dynamodb.items(table).items()
    assert partition == "bills#studio-1#studio#2026-01"
    assert sort_key.startswith("2026-01-01T00:00:00.000Z#00000000000000000000#")
    facts = {name: next(iter(value.values())) for name, value in item.items() if name not in ("pk", "sk")}
    assert facts == {
        "deployment": "studio-1",
        "tenant": "studio",
        "generation": "generations/a",
        "model_revision": "icons/1",
        "disposition": "miss",
        "rows": "2",
        "steps": "1",
        "compute_s": "0.5",
        "committed_at": "2026-01-01T00:00:00.000Z",
    }


@pytest.mark.parametrize("batch", [3, 42], ids=["in the first page", "after a checkpoint"])
def test_a_run_that_was_killed_half_way_leaves_nothing_out_and_nothing_twice(
    redis_server, command, stream, table, dynamodb, tmp_path, batch
):
    """The process is killed when DynamoDB has written a batch and before it is told so."""
    for number in range(1030):  # 42 batches: one of the directory, 40 of the first page, 2 of the second
        stream.add(AT_MS + number, "studio")
    seen, started, processes = 0, threading.Event(), []

    def kill(operation: str, body: dict[str, Any], forward: Forward) -> Answer:
        nonlocal seen
        answer = forward(body)
        seen += operation == "BatchWriteItem"
        if seen == batch:
            assert started.wait(WAIT_S)
            processes[0].kill()
            processes[0].wait()
        return answer

    dynamodb.hook = kill
    arguments = ("bills", "archive", "--table", table, "--deployment", "studio-1")
    with subprocess.Popen(
        [sys.executable, "-m", "safelight_server.cli.main", *arguments], stderr=subprocess.PIPE
    ) as run:
        processes.append(run)
        started.set()
        assert run.wait() == -9, run.stderr and run.stderr.read()
    assert 0 < len(dynamodb.items(table)) < 1030
    assert copied(archive(command, table)) == (1030 if batch == 3 else 30)
    assert len(dynamodb.items(table)) == 1030
    assert [one["pictures"] for one in command("--table", table, "--json").rows()] == [1030]


async def test_two_runs_at_once_write_each_bill_once(stream, table, dynamodb, archived, read):
    for number in range(100):
        stream.add(AT_MS + number, "studio" if number % 2 else "lab")
    together = threading.Barrier(2)

    def meet(operation: str, body: dict[str, Any], forward: Forward) -> Answer:
        if operation in ("GetItem", "PutItem"):  # both begin at the same checkpoint, and both move it
            together.wait(WAIT_S)
        return forward(body)

    dynamodb.hook = meet
    reports = await asyncio.gather(archived(), archived())
    dynamodb.hook = forwarded
    assert [report.copied for report in reports] == [100, 100]
    assert len(dynamodb.items(table)) == len(read()) == 100
    stream.add(AT_MS + 100, "lab")
    assert (await archived()).copied == 1


async def test_a_slow_run_does_not_move_the_checkpoint_back(stream, table, dynamodb, archived):
    """It waits before it moves the checkpoint, while another run moves it further, and then ends by an error."""
    stream.add(AT_MS, "studio")
    waits, goes_on = threading.Event(), threading.Event()

    def hold(operation: str, body: dict[str, Any], forward: Forward) -> Answer:
        if operation == "PutItem" and not waits.is_set():
            waits.set()
            assert goes_on.wait(WAIT_S)
        return DENIED if operation == "BatchWriteItem" and goes_on.is_set() else forward(body)

    dynamodb.hook = hold
    slow = asyncio.create_task(archived())
    assert await asyncio.to_thread(waits.wait, WAIT_S)
    stream.add(AT_MS + 1, "studio")
    assert (await archived()).copied == 2
    goes_on.set()
    with pytest.raises(TableError):
        await slow
    dynamodb.hook = forwarded
    assert (await archived()).copied == 0
    assert len(dynamodb.items(table)) == 2


async def test_what_a_throttled_table_leaves_out_is_sent_again(stream, table, dynamodb, archived, read):
    """Every second batch is written in part, and one call is refused, which botocore repeats."""
    for number in range(60):
        stream.add(AT_MS + number, "studio")
    calls, waits = 0, []

    def throttle(operation: str, body: dict[str, Any], forward: Forward) -> Answer:
        nonlocal calls
        if operation != "BatchWriteItem":
            return forward(body)
        calls += 1
        if calls == 2:
            return 400, {"__type": "com.amazonaws.dynamodb.v20120810#ProvisionedThroughputExceededException"}
        requests = body["RequestItems"][table]
        if calls % 2 or len(requests) == 1:
            return forward(body)
        status, answer = forward({"RequestItems": {table: requests[:1]}})
        return status, answer | {"UnprocessedItems": {table: requests[1:]}}

    dynamodb.hook = throttle
    report = await archived(sleep=waits.append)
    assert report.copied == len(dynamodb.items(table)) == len(read()) == 60
    assert waits and all(0 <= wait <= 5 for wait in waits)


async def test_a_table_that_writes_nothing_ends_the_run_and_the_next_one_goes_on(stream, table, dynamodb, archived):
    for number in range(60):
        stream.add(AT_MS + number, "studio")
    written = 0

    def stall(operation: str, body: dict[str, Any], forward: Forward) -> Answer:
        nonlocal written
        if operation == "BatchWriteItem":
            written += 1
            if written > 2:  # the directory, and 25 bills
                return 200, {"UnprocessedItems": body["RequestItems"]}
        return forward(body)

    dynamodb.hook = stall
    waits: list[float] = []
    with pytest.raises(TableError, match="throttled"):
        await archived(sleep=waits.append)
    assert len(waits) == STALLED_ROUNDS - 1
    assert len(dynamodb.items(table)) == 25
    dynamodb.hook = forwarded
    assert (await archived()).copied == len(dynamodb.items(table)) == 60


def test_bills_that_redis_dropped_between_two_runs_are_told_then_and_at_each_reading(command, stream, table):
    for number in range(4):
        stream.add(AT_MS + number * DAY_MS, "studio")
    copied(archive(command, table))
    stream.client.xtrim(BILLS, maxlen=1, approximate=False)
    assert copied(archive(command, table)) == 0, "the last one that was copied is still there, and so is what follows"
    for number in (10, 11, 12):
        stream.add(AT_MS + number * DAY_MS, "studio")
    stream.client.xtrim(BILLS, maxlen=2, approximate=False)
    lost = "bills of studio-1 from 2026-01-04 00:00:00 to 2026-01-12 00:00:00 (UTC) may be missing: "
    ran = archive(command, table)
    assert (ran.code, ran.out) == (2, f"copied 2 bills to {table}\n")
    assert ran.errors.startswith(f"safelight: {lost}")
    assert copied(archive(command, table)) == 0, "it is told once by a run"
    ran = command("--table", table, "--json", "--by", "tenant")
    assert (ran.code, json.loads(ran.out)["pictures"]) == (2, 6)
    assert ran.errors.startswith(f"safelight: {lost}")
    for outside in (("--until", "2026-01-04"), ("--since", "2026-01-12T00:00:01"), ("--deployment", "studio-2")):
        assert command("--table", table, *outside).code == 0


def test_a_redis_that_lost_its_data_is_told_and_its_new_bills_are_copied(command, stream, table):
    for number in range(3):
        stream.add(AT_MS + number, "studio")
    copied(archive(command, table))
    stream.client.flushall()
    ran = archive(command, table)
    assert (ran.code, ran.out) == (2, f"copied 0 bills to {table}\n")
    assert "may be missing" in ran.errors
    assert copied(archive(command, table)) == 0
    stream.add(AT_MS + 1, "lab")  # before the last one that was copied: its clock was set back
    assert copied(archive(command, table)) == 1
    assert [one["tenant"] for one in map(json.loads, command("--table", table, "--json").out.splitlines())] == [
        "lab",
        "studio",
    ]


def test_a_redis_whose_clock_is_behind_the_checkpoint_is_copied_too(command, stream, table):
    stream.add(4 * AT_MS, "studio")
    copied(archive(command, table))
    stream.client.flushall()
    stream.add(AT_MS, "lab")
    ran = archive(command, table)
    assert (ran.code, ran.out) == (2, f"copied 1 bills to {table}\n")
    assert copied(archive(command, table)) == 0


async def test_bills_that_redis_drops_during_a_run_are_told(stream, table, dynamodb, archived, monkeypatch):
    monkeypatch.setattr(bill_archive, "PAGE", 2)
    for number in range(8):
        stream.add(AT_MS + number, "studio")

    def trim(operation: str, body: dict[str, Any], forward: Forward) -> Answer:
        if operation == "PutItem":  # the checkpoint after the first page
            stream.client.xtrim(BILLS, maxlen=3, approximate=False)
        return forward(body)

    dynamodb.hook = trim
    report = await archived()
    assert report.copied == 5
    assert [(gap.begin_ms, gap.end_ms) for gap in report.gaps] == [(AT_MS + 1, AT_MS + 5)]


def test_bills_that_cannot_be_decrypted_are_copied_and_counted(command, stream, table, tmp_path, dynamodb):
    """They are in the sums of whoever has the key, and counted once if they are copied again with it."""
    others = tmp_path / "others.keys"
    others.write_text(new_key_file().replace("k1 ", "k2 "))
    stream.add(AT_MS, "lab", keys=others)
    stream.client.xadd(BILLS, {"x": b"no server wrote this"}, id=f"{AT_MS + 1}-0")
    stream.add(AT_MS + 2, "studio")
    ran = archive(command, table)
    assert (ran.code, ran.out) == (2, f"copied 3 bills to {table}\n")
    assert ran.errors.startswith("safelight: 2 bills were copied encrypted: ")
    assert ran.errors.endswith("(1 of key k2, 1 of key none)\n")
    assert b"lab" not in json.dumps(list(map(str, dynamodb.items(table).values()))).encode()

    ran, redis = command("--table", table, "--json"), command("--json")
    assert ran == redis, "the same sums, and the same number is missing"
    assert ran.errors.startswith("safelight: 2 bills are missing above: ")
    both = tmp_path / "both.keys"
    both.write_text(key_file(tmp_path).read_text() + others.read_text().replace("names ", "#", 1))
    for again in (False, True):
        if again:
            with dynamodb.client() as client:
                client.delete_item(TableName=table, Key={"pk": {"S": "checkpoint"}, "sk": {"S": "studio-1"}})
            assert archive(command, table, "studio-1", "--cache-key-file", str(both)).code == 2
            assert len(dynamodb.items(table)) == 4
        ran = command("--table", table, "--json", "--by", "tenant", "--cache-key-file", str(both))
        found = {one["tenant"]: one["pictures"] for one in map(json.loads, ran.out.splitlines())}
        assert (ran.code, found) == (2, {"lab": 1, "studio": 1})
        assert ran.errors.startswith("safelight: 1 bills are missing above: ")


def test_months_begin_at_midnight_utc_and_one_month_of_a_tenant_is_one_partition(command, stream, table, dynamodb):
    for at_ms in (FEBRUARY_MS - 1, FEBRUARY_MS, FEBRUARY_MS + 28 * DAY_MS - 1, FEBRUARY_MS + 28 * DAY_MS):
        for tenant in ("lab", "studio"):
            stream.add(at_ms, tenant)
    copied(archive(command, table))
    february = ("--table", table, "--json", "--by", "tenant", "--since", "2026-02-01", "--until", "2026-03-01")

    def asked(*arguments: str) -> list[object]:
        """The partitions that were read for it."""
        dynamodb.calls.clear()
        assert [one["pictures"] for one in command(*february, *arguments).rows()] == [2] * (1 if arguments else 2)
        assert {operation for operation, _ in dynamodb.calls} == {"Query"}
        return [body["ExpressionAttributeValues"][":partition"]["S"] for _, body in dynamodb.calls]

    lab, studio = (f"bills#studio-1#{tenant}#2026-02" for tenant in ("lab", "studio"))
    assert asked() == ["directory", lab, studio, "gaps"]
    assert asked("--tenant", "studio") == ["directory", studio, "gaps"]


def test_more_bills_than_an_answer_holds_are_all_read(command, stream, table, dynamodb):
    for number in range(7):
        stream.add(AT_MS + number, "studio")
    copied(archive(command, table))
    dynamodb.hook = lambda operation, body, forward: forward(body | ({"Limit": 2} if operation == "Query" else {}))
    assert [one["pictures"] for one in command("--table", table, "--json").rows()] == [7]


def test_a_table_is_named_by_its_arn_too(command, stream, table):
    """As that of another account is."""
    arn = f"arn:aws:dynamodb:us-east-1:123456789012:table/{table}"
    stream.add(AT_MS, "studio")
    assert copied(archive(command, arn)) == 1
    assert copied(archive(command, table)) == 0
    assert command("--table", arn, "--json") == command("--table", table, "--json") == command("--json")


def test_deployments_share_a_table(command, stream, table):
    stream.add(AT_MS, "studio")
    copied(archive(command, table, "east"))
    stream.add(AT_MS + 1, "studio")
    assert copied(archive(command, table, "west")) == 2
    for arguments, pictures in ((("--deployment", "east"), 1), (("--deployment", "west"), 2), ((), 3)):
        assert [one["pictures"] for one in command("--table", table, "--json", *arguments).rows()] == [pictures]
    assert command("--table", table, "--json", "--deployment", "eas").rows() == []


def test_a_bill_that_redis_took_twice_counts_once(command, stream, table, dynamodb):
    """A failover lost the first one after it was copied, and the commit was repeated with the same bytes."""
    stream.add(AT_MS, "studio")
    copied(archive(command, table))
    [(_, fields)] = stream.client.xrange(BILLS)
    stream.client.delete(BILLS)
    stream.client.xadd(BILLS, fields, id=f"{AT_MS + 800}-0")
    stream.add(AT_MS + 900, "studio")
    assert archive(command, table).code == 2
    assert len(dynamodb.items(table)) == 3
    ran = command("--table", table, "--json")
    assert json.loads(ran.out)["pictures"] == 2


def test_expired_bills_are_left_out_as_they_are_in_redis(command, stream, table):
    stream.add(AT_MS, "studio", until_s=1.0)
    stream.add(AT_MS + 1, "studio")
    assert copied(archive(command, table)) == 1
    assert command("--table", table, "--json") == command("--json")


def test_what_is_wrong_is_said(command, stream, table, dynamodb, monkeypatch):
    stream.add(AT_MS, "studio")
    archiving = ("archive", "--table", table, "--deployment")
    for arguments, said in (
        (("--deployment", "east"), "--deployment: needs --table"),
        (("--table", "absent"), "--table absent: no such table in this account and region"),
        (
            ("archive", "--table", "absent", "--deployment", "a"),
            "--table / SAFELIGHT_BILLS_TABLE absent: no such table",
        ),
        ((*archiving, "a b"), "--deployment / SAFELIGHT_DEPLOYMENT: must be 1 to 64 letters"),
        (("--tenant", "lab", *archiving, "a"), "--tenant: must follow `archive`"),
        (
            (*archiving, "a", "--redis-url", "redis://127.0.0.1:1/0"),
            "--redis-url / SAFELIGHT_REDIS_URL: redis: Error 111",
        ),
        ((*archiving, "a", "--cache-key-file", "absent"), "--cache-key-file / SAFELIGHT_CACHE_KEY_FILE: "),
    ):
        ran = command(*arguments)
        assert (ran.code, ran.out, ran.errors.count("\n")) == (2, "", 1), ran
        assert ran.errors.startswith(f"safelight: {said}"), ran.errors
    dynamodb.hook = lambda *_: DENIED
    assert "AccessDeniedException" in command("--table", table).errors
    dynamodb.hook = forwarded
    with dynamodb.client() as client:
        of_others = {"pk": {"S": "gaps"}, "sk": {"S": "east#1-0"}, "begin_ms": {"N": "1"}}
        client.put_item(TableName=table, Item=of_others)
    assert "pk 'gaps', sk 'east#1-0': `safelight bills archive` has not" in command("--table", table).errors
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    assert command("--table", table).errors == f"safelight: --table {table}: You must specify a region.\n"
    monkeypatch.setitem(sys.modules, "boto3", None)
    needs = "boto3 not installed: in a clone of Safelight, pip install -e clients/python -e '.[aws]'"
    assert command("--table", table).errors == f"safelight: --table {table}: {needs}\n"
    monkeypatch.delenv("SAFELIGHT_REDIS_URL")
    assert "--redis-url / SAFELIGHT_REDIS_URL: is needed" in command().errors
