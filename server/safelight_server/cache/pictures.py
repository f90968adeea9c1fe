"""Stores finished pictures: their pixels, and an encoded variant for each encoding that was requested.

An exact name holds only a picture that was computed from noise. A picture that began from another picture's latent is
stored under a name of its own, which EXACT lookups never use (`Cache.keep_as_similar`).
"""

from __future__ import annotations

import asyncio
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
    """What is stored beside the pixels of a picture.

    Attributes:
        prompt: the prompt that the picture was computed for.
        generation: resource name of the generation that computed it.
        revision: the model revision.
        num_steps: number of steps that its computation took.
        compute_s: seconds that its computation took.
    """

    prompt: str
    generation: str
    revision: str
    num_steps: int
    compute_s: float


@dataclass(frozen=True, slots=True)
class CachedPicture:
    """A cached picture in the requested encoding."""

    picture: EncodedPicture
    facts: PictureFacts


class Pictures:
    """Stores and reads pictures.

    Args:
        pool: threads for encoding.
        ttl_s: seconds until a picture expires.
    """

    def __init__(self, tiers: Tiers, keyring: Keyring, pool: Executor, ttl_s: float) -> None:
        self._tiers = tiers
        self._keyring = keyring
        self._pool = pool
        self._ttl_s = ttl_s

    async def get(self, name: CacheKeys, encoding: PixelEncoding) -> CachedPicture | None:
        """Returns a picture in the given encoding, or None. An encoding that is not stored yet is made and stored."""
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
        """Whether every tier confirms that it lacks the picture. False if a tier fails."""
        return await self._tiers.gone(_key(name))

    async def facts(self, name: CacheKeys) -> PictureFacts | None:
        """Returns the facts stored beside a picture, or None."""
        found = await self._tiers.get(_key(name))
        return None if found is None else _facts(found.entry)

    async def at(self, pointer: str, sure: bool = False) -> tuple[Pixels, PictureFacts] | None:
        """Returns the pixels and facts under a store key, or None.

        Raises:
            StoreError: `sure` was set and a shared tier failed, which may have the picture.
        """
        found = await self._tiers.get(pointer, sure=sure)
        return None if found is None else (_pixels(found.entry), _facts(found.entry))

    async def keep(self, name: CacheKeys, pixels: Pixels, facts: PictureFacts) -> None:
        """Stores a finished picture under its exact name."""
        await self.put(pointer(name), pixels, facts)

    async def put(
        self, pointer: str, pixels: Pixels, facts: PictureFacts, *, replicate: bool = False, ttl_s: float | None = None
    ) -> bool:
        """Stores a picture under a store key.

        Args:
            replicate: wait until a shared tier has stored it.
            ttl_s: seconds until it expires; None: the default.

        Returns:
            Whether a shared tier has stored it; without `replicate` always False.
        """
        height, width, _ = pixels.shape
        metadata = _metadata(facts) | {"width": str(width), "height": str(height)}
        entry = self._entry(pixels.tobytes(), metadata, facts)
        return await self._tiers.put(pointer, entry, self._ttl_s if ttl_s is None else ttl_s, replicate)

    async def _keep_variant(
        self, name: CacheKeys, picture: EncodedPicture, encoding: PixelEncoding, facts: PictureFacts, expires_at: float
    ) -> None:
        """Stores an encoded variant, which expires together with its pixels."""
        size = {"width": str(picture.width_px), "height": str(picture.height_px), "stride": str(picture.stride_bytes)}
        entry = self._entry(picture.data, _metadata(facts) | size, facts)
        await self._tiers.put(_key(name, _variant(encoding)), entry, expires_at - self._tiers.now())

    def _entry(self, data: bytes, metadata: dict[str, str], facts: PictureFacts) -> Entry:
        revision = self._keyring.tag("revision", facts.revision)
        return Entry(data, metadata, revision, self._keyring.tag("generation", facts.generation))


def pointer(name: CacheKeys) -> str:
    """Returns the store key of a picture's pixels."""
    return _key(name)


def _key(name: CacheKeys, variant: str = "pixels") -> str:
    return f"{name.namespace.prefix}/picture/{name.exact}.{variant}"


def _variant(encoding: PixelEncoding) -> str:
    match encoding.media_type:
        case MediaType.RAW_RGBA8:
            return f"raw.{encoding.row_alignment_bytes}.{'up' if encoding.bottom_up else 'down'}"
        case MediaType.KTX2:
            return f"ktx2.{encoding.texture_format.value}.{'up' if encoding.bottom_up else 'down'}"
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
