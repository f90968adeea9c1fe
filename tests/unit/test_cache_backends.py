"""The cache backends that the settings configure."""

import asyncio
from pathlib import Path

import pytest
from safelight_server.app.backends import CredentialsError, open_backends
from safelight_server.coordination.redis import RedisCoordinator
from safelight_server.settings import SettingsError, load
from safelight_server.storage.disk import DiskStoreError
from safelight_server.storage.keyring import KeyringError, new_key_file
from safelight_server.storage.objects import BucketUrl, ObjectStore, open_bucket
from safelight_server.storage.sealed import Entry

from tests.support.stores import TTL_S, Numbers, key


async def test_without_keys_there_is_memory_only() -> None:
    backends = await open_backends(load(), Numbers().metrics)
    assert [tier.name for tier in backends.tiers.tiers] == ["memory"]
    assert backends.coordinator is None
    await backends.close()


@pytest.mark.parametrize(
    "given", [{"redis_url": "redis://127.0.0.1"}, {"cache_disk_dir": "x"}, {"cache_s3_url": "s3://b"}]
)
def test_what_lasts_needs_keys(given: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match="needs cache_key_file"):
        load(**given)


async def test_all_of_it_though_nothing_answers(tmp_path: Path) -> None:
    keys, credentials = tmp_path / "keys", tmp_path / "credentials"
    keys.write_text(new_key_file())
    credentials.write_text("id secret\n")
    settings = load(
        cache_key_file=keys,
        redis_url="redis://:hush@127.0.0.1:1/0",
        redis_timeout_ms=50,
        cache_disk_dir=tmp_path / "cache",
        cache_s3_url=f"s3://bucket/prefix?endpoint_url=http://127.0.0.1:1&credentials_file={credentials}",
    )
    assert "hush" not in repr(settings)
    backends = await open_backends(settings, Numbers().metrics)
    assert [tier.name for tier in backends.tiers.tiers] == ["memory", "disk", "redis", "objects"]
    assert isinstance(backends.coordinator, RedisCoordinator)
    await backends.tiers.put(key(1), Entry(b"x"), TTL_S)
    assert await backends.tiers.get(key(2)) is None
    await backends.close()
    again = await open_backends(settings, Numbers().metrics)
    found = await again.tiers.get(key(1))
    assert found is not None and (found.entry.data, found.tier) == (b"x", "disk")
    await again.close()


async def test_a_bucket_on_this_machine_is_asked_without_the_proxy_of_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\nlast-modified: Sun, 29 Nov 2026 09:00:00 GMT\r\n\r\nx")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        for host in ("127.0.0.1", "localhost"):
            bucket = ObjectStore(open_bucket(BucketUrl("b", "", f"http://{host}:{port}"), ("id", "secret")))
            assert await bucket.get("key") == b"x"


async def test_files_that_cannot_be_used_are_errors_at_start(tmp_path: Path) -> None:
    keys, other = tmp_path / "keys", tmp_path / "other"
    keys.write_text(new_key_file())
    other.write_text("one two three")
    with pytest.raises(KeyringError):
        await open_backends(load(cache_key_file=other), Numbers().metrics)
    with pytest.raises(DiskStoreError):
        await open_backends(load(cache_key_file=keys, cache_disk_dir=other), Numbers().metrics)
    with pytest.raises(CredentialsError):
        url = f"s3://bucket?credentials_file={other}"
        await open_backends(load(cache_key_file=keys, cache_s3_url=url), Numbers().metrics)
    with pytest.raises(ValueError, match="cache_s3_url: must be s3://"):
        await open_backends(load(cache_key_file=keys, cache_s3_url="bucket"), Numbers().metrics)


def test_the_url_of_a_bucket_says_how_to_reach_it() -> None:
    assert BucketUrl.parse("s3://bucket") == BucketUrl("bucket", "", "", "us-east-1", None, 2000)
    options = "endpoint_url=https://s3.local:9000&region=eu-1&credentials_file=/run/a%26b&timeout_ms=500"
    assert BucketUrl.parse(f"s3://bucket/a/b/?{options}") == BucketUrl(
        "bucket", "a/b", "https://s3.local:9000", "eu-1", Path("/run/a&b"), 500
    )


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("http://bucket", "must be s3://"),
        ("s3:///prefix", "must be s3://"),
        ("s3://id:secret@bucket", "must be s3://"),
        ("s3://bucket#x", "must be s3://"),
        ("s3://bucket?endpoint=http://x", "unknown: endpoint; there are endpoint_url"),
        ("s3://bucket?region=", "region is empty"),
        ("s3://bucket?region=a&region=b", "twice"),
        ("s3://bucket?endpoint_url=127.0.0.1:9000", "endpoint_url must be http"),
        ("s3://bucket?endpoint_url=http://", "endpoint_url must be http"),
        ("s3://bucket?timeout_ms=0", "timeout_ms must be from 1"),
        ("s3://bucket?timeout_ms=2s", "timeout_ms must be from 1"),
    ],
)
def test_a_url_of_a_bucket_that_could_not_work_is_refused(url: str, what: str) -> None:
    with pytest.raises(ValueError, match=what) as caught:
        BucketUrl.parse(url)
    assert "secret" not in str(caught.value)
