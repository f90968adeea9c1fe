"""Object storage by the S3 protocol, shared by the replicas: the coldest and largest tier.

A key is an object's name below the prefix of the URL. What the bucket holds is
bounded by its owner: give it a lifecycle rule that deletes objects older than
`cache_ttl_s`. Expired objects are never served in any case.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from safelight_server.storage.base import HEADER_BYTES, StoreUnavailableError, StoreUsage, check_key


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Turns what obstore raises into errors of stores; what a missing object means its caller says before."""
    try:
        yield
    except (BaseError, OSError) as error:
        raise StoreUnavailableError(f"objects: {str(error).splitlines()[0]}") from error


class ObjectStore:
    """Args: store: where; tests give one of another kind."""

    name = "objects"

    def __init__(self, store: S3Store) -> None:
        self._store = store

    async def get(self, key: str) -> bytes | None:
        """The value."""
        with translated():
            try:
                result = await obstore.get_async(self._store, key)
                return bytes(await result.bytes_async())
            except FileNotFoundError:
                return None

    async def head(self, key: str) -> bytes | None:
        """The beginning of the value."""
        with translated():
            try:
                return bytes(await obstore.get_range_async(self._store, key, start=0, length=HEADER_BYTES))
            except FileNotFoundError:
                return None

    async def put(self, key: str, value: bytes, ttl_s: float) -> None:
        """Keeps the value; the bucket's lifecycle rule forgets it."""
        with translated():
            await obstore.put_async(self._store, check_key(key), value, use_multipart=False)

    async def delete(self, key: str) -> None:
        """Forgets a key."""
        with translated(), contextlib.suppress(FileNotFoundError):
            await obstore.delete_async(self._store, key)

    async def keys(self, prefix: str = "") -> AsyncIterator[str]:
        """All keys with this beginning, a thousand a call."""
        with translated():
            async for batch in obstore.list(self._store, prefix=_folder(prefix)):
                for item in batch:
                    if item["path"].startswith(prefix):
                        yield item["path"]

    async def usage(self) -> StoreUsage:
        """What the bucket holds below the prefix, by listing it."""
        entries = num_bytes = 0
        with translated():
            async for batch in obstore.list(self._store):
                entries += len(batch)
                num_bytes += sum(item["size"] for item in batch)
        return StoreUsage(entries, num_bytes)

    async def close(self) -> None:
        """Nothing to let go of."""


def open_bucket(
    url: str, endpoint: str = "", region: str = "", credentials: tuple[str, str] | None = None, timeout_s: float = 2.0
) -> S3Store:
    """A bucket.

    Args:
        url: s3://BUCKET/PREFIX.
        endpoint: of another server than AWS's; plain http:// is taken as it is given.
        credentials: access key id and secret; None: what the platform grants (role, instance, environment).
        timeout_s: for a request; there are no retries.

    Raises:
        ValueError: the URL is not one.
    """
    parts = urlsplit(url)
    if parts.scheme != "s3" or not parts.netloc:
        raise ValueError(f"want s3://BUCKET/PREFIX, not {url!r}")
    config: dict[str, object] = {"region": region or "us-east-1"}
    if endpoint:
        config |= {"endpoint": endpoint, "virtual_hosted_style_request": False}
    if credentials is not None:
        config |= {"access_key_id": credentials[0], "secret_access_key": credentials[1]}
    return S3Store(
        parts.netloc,
        prefix=parts.path.strip("/") or None,
        config=config,  # type: ignore[arg-type]  # a TypedDict by its keys
        client_options={
            "timeout": timedelta(seconds=timeout_s),
            "connect_timeout": timedelta(seconds=timeout_s),
            "allow_http": endpoint.startswith("http://"),
        },
        retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=timeout_s)},
    )


def _folder(prefix: str) -> str | None:
    return prefix.rpartition("/")[0] or None
