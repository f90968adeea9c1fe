"""Finished pictures by name: pixels, and the encodings that were asked for, kept as variants of them.

Under its exact name stands only what was computed from noise to the end. A picture
that began from another's latent is kept under a name of its own, by which EXACT
never finds it (`Cache.keep_as_similar`). Neighbours: `namespaces` names them, `storage.tiers`
keeps them.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from safelight_server.cache.namespaces import CacheKeys
from safelight_server.domain.picture import EncodedPicture, Pixels, encode
from safelight_server.domain.request import MediaType, PixelEncoding
from safelight_server.storage.keyring import Keyring
from safelight_server.storage.sealed import Entry
from safelight_server.storage.tiers import Tiers


@dataclass(frozen=True, slots=True)
class PictureFacts:
    """What is known of a kept picture beside its pixels.

    Attributes:
        prompt: it was developed for.
        generation: resource name of the one that developed it.
        num_steps: it took.
        compute_s: likewise.
    """

    prompt: str
    generation: str
    revision: str
    num_steps: int
    compute_s: float


@dataclass(frozen=True, slots=True)
class CachedPicture:
    """A kept picture in the encoding that was asked for."""

    picture: EncodedPicture
    facts: PictureFacts


class Pictures:
    """Pictures in all tiers.

    Args:
        pool: threads for encoding.
        ttl_s: how long they are served.
    """

    def __init__(self, tiers: Tiers, keyring: Keyring, pool: Executor, ttl_s: float) -> None:
        self._tiers = tiers
        self._keyring = keyring
        self._pool = pool
        self._ttl_s = ttl_s

    async def get(self, name: CacheKeys, encoding: PixelEncoding) -> CachedPicture | None:
        """The picture of that name; an encoding that nobody asked for before is made of its pixels and kept."""
        found = await self._tiers.get(_key(name, _variant(encoding)))
        if found is not None:
            return CachedPicture(_encoded(found.entry, encoding), _facts(found.entry))
        found = await self._tiers.get(_key(name))
        if found is None:
            return None
        pixels = _pixels(found.entry)
        picture = await asyncio.get_running_loop().run_in_executor(self._pool, encode, pixels, encoding)
        facts = _facts(found.entry)
        await self._keep_variant(name, picture, encoding, facts, found.expires_at)
        return CachedPicture(picture, facts)

    async def gone(self, name: CacheKeys) -> bool:
        """Whether no tier has the picture for certain; one that cannot answer may have it."""
        return await self._tiers.gone(_key(name))

    async def facts(self, name: CacheKeys) -> PictureFacts | None:
        """What is known of a picture."""
        found = await self._tiers.get(_key(name))
        return None if found is None else _facts(found.entry)

    async def at(self, pointer: str, sure: bool = False) -> tuple[Pixels, PictureFacts] | None:
        """The picture under a key of `pointer` or one like it.

        Raises:
            StoreError: with `sure`, where a shared tier cannot say whether it has it.
        """
        found = await self._tiers.get(pointer, sure=sure)
        return None if found is None else (_pixels(found.entry), _facts(found.entry))

    async def keep(self, name: CacheKeys, pixels: Pixels, facts: PictureFacts) -> None:
        """Keeps a finished picture."""
        await self.put(pointer(name), pixels, facts)

    async def put(
        self, pointer: str, pixels: Pixels, facts: PictureFacts, *, replicate: bool = False, ttl_s: float | None = None
    ) -> bool:
        """Keeps a picture under a key; with `replicate` waits for a shared tier and says whether one has it.

        Args:
            ttl_s: how long; None: as all pictures.
        """
        height, width, _ = pixels.shape
        metadata = _metadata(facts) | {"width": str(width), "height": str(height)}
        entry = self._entry(pixels.tobytes(), metadata, facts)
        return await self._tiers.put(pointer, entry, self._ttl_s if ttl_s is None else ttl_s, replicate)

    async def _keep_variant(
        self, name: CacheKeys, picture: EncodedPicture, encoding: PixelEncoding, facts: PictureFacts, expires_at: float
    ) -> None:
        """Keeps an encoding as long as the pixels that it was made of, and no longer."""
        size = {"width": str(picture.width_px), "height": str(picture.height_px), "stride": str(picture.stride_bytes)}
        entry = self._entry(picture.data, _metadata(facts) | size, facts)
        await self._tiers.put(_key(name, _variant(encoding)), entry, expires_at - time.time())

    def _entry(self, data: bytes, metadata: dict[str, str], facts: PictureFacts) -> Entry:
        revision = self._keyring.tag("revision", facts.revision)
        return Entry(data, metadata, revision, self._keyring.tag("generation", facts.generation))


def pointer(name: CacheKeys) -> str:
    """The key of the pixels of that name."""
    return _key(name)


def _key(name: CacheKeys, variant: str = "pixels") -> str:
    return f"{name.namespace.prefix}/picture/{name.exact}.{variant}"


def _variant(encoding: PixelEncoding) -> str:
    match encoding.media_type:
        case MediaType.RAW_RGBA8:
            return f"raw.{encoding.row_alignment_bytes}.{'up' if encoding.bottom_up else 'down'}"
        case MediaType.PNG:
            return "png"
        case media_type:
            return f"{media_type.value.rpartition('/')[2]}.{encoding.quality}"


def _metadata(facts: PictureFacts) -> dict[str, str]:
    return {
        "prompt": facts.prompt,
        "generation": facts.generation,
        "revision": facts.revision,
        "steps": str(facts.num_steps),
        "compute_s": repr(facts.compute_s),
    }


def _facts(entry: Entry) -> PictureFacts:
    at = entry.metadata
    return PictureFacts(at["prompt"], at["generation"], at["revision"], int(at["steps"]), float(at["compute_s"]))


def _pixels(entry: Entry) -> Pixels:
    shape = int(entry.metadata["height"]), int(entry.metadata["width"]), 3
    return np.frombuffer(entry.data, np.uint8).reshape(shape)


def _encoded(entry: Entry, encoding: PixelEncoding) -> EncodedPicture:
    at = entry.metadata
    return EncodedPicture(encoding.media_type, int(at["width"]), int(at["height"]), int(at["stride"]), entry.data)
