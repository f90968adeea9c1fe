"""A TCP relay in front of a server, for tests of a network that is slow or breaks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from tests.support import http2

CHUNK_BYTES = 1 << 16


class Relay:
    """Passes bytes both ways until `cut`, with backpressure: it reads from one side only as fast as the other accepts.

    Attributes:
        delay_s: how long each piece is delayed; tests may change it at any time.
        num_passed: number of pieces that came from clients.
        num_under_way: number of pieces, of both directions, that are delayed now.
        num_connections: number of connections that clients have made so far.
        num_bytes: number of bytes passed to clients so far, over all connections.
    """

    def __init__(self) -> None:
        self.address = ""
        self.delay_s = 0.0
        self.num_passed = 0
        self.num_under_way = 0
        self.num_connections = 0
        self.num_bytes = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._is_cut = False
        self._event: tuple[int, Callable[[], Awaitable[None]]] | None = None
        self._cancels: list[tuple[int, Callable[[int], bytes]]] = []

    @classmethod
    async def start(cls, *targets: str) -> Relay:
        """Starts a relay on a free loopback port. The first connection goes to the first target (HOST:PORT), and so on.

        Connections beyond the number of targets go to the last one.
        """
        relay = cls()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            host, port = targets[min(relay.num_connections, len(targets) - 1)].rsplit(":", 1)
            relay.num_connections += 1
            try:
                there, back = await asyncio.open_connection(host, int(port), limit=CHUNK_BYTES)
            except OSError:
                writer.transport.abort()
                return
            if relay._is_cut:  # meanwhile
                writer.transport.abort()
                back.transport.abort()
                return
            relay._writers |= {writer, back}
            for source, sink in ((reader, back), (there, writer)):
                task = asyncio.create_task(relay._pass_on(source, sink, from_client=source is reader))
                relay._tasks.add(task)
                task.add_done_callback(relay._tasks.discard)

        relay._server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=CHUNK_BYTES)
        relay.address = f"127.0.0.1:{relay._server.sockets[0].getsockname()[1]}"
        return relay

    def cancel_after(self, num_bytes: int) -> None:
        """After `num_bytes` to clients, ends the call and the connection as a server does that abandons it.

        The first call is reset with CANCEL between its messages; after as many bytes again, the next call ends with the
        status CANCELLED and no details. Works with gRPC clients in plain text.
        """
        self._cancels = [(num_bytes, http2.reset), (2 * num_bytes, http2.cancelled)]

    def after(self, num_bytes: int, happen: Callable[[], Awaitable[None]]) -> None:
        """After exactly `num_bytes` to clients, awaits `happen` before it passes more."""
        self._event = (num_bytes, happen)

    def cut(self) -> None:
        """Resets all connections and accepts no more."""
        assert self._server is not None
        self._server.close()
        self._is_cut = True
        self.reset()

    def reset(self) -> None:
        """Resets all connections; new ones are accepted."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def end(self) -> None:
        """Closes all connections normally, even within a message; new ones are accepted."""
        for writer in self._writers:
            writer.close()
        self._writers.clear()

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, from_client: bool) -> None:
        messages = http2.Messages()
        try:
            while data := await source.read(CHUNK_BYTES):
                self.num_passed += from_client
                if self.delay_s:
                    self.num_under_way += 1
                    await asyncio.sleep(self.delay_s)
                    self.num_under_way -= 1
                if not from_client and self._cancels and (end := self._cancel(messages, data)) is not None:
                    sink.write(end)
                    break
                if not from_client:
                    data = await self._count(data, sink)
                if sink.is_closing():
                    return
                sink.write(data)
                await sink.drain()
            if not sink.is_closing():
                sink.write_eof()
        except OSError:
            sink.transport.abort()

    def _cancel(self, messages: http2.Messages, data: bytes) -> bytes | None:
        """The last bytes of a connection whose call is cancelled now; else None."""
        num_bytes, frame_of = self._cancels[0]
        for end, stream in messages.ends(data):
            if self.num_bytes + end > num_bytes:
                self.num_bytes += end
                del self._cancels[0]
                return data[:end] + frame_of(stream)
        return None

    async def _count(self, data: bytes, sink: asyncio.StreamWriter) -> bytes:
        """Passes on what comes before the awaited event and awaits the event; returns what comes after it."""
        if self._event is not None and self.num_bytes + len(data) > self._event[0]:
            num_bytes, happen = self._event
            self._event = None
            place = max(0, num_bytes - self.num_bytes)
            before, data = data[:place], data[place:]
            self.num_bytes += len(before)
            sink.write(before)
            await sink.drain()
            await happen()
        self.num_bytes += len(data)
        return data
