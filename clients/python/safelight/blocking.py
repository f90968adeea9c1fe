"""The client for programs without asyncio: `Client`, on an event loop in a thread that all sync clients share."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

import grpc

from safelight.client import PATIENCE_S, RETRIES, Client
from safelight.events import Event, Picture
from safelight.request import GenerateOptions, PreviewOptions
from safelight.servers import MAX_MESSAGE_BYTES, TokenSource
from safelight.stream import GenerationStream
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import images_pb2, models_pb2

if TYPE_CHECKING:
    import PIL.Image

Value = TypeVar("Value")


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """The loop of all sync clients, started on first use. Its thread ends with the process."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="safelight", daemon=True).start()
    return loop


def _run(work: Coroutine[Any, Any, Value]) -> Value:
    """Runs a coroutine on the loop and waits for it. Cancels it if the wait is interrupted."""
    future = asyncio.run_coroutine_threadsafe(work, _loop())
    try:
        return future.result()
    finally:
        future.cancel()


class SyncStream:
    """An iterator of the events of one generation, like `GenerationStream`. Each `next` fetches one event.

    `close`, or the end of a `with` block, closes the stream at the server.
    """

    def __init__(self, stream: GenerationStream) -> None:
        self._stream = stream

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        event = _run(_next(self._stream))
        if event is None:
            raise StopIteration
        return event

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the stream. The server suspends a generation whose last stream was closed, then cancels it."""
        _run(self._stream.aclose())

    def pictures(self) -> list[Picture]:
        """Waits for all pictures; see `GenerationStream.pictures`."""
        return _run(self._stream.pictures())

    def picture(self) -> Picture:
        """Waits for the first picture; see `GenerationStream.picture`."""
        return _run(self._stream.picture())

    def image(self) -> PIL.Image.Image:
        """Waits for the first picture as a Pillow image; see `GenerationStream.image`."""
        return _run(self._stream.image())


class SyncClient:
    """A connection to a server, or to several replicas of it, for programs without asyncio. Arguments: see `Client`.

    May be used by several threads at once.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        *,
        api_key: str | None = None,
        token: TokenSource | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        server_name: str = "",
        patience_s: float = PATIENCE_S,
        retries: int = RETRIES,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        async def connect() -> Client:  # on the loop that its channels belong to
            return Client(
                target,
                api_key=api_key,
                token=token,
                credentials=credentials,
                server_name=server_name,
                patience_s=patience_s,
                retries=retries,
                max_message_bytes=max_message_bytes,
            )

        self._client = _run(connect())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes all connections."""
        _run(self._client.close())

    def generate(self, prompt: str, **options: Unpack[GenerateOptions]) -> SyncStream:
        """Generates pictures; see `Client.generate`."""
        return SyncStream(self._client.generate(prompt, **options))

    def watch(
        self, generation: str, *, timeout_s: float | None = None, **options: Unpack[PreviewOptions]
    ) -> SyncStream:
        """Watches a generation that exists; see `Client.watch`."""
        return SyncStream(self._client.watch(generation, timeout_s=timeout_s, **options))

    def get(self, generation: str) -> pb.Generation:
        """Returns the state of a generation; see `Client.get`."""
        return _run(self._client.get(generation))

    def cancel(self, generation: str) -> pb.Generation:
        """Stops a generation and returns it as it ended; see `Client.cancel`."""
        return _run(self._client.cancel(generation))

    def upload_image(self, source: bytes | Path) -> images_pb2.Image:
        """Uploads a picture; see `Client.upload_image`."""
        return _run(self._client.upload_image(source))

    def models(self) -> list[models_pb2.Model]:
        """Returns all models of the server; see `Client.models`."""
        return _run(self._client.models())


async def _next(stream: GenerationStream) -> Event | None:
    return await anext(stream, None)
