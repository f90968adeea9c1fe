"""Serves the metrics over HTTP/1.0, from the event loop and within bounds.

prometheus_client's own server starts a thread for each connection and waits for a request without a time limit. Here a
connection costs no thread and has limited time, the number of connections is bounded, and one worker thread makes the
responses with prometheus_client's WSGI application, one after the other.
"""

from __future__ import annotations

import asyncio
import http.client
import io
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from wsgiref.handlers import SimpleHandler

from prometheus_client import CollectorRegistry, make_wsgi_app

MAX_CONNECTIONS = 32
"""Open connections. One more closes the oldest, so that idle connections cannot keep Prometheus out."""
MAX_HEAD_BYTES = 16 << 10
"""Bound on the request line and the headers."""
EXCHANGE_S = 10.0
"""Time for a connection, from its opening to the last byte of the answer."""
BAD_REQUEST = b"HTTP/1.0 400 Bad Request\r\nContent-Length: 0\r\n\r\n"
ABANDONED = (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError)
"""Errors of a connection whose client was too slow, sent too much or left."""


class MetricsServer:
    """Answers scrapes of a registry. Each connection is answered once and closed.

    Args:
        exchange_s: seconds that a connection may take.
    """

    def __init__(self, registry: CollectorRegistry, exchange_s: float = EXCHANGE_S) -> None:
        self._app = make_wsgi_app(registry)
        self._exchange_s = exchange_s
        self._connections: dict[asyncio.Task[None], None] = {}  # the oldest first
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="metrics")

    @property
    def num_connections(self) -> int:
        """Open connections."""
        return len(self._connections)

    @asynccontextmanager
    async def listening(self, host: str, port: int) -> AsyncIterator[int]:
        """Listens while the block runs. Yields the port, which is a free one if `port` is 0.

        Raises:
            OSError: the address is in use or not this machine's.
        """
        server = await asyncio.start_server(self._serve, host, port, limit=MAX_HEAD_BYTES)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            open_connections = list(self._connections)
            for connection in open_connections:
                connection.cancel()
            await asyncio.gather(*open_connections, return_exceptions=True)
            await server.wait_closed()
            self._worker.shutdown(wait=False)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection is not None
        if len(self._connections) >= MAX_CONNECTIONS:
            oldest = next(iter(self._connections))
            del self._connections[oldest]
            oldest.cancel()
        self._connections[connection] = None
        try:
            async with asyncio.timeout(self._exchange_s):
                head = await reader.readuntil(b"\r\n\r\n")
                loop = asyncio.get_running_loop()
                writer.write(await loop.run_in_executor(self._worker, self._answer, head))
                writer.close()
                await writer.wait_closed()  # until all of it is sent
        except ABANDONED:
            pass
        finally:
            self._connections.pop(connection, None)
            writer.transport.abort()

    def _answer(self, head: bytes) -> bytes:
        """The response to a request without a body. `head` is its request line and headers."""
        line, _, rest = head.partition(b"\r\n")
        try:
            method, target, _version = line.decode("ascii").split(" ")
            headers = http.client.parse_headers(io.BytesIO(rest))
        except (ValueError, http.client.HTTPException):
            return BAD_REQUEST
        path, _, query = target.partition("?")
        environ = {
            "REQUEST_METHOD": method,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "HTTP_ACCEPT": headers.get("Accept", ""),
            "HTTP_ACCEPT_ENCODING": headers.get("Accept-Encoding", ""),
            "SERVER_PROTOCOL": "HTTP/1.0",
        }
        answer = io.BytesIO()
        SimpleHandler(io.BytesIO(), answer, io.StringIO(), environ, multithread=False).run(self._app)
        return answer.getvalue()
