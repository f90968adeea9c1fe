"""A leader in a process of its own: `python -m tests.support.leader URL NAME TTL_S`.

Says "leading", publishes for ever, and when it gets a line commits and says what came of it.
"""

from __future__ import annotations

import asyncio
import sys

from safelight_server.coordination.leadership import Leadership
from safelight_server.coordination.redis import RedisCoordinator
from safelight_server.storage.breaker import Breaker
from safelight_server.storage.redis import RedisConnection


async def main(url: str, name: str, ttl_s: float) -> None:
    """Leads."""
    connection = RedisConnection(url, 5.0)
    coordinator = RedisCoordinator(connection, Breaker("redis", 5.0))
    leader = await Leadership.take(coordinator, name, ttl_s)
    assert leader is not None
    print("leading", flush=True)
    line = asyncio.create_task(asyncio.to_thread(sys.stdin.readline))
    while not line.done():
        await leader.publish(b"theirs")
        await asyncio.sleep(0.02)
    outcome = await leader.commit("theirs", b"theirs", 10.0)
    print(outcome.value if outcome else "discarded", flush=True)
    await leader.close()
    await coordinator.close()
    await connection.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], float(sys.argv[3])))
