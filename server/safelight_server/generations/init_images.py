"""Loads the pictures that generations start from: from the uploads of their tenant to pixels at their size."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor

from safelight_server.cache.images import Images
from safelight_server.domain.errors import FieldViolation, InvalidRequestError, NotFoundError
from safelight_server.domain.picture import Pixels
from safelight_server.domain.request import Spec
from safelight_server.domain.uploads import PictureFileError, decode_mask, decode_picture
from safelight_server.engine.jobs import InitImage


class InitImages:
    """Loads and decodes pictures, one at a time, as a large one takes much memory while it is decoded.

    Args:
        pool: threads for decoding.
        max_pixels: of a picture.
    """

    def __init__(self, images: Images, pool: Executor, max_pixels: int) -> None:
        self._images = images
        self._pool = pool
        self._max_pixels = max_pixels
        self._one = asyncio.Semaphore(1)

    async def load(self, tenant: str, spec: Spec) -> InitImage | None:
        """The picture of a spec with its mask; None: it starts from noise.

        Raises:
            NotFoundError: the tenant has no such picture.
            InvalidRequestError: it can be decoded no more, since the server's bounds have changed.
            StoreError: a tier that replicas share failed.
        """
        if not spec.init_image:
            return None
        pixels = await self._decoded(tenant, spec.init_image, "spec.init_image", decode_picture, spec)
        mask = None
        if spec.mask:
            mask = await self._decoded(tenant, spec.mask, "spec.mask", decode_mask, spec)
        return InitImage(spec.init_image, pixels, mask)

    async def _decoded(
        self, tenant: str, digest: str, field: str, decode: Callable[[bytes, int, int, int], Pixels], spec: Spec
    ) -> Pixels:
        found = await self._images.get(tenant, digest, use=True)
        if found is None:
            raise image_not_found(digest, field)
        size = self._max_pixels, spec.width_px, spec.height_px
        try:
            async with self._one:
                return await asyncio.get_running_loop().run_in_executor(self._pool, decode, found.data, *size)
        except PictureFileError as error:
            raise InvalidRequestError([FieldViolation(field, str(error))]) from None


def image_not_found(digest: str, field: str) -> NotFoundError:
    """There is no such picture of the tenant's, or none any more."""
    what = f"there is no images/{digest}; upload it, or upload it again"
    return NotFoundError(what, reason="IMAGE_NOT_FOUND", violations=[FieldViolation(field, what)])
