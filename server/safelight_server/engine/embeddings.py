"""Prompts whose embeddings someone asked for by themselves, and who waits for them."""

from __future__ import annotations

import asyncio

from safelight_server.domain.errors import SafelightError
from safelight_server.domain.tensors import FloatArray


class EmbeddingWaiters:
    """Futures by prompt name; those who ask for the same share one."""

    def __init__(self) -> None:
        self._futures: dict[str, asyncio.Future[FloatArray]] = {}

    def __len__(self) -> int:
        return len(self._futures)

    def __contains__(self, name: str) -> bool:
        return name in self._futures

    def add(self, name: str) -> None:
        """Someone asks for what nobody has asked for yet."""
        self._futures[name] = asyncio.get_running_loop().create_future()

    async def get(self, name: str) -> FloatArray:
        """The embedding (T, D), when it is there.

        Raises:
            SafelightError: as it was refused.
        """
        return await asyncio.shield(self._futures[name])

    def answer(self, name: str, embedding: FloatArray) -> None:
        """It is there."""
        future = self._futures.pop(name)
        if not future.done():
            future.set_result(embedding)

    def refuse(self, name: str, error: SafelightError) -> None:
        """It will not be; whoever comes now asks anew."""
        future = self._futures.pop(name)
        if not future.done():
            future.set_exception(error)
            future.exception()  # whoever asked may have gone
