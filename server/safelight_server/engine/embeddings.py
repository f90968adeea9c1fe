"""Waits for the embeddings of prompts that `Engine.encode` requests without an output."""

from __future__ import annotations

import asyncio

from safelight_server.domain.errors import SafelightError
from safelight_server.domain.tensors import Embedding


class EmbeddingWaiters:
    """Futures by prompt name; calls that wait for the same prompt share one."""

    def __init__(self) -> None:
        self._futures: dict[str, asyncio.Future[Embedding]] = {}

    def __len__(self) -> int:
        return len(self._futures)

    def __contains__(self, name: str) -> bool:
        return name in self._futures

    def add(self, name: str) -> None:
        """Adds a future for a prompt that no call waits for yet."""
        self._futures[name] = asyncio.get_running_loop().create_future()

    async def get(self, name: str) -> Embedding:
        """Waits for the embedding.

        Raises:
            SafelightError: the error given to `refuse`.
        """
        return await asyncio.shield(self._futures[name])

    def answer(self, name: str, embedding: Embedding) -> None:
        """Gives the embedding to all calls that wait for it."""
        future = self._futures.pop(name)
        if not future.done():
            future.set_result(embedding)

    def refuse(self, name: str, error: SafelightError) -> None:
        """Raises the error in all calls that wait. A later call starts a new encoding."""
        future = self._futures.pop(name)
        if not future.done():
            future.set_exception(error)
            future.exception()  # retrieved, so that asyncio does not log it when no call waits any more
