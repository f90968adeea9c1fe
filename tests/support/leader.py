"""A process that leads an execution, for tests to freeze or kill: `python -m tests.support.leader URL NAME TTL_S`.

Takes the lease, prints "leading", and publishes events until it reads a line on
stdin. Then it commits and prints the outcome ("discarded" if there is none).
"""

from __future__ import annotations

import asyncio
import sys

from safelight_server.coordination.leadership import Leadership
from safelight_server.coordination.redis import RedisCoordinator
from safelight_server.storage.breaker import Breaker
from safelight_server.storage.redis import RedisConnection


async def main(url: str, name: str, ttl_s: float) -> None:
    """Takes the lease of `name`, publishes until stdin has a line, then commits."""
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
