"""The object storage tier (S3 protocol), shared by the replicas: the slowest and largest tier.

An object's name is the key below the URL's prefix. The server does not bound the bucket: give the bucket a lifecycle
rule that deletes objects older than `cache_ttl_s`. Expired objects are never served.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store
from safelight.proxies import is_local

from safelight_server.storage.base import HEADER_BYTES, StoreUnavailableError, StoreUsage, check_key

if TYPE_CHECKING:
    from obstore.store import ClientConfig  # does not exist at run time


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Converts obstore's errors to `StoreError`. Callers catch `FileNotFoundError` inside it."""
    try:
        yield
    except (BaseError, OSError) as error:
        raise StoreUnavailableError(f"objects: {str(error).splitlines()[0]}") from error


class ObjectStore:
    """A `Store` in a bucket.

    Args:
        store: the bucket; tests pass another kind of obstore store.
    """

    name = "objects"

    def __init__(self, store: S3Store) -> None:
        self._store = store

    async def get(self, key: str) -> bytes | None:
        """Returns the value, or None."""
        with translated():
            try:
                result = await obstore.get_async(self._store, key)
                return bytes(await result.bytes_async())
            except FileNotFoundError:
                return None

    async def head(self, key: str) -> bytes | None:
        """Returns the first `HEADER_BYTES` of the value, or None."""
        with translated():
            try:
                return bytes(await obstore.get_range_async(self._store, key, start=0, length=HEADER_BYTES))
            except FileNotFoundError:
                return None

    async def put(self, key: str, value: bytes, ttl_s: float) -> None:
        """Stores the value. The bucket's lifecycle rule deletes it."""
        with translated():
            await obstore.put_async(self._store, check_key(key), value, use_multipart=False)

    async def delete(self, key: str) -> None:
        """Deletes a key."""
        with translated(), contextlib.suppress(FileNotFoundError):
            await obstore.delete_async(self._store, key)

    async def keys(self, prefix: str = "") -> AsyncIterator[str]:
        """Lists the keys that begin with `prefix`, a thousand per request."""
        with translated():
            async for batch in obstore.list(self._store, prefix=_folder(prefix)):
                for item in batch:
                    if item["path"].startswith(prefix):
                        yield item["path"]

    async def usage(self) -> StoreUsage:
        """Counts the objects below the prefix by listing them all."""
        entries = num_bytes = 0
        with translated():
            async for batch in obstore.list(self._store):
                entries += len(batch)
                num_bytes += sum(item["size"] for item in batch)
        return StoreUsage(entries, num_bytes)

    async def close(self) -> None:
        """Does nothing: there is nothing to close."""


@dataclass(frozen=True, slots=True)
class BucketUrl:
    """A bucket and how to reach it: s3://BUCKET/PREFIX?endpoint_url=http://HOST:PORT&region=REGION and so on.

    Attributes:
        endpoint_url: URL of an S3 server other than AWS's; http:// is allowed. Empty: AWS.
        credentials_file: file with one line, ACCESS_KEY_ID SECRET. None: credentials of the environment, role or
            instance.
        timeout_ms: timeout of a call; there are no retries.
    """

    bucket: str
    prefix: str = ""
    endpoint_url: str = ""
    region: str = "us-east-1"
    credentials_file: Path | None = None
    timeout_ms: int = 2000

    @classmethod
    def parse(cls, url: str) -> BucketUrl:
        """Reads a URL.

        Raises:
            ValueError: it is no such URL; the message says what is wrong.
        """
        parts = urlsplit(url)
        if parts.scheme != "s3" or not parts.hostname or "@" in parts.netloc or parts.fragment:
            raise ValueError(
                "must be s3://BUCKET/PREFIX?endpoint_url=...&region=..."
            )  # not the URL: it may have a password
        pairs = parse_qsl(parts.query, keep_blank_values=True)
        given = dict(pairs)
        if len(given) < len(pairs):
            raise ValueError("an option is given twice")
        if unknown := given.keys() - {"endpoint_url", "region", "credentials_file", "timeout_ms"}:
            raise ValueError(
                f"unknown: {', '.join(sorted(unknown))}; there are endpoint_url, region, credentials_file, timeout_ms"
            )
        if empty := [name for name, value in given.items() if not value]:
            raise ValueError(f"{empty[0]} is empty")
        endpoint = given.get("endpoint_url", "")
        if endpoint and not (endpoint.startswith(("http://", "https://")) and urlsplit(endpoint).hostname):
            raise ValueError("endpoint_url must be http://HOST:PORT or https://HOST:PORT")
        timeout = given.get("timeout_ms", "2000")
        if not timeout.isdecimal() or not 1 <= int(timeout) <= 60_000:
            raise ValueError("timeout_ms must be from 1 to 60000")
        file = given.get("credentials_file")
        return cls(
            parts.netloc,
            parts.path.strip("/"),
            endpoint,
            given.get("region", "us-east-1"),
            None if file is None else Path(file),
            int(timeout),
        )


def open_bucket(url: BucketUrl, credentials: tuple[str, str] | None = None) -> S3Store:
    """Opens an S3 bucket.

    Args:
        credentials: access key id and secret; None: those of the environment, role or instance.
    """
    config: dict[str, object] = {"region": url.region}
    if url.endpoint_url:
        config |= {"endpoint": url.endpoint_url, "virtual_hosted_style_request": False}
    if credentials is not None:
        config |= {"access_key_id": credentials[0], "secret_access_key": credentials[1]}
    timeout = timedelta(milliseconds=url.timeout_ms)
    return S3Store(
        url.bucket,
        prefix=url.prefix or None,
        config=config,  # type: ignore[arg-type]  # a TypedDict by its keys
        client_options={
            "timeout": timeout,
            "connect_timeout": timeout,
            "allow_http": url.endpoint_url.startswith("http://"),
            **_without_proxy(url.endpoint_url),
        },
        retry_config={"max_retries": 0, "retry_timeout": timeout},
    )


def _without_proxy(endpoint: str) -> ClientConfig:
    """Options that keep obstore from calling a server on this machine through the proxy of the environment."""
    parts = urlsplit(endpoint)
    if not endpoint or not is_local(parts.netloc):
        return {}
    # obstore has no option for "no proxy": this names a proxy that the host itself is excluded from
    return {"proxy_url": endpoint, "proxy_excludes": parts.hostname or ""}


def _folder(prefix: str) -> str | None:
    return prefix.rpartition("/")[0] or None
