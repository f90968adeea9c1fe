"""The relay of the tests: what it was about to pass on when it was cut is ended too."""

from __future__ import annotations

import asyncio
import socket

from tests.support.relay import Relay


async def test_a_connection_that_comes_as_it_is_cut_is_ended() -> None:
    with socket.create_server(("127.0.0.1", 0)) as target:  # the kernel connects; nobody accepts
        relay = await Relay.start(f"127.0.0.1:{target.getsockname()[1]}")
        host, port = relay.address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        while not relay.num_connections:  # noqa: ASYNC110  # each turn counts: it is cut while it connects to the target
            await asyncio.sleep(0)
        relay.cut()
        try:
            assert await asyncio.wait_for(reader.read(), 10) == b""
        finally:
            writer.close()
