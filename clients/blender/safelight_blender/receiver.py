"""Receives generations in one thread with an event loop.

It does not use Blender, whose data only Blender's main thread may touch. This thread writes a `Generation`; any thread
may read it. A `Generation` keeps only the newest image, replacing one that the reader has not taken.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import numpy as np
import safelight
from safelight.v1 import generation_pb2 as pb

if TYPE_CHECKING:
    from numpy.typing import NDArray

RAW = "application/x-raw-rgba8"
CANCEL_S = 5.0
"""How long to wait until the server has accepted and ended a cancelled generation, in seconds."""


@dataclass(frozen=True, slots=True)
class Server:
    """Address of a server, and how to connect to it.

    Attributes:
        address: "host:port"; several replicas are separated by commas.
        api_key: the API key; "": none.
        tls: whether to use TLS.
        ca_file: file of the certificate authorities to trust, as PEM; "": those that gRPC trusts.
        server_name: the name in the server's certificate, where it differs from the address.
    """

    address: str
    api_key: str = ""
    tls: bool = False
    ca_file: str = ""
    server_name: str = ""

    def client(self) -> safelight.Client:
        """Makes a client of this server, on the running event loop.

        Raises:
            ValueError: the address or the key cannot be used.
            OSError: the file of authorities cannot be read.
        """
        credentials = None
        if self.tls:
            credentials = grpc.ssl_channel_credentials(Path(self.ca_file).read_bytes() if self.ca_file else None)
        return safelight.Client(
            self.address, api_key=self.api_key, credentials=credentials, server_name=self.server_name
        )


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no picture: a stable name, such as "QUEUE_FULL" or "UNAVAILABLE", and a message for people."""

    reason: str
    message: str


class Generation:
    """What was received of one generation so far.

    Attributes:
        name: "generations/ID"; "" before it was accepted.
        width_px, height_px: the size of its picture; 0 before it was accepted. Previews may be smaller.
        step, num_steps: steps made, and steps in all; 0 before its first step.
        failure: why it ended without a picture; None while it runs and if it has succeeded.
        ended: set when nothing more comes.
    """

    def __init__(self) -> None:
        self.name = ""
        self.width_px = 0
        self.height_px = 0
        self.step = 0
        self.num_steps = 0
        self.failure: Failure | None = None
        self.ended = threading.Event()
        self._newest: NDArray[np.float32] | None = None
        self._lock = threading.Lock()
        self._cancelling = asyncio.Event()
        self._accepted = asyncio.Event()

    def take(self) -> NDArray[np.float32] | None:
        """Returns the newest image once; None if it was taken before, or if there is none.

        (height, width, 4) float32 from 0 to 1, sRGB, straight alpha. The lowest row comes first, as in Blender.
        """
        with self._lock:
            newest, self._newest = self._newest, None
        return newest

    async def run(self, server: Server, prompt: str, options: safelight.GenerateOptions) -> None:
        """Receives the generation until it ends or is cancelled. Called on the receiver's event loop."""
        try:
            async with server.client() as client:
                await self._run(client, prompt, options)
        except (safelight.GenerationError, ValueError, OSError) as error:
            self.failure = failure_of(error)
        except asyncio.CancelledError:
            self.failure = Failure("GENERATION_CANCELLED", "the add-on was closed")
            raise
        except BaseException as error:
            self.failure = Failure("INTERNAL", f"{type(error).__name__}: {error}")
            raise
        finally:
            self.ended.set()

    async def _run(self, client: safelight.Client, prompt: str, options: safelight.GenerateOptions) -> None:
        receiving = asyncio.create_task(self._receive(client, prompt, options))
        cancelling = asyncio.create_task(self._cancelling.wait())
        try:
            await asyncio.wait({receiving, cancelling}, return_when=asyncio.FIRST_COMPLETED)
            if receiving.done():
                await receiving
                return
            with suppress(TimeoutError, safelight.GenerationError):
                async with asyncio.timeout(CANCEL_S):
                    await self._accepted.wait()  # a generation has no name before it is accepted
                    await client.cancel(self.name)
                    await asyncio.wait({receiving})  # it may still finish with a picture
            if receiving.done():
                await receiving
            else:
                self.failure = Failure("GENERATION_CANCELLED", "the server has not answered in time and was left")
        finally:
            for task in (receiving, cancelling):
                task.cancel()
            await asyncio.wait({receiving, cancelling})

    async def _receive(self, client: safelight.Client, prompt: str, options: safelight.GenerateOptions) -> None:
        try:
            async with aclosing(client.generate(prompt, **options)) as events:
                async for event in events:
                    self._take_in(event)
        finally:
            self._accepted.set()  # so that a cancellation does not wait any longer

    def _take_in(self, event: safelight.Event) -> None:
        match event:
            case safelight.Accepted():
                self.width_px, self.height_px = event.width_px, event.height_px
                self.name = event.generation
                self._accepted.set()
            case safelight.Progress():
                self.step, self.num_steps = event.step, event.num_steps
            case safelight.Preview() | safelight.Picture():
                pixels = np.ascontiguousarray(event.array()[::-1], np.float32)
                pixels /= 255
                with self._lock:
                    self._newest = pixels

    def wish_cancelled(self) -> None:
        """Requests its cancellation. Called on the receiver's event loop."""
        self._cancelling.set()


class Receiver:
    """The receiving thread. Any thread may call its methods; only `close` waits for the network."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._tasks: dict[Generation, asyncio.Task[None]] = {}
        self._thread = threading.Thread(target=self._loop.run_forever, name="safelight", daemon=True)
        self._thread.start()

    def generate(self, server: Server, prompt: str, options: safelight.GenerateOptions) -> Generation:
        """Starts a generation of one picture. `options`: see `safelight.GenerateOptions`."""
        generation = Generation()
        raw = pb.PixelEncoding(media_type=RAW)
        asked: safelight.GenerateOptions = {**options, "preview": pb.PreviewPolicy(accept=[raw]), "encoding": raw}

        def start() -> None:
            task = self._tasks[generation] = self._loop.create_task(generation.run(server, prompt, asked))
            task.add_done_callback(lambda task: self._tasks.pop(generation))

        self._loop.call_soon_threadsafe(start)
        return generation

    def cancel(self, generation: Generation) -> None:
        """Cancels a generation at the server. It ends soon after, even if the server does not answer."""
        self._loop.call_soon_threadsafe(generation.wish_cancelled)

    def models(self, server: Server) -> concurrent.futures.Future[list[str]]:
        """Requests the ids of the server's models, its default model first.

        Raises (the future): an error that `failure_of` converts.
        """

        async def ask() -> list[str]:
            async with server.client() as client:
                models = sorted(await client.models(), key=lambda model: not model.is_default)
            return [model.name.removeprefix("models/") for model in models]

        return asyncio.run_coroutine_threadsafe(ask(), self._loop)

    def close(self) -> None:
        """Cancels all generations at the server, waits until they have ended, and ends the thread."""

        async def end() -> None:
            for generation in self._tasks:
                generation.wish_cancelled()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            if tasks:
                await asyncio.wait(tasks, timeout=2 * CANCEL_S)
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        with suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(end(), self._loop).result(3 * CANCEL_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def failure_of(error: Exception) -> Failure:
    """Converts an error of the client to a `Failure`."""
    if isinstance(error, safelight.GenerationError):
        violations = "; ".join(f"{field}: {text}" for field, text in error.violations.items())
        return Failure(error.reason or error.code.name, violations or str(error))
    return Failure("INVALID_ARGUMENT" if isinstance(error, ValueError | OSError) else "INTERNAL", str(error))
