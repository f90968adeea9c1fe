"""Opens the storage behind the caches by the settings: key file, cache tiers, Redis coordination.

Redis and S3 need not be reachable at start: calls of them fail until they are. A key
file or a cache folder that cannot be used is an error at start.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from safelight_server.coordination.base import Coordinator
from safelight_server.coordination.redis import RedisCoordinator
from safelight_server.files import read_regular_file
from safelight_server.settings import Settings
from safelight_server.storage.breaker import Breaker
from safelight_server.storage.clock import SharedClock
from safelight_server.storage.disk import DiskStore
from safelight_server.storage.keyring import Keyring
from safelight_server.storage.memory import MemoryStore
from safelight_server.storage.objects import BucketUrl, ObjectStore, open_bucket
from safelight_server.storage.redis import RedisConnection, RedisStore
from safelight_server.storage.sealed import Sealer
from safelight_server.storage.tiers import Tier, Tiers
from safelight_server.telemetry.metrics import TierMetrics

log = structlog.get_logger(__name__)

FLUSH_S = 10.0
"""How long shutdown waits for cache entries that are not written yet."""
DISK_TIMEOUT_MS = 1000
"""A read or write on the disk that takes longer counts as failed; a disk that is often slower is no cache."""
MEMORY_S = 86_400.0
"""Shortest time for which Redis keeps records of executions and purges; `cache_ttl_s` where that is longer."""


class CredentialsError(Exception):
    """The S3 credentials file cannot be read, or does not have the two words of its format."""


@dataclass(frozen=True, slots=True)
class Backends:
    """The open storage and coordination of one server. The caller of `open_backends` must `close` it.

    Attributes:
        keyring: the keys that seal and name cache entries; random, and lost with the process, without a key file.
        sealer: encrypts cache entries, and the events that replicas exchange through Redis.
        tiers: the stores of cache entries, fastest first: memory, then disk, Redis and S3 as configured.
        coordinator: leases and shared events of the replicas on one Redis; None without Redis.
        redis: the shared connection and its circuit breaker; None without Redis.
    """

    keyring: Keyring
    sealer: Sealer
    tiers: Tiers
    coordinator: Coordinator | None
    redis: tuple[RedisConnection, Breaker] | None

    async def close(self) -> None:
        """Writes pending cache entries, for at most `FLUSH_S` seconds, and closes every store."""
        if self.coordinator is not None:
            await self.coordinator.close()
        try:
            async with asyncio.timeout(FLUSH_S):
                await self.tiers.flush()
        except TimeoutError:
            log.warning("entries of the cache were not written before the end")
        await self.tiers.close()
        if self.redis is not None:
            await self.redis[0].close()


async def open_backends(settings: Settings, metrics: TierMetrics, wall: Callable[[], float] = time.time) -> Backends:
    """Opens the key ring, the cache tiers and the coordinator that the settings name.

    Args:
        wall: this machine's clock, in Unix seconds.

    Raises:
        KeyringError: the key file cannot be used.
        DiskStoreError: the cache folder cannot be used.
        CredentialsError: the S3 credentials file cannot be used.
        ValueError: a URL is malformed.
    """
    keyring = Keyring.random() if settings.cache_key_file is None else Keyring.load(settings.cache_key_file)
    if not keyring.persistent:
        log.info("no cache_key_file: caches are in memory only and end with the process")

    def breaker(name: str, timeout_ms: int) -> Breaker:
        return Breaker(
            name,
            timeout_ms / 1000,
            open_s=settings.breaker_open_s,
            on_state=lambda state: metrics.breaker(name, int(state)),
            on_failure=lambda: metrics.service_failed(name),
        )

    clock = SharedClock(wall, on_offset=metrics.clock_offset)
    tiers = [Tier(MemoryStore(settings.cache_memory_bytes))]
    redis: tuple[RedisConnection, Breaker] | None = None
    coordinator: Coordinator | None = None
    if settings.cache_disk_dir is not None:
        disk = await DiskStore.open(settings.cache_disk_dir, settings.cache_disk_bytes)
        tiers.append(Tier(disk, breaker("disk", DISK_TIMEOUT_MS)))
    if settings.redis_url is not None:
        connection = RedisConnection(settings.redis_url.get_secret_value(), settings.redis_timeout_ms / 1000, clock)
        around = breaker("redis", settings.redis_timeout_ms)
        redis = connection, around
        coordinator = RedisCoordinator(connection, around, memory_s=max(MEMORY_S, settings.cache_ttl_s))
        if settings.cache_redis:
            tiers.append(Tier(RedisStore(connection), around, shared=True))
    if settings.cache_s3_url:
        try:
            bucket = BucketUrl.parse(settings.cache_s3_url)
        except ValueError as error:
            raise ValueError(f"cache_s3_url: {error}") from None
        store = ObjectStore(open_bucket(bucket, _credentials(bucket.credentials_file)))
        tiers.append(Tier(store, breaker("objects", bucket.timeout_ms), eager=False, shared=True))
    sealer = Sealer(keyring, clock.now)
    return Backends(keyring, sealer, Tiers(tiers, sealer, metrics), coordinator, redis)


def _credentials(path: Path | None) -> tuple[str, str] | None:
    """Reads the S3 access key id and secret; None without a file: the S3 client then finds its own."""
    if path is None:
        return None
    try:
        words = read_regular_file(path).decode().split()
    except (OSError, UnicodeDecodeError) as error:
        raise CredentialsError(f"{path}: {error}") from None
    if len(words) != 2:
        raise CredentialsError(f"{path}: must have one line, ACCESS_KEY_ID SECRET")
    return words[0], words[1]
