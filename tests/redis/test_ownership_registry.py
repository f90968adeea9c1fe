"""The registry of generations that need an owner: its entries, and which replica may remove them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from safelight_server.coordination.leadership import Leadership
from safelight_server.generations.ownership import rules
from safelight_server.storage.keyring import Keyring
from safelight_server.storage.sealed import Entry, Sealer

from tests.redis.test_ownership import servers
from tests.support.redis_server import RedisServer

NAME = "ab" * 32


@pytest.mark.parametrize("written", ["with a key that is not known here", "by a newer server"])
async def test_what_cannot_be_read_here_stays_for_others(
    redis_server: RedisServer, tmp_path: Path, written: str
) -> None:
    async with servers(redis_server.url, tmp_path, count=1) as (one,):
        ownership = one.running.generations.ownership
        sealer = ownership.owners._context.sealer if written == "by a newer server" else Sealer(Keyring.random())
        record = sealer.seal(NAME, Entry(b'{"form": 2}', {"kind": "record"}), time.time() + 60.0)
        await one.coordinator.append(NAME, record)
        await one.coordinator.register(NAME)
        await ownership.mirrors._rescue(NAME)
        assert await one.coordinator.unowned() == [NAME]


async def test_who_was_silent_while_it_was_struck_off_promises_nothing(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with servers(redis_server.url, tmp_path, count=1, lease_ttl_s=60.0) as (one,):
        leader = await Leadership.take(one.coordinator, NAME, 60.0)
        assert leader is not None
        await one.coordinator.register(NAME)
        assert await one.coordinator.release(leader.lease)  # as if the owner had been silent for too long
        mirrors = one.running.generations.ownership.mirrors
        await mirrors._rescue(NAME)
        assert await one.coordinator.unowned() == [NAME], "its owner may be away"
        mirrors._unowned_since[NAME] -= rules.ABSENT_LEASES * 60.0
        await mirrors._rescue(NAME)
        assert await one.coordinator.unowned() == []
        assert not await leader.publish(b"its record"), "else nobody would ever take it over"
        await leader.close()


async def test_a_drained_replica_takes_over_nothing(redis_server: RedisServer, tmp_path: Path) -> None:
    async with servers(redis_server.url, tmp_path, count=1) as (one,):
        await one.running.drain(0.0)
        await one.running.generations.ownership.mirrors.sweep()  # ends the mirror
