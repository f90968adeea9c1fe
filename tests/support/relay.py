"""A TCP relay in front of a server, for tests of a network that is slow or breaks."""

from __future__ import annotations

import asyncio

CHUNK_BYTES = 1 << 16


class Relay:
    """Passes bytes both ways until `cut`, with backpressure: it reads no faster from one side than the other takes.

    Attributes:
        delay_s: how long each piece is held back; tests change it at any time.
        num_passed: pieces that came from clients.
        num_under_way: pieces, of both directions, that are held back now.
    """

    def __init__(self) -> None:
        self.address = ""
        self.delay_s = 0.0
        self.num_passed = 0
        self.num_under_way = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @classmethod
    async def start(cls, target: str) -> Relay:
        """Starts a relay to `target` (HOST:PORT) on a free loopback port."""
        relay = cls()
        host, port = target.rsplit(":", 1)

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, back = await asyncio.open_connection(host, int(port), limit=CHUNK_BYTES)
            relay._writers |= {writer, back}
            for source, sink in ((reader, back), (there, writer)):
                task = asyncio.create_task(relay._pass_on(source, sink, from_client=source is reader))
                relay._tasks.add(task)
                task.add_done_callback(relay._tasks.discard)

        relay._server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=CHUNK_BYTES)
        relay.address = f"127.0.0.1:{relay._server.sockets[0].getsockname()[1]}"
        return relay

    def cut(self) -> None:
        """Resets all connections and accepts no more."""
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, from_client: bool) -> None:
        try:
            while data := await source.read(CHUNK_BYTES):
                self.num_passed += from_client
                if self.delay_s:
                    self.num_under_way += 1
                    await asyncio.sleep(self.delay_s)
                    self.num_under_way -= 1
                sink.write(data)
                await sink.drain()
            sink.write_eof()
        except OSError:
            sink.transport.abort()
