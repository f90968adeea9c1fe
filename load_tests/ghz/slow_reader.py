"""A TCP relay through which a client reads slowly: so many bytes a second on each connection."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

CHUNK_BYTES = 8192
BUFFER_BYTES = 16384
"""Size of buffers. Small, so that unread data waits at the server and not in buffers on the way."""


@contextlib.asynccontextmanager
async def slow_reader(target: str, bytes_per_second: float) -> AsyncIterator[str]:
    """Relays to `target` (HOST:PORT) during the block, and yields the address for clients.

    What clients send passes at once. What the server sends passes at `bytes_per_second` on each connection.
    """
    host, port = target.rsplit(":", 1)
    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        with contextlib.suppress(OSError):
            await _relay(reader, writer, await _connect(host, int(port)), bytes_per_second)
        writer.transport.abort()

    server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=CHUNK_BYTES)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _connect(host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connects with a small receive buffer, set before the first byte since a TCP window never shrinks."""
    loop = asyncio.get_running_loop()
    family, kind, protocol, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
    there = socket.socket(family, kind, protocol)
    there.setblocking(False)
    there.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    try:
        await loop.sock_connect(there, address)
    except OSError:
        there.close()
        raise
    return await asyncio.open_connection(sock=there, limit=CHUNK_BYTES)


async def _relay(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    there: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    bytes_per_second: float,
) -> None:
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_pass_on(reader, there[1], None))
            group.create_task(_pass_on(there[0], writer, bytes_per_second))
    except* OSError:
        pass  # one side has closed, so the other is closed too
    finally:
        there[1].transport.abort()


async def _pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter, bytes_per_second: float | None) -> None:
    while data := await source.read(CHUNK_BYTES):
        if bytes_per_second is not None:
            await asyncio.sleep(len(data) / bytes_per_second)
        sink.write(data)
        await sink.drain()
    raise ConnectionResetError  # ends the other direction too
