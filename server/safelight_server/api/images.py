"""Takes the pictures that clients upload: piece by piece, within bounds of bytes, of number and of time.

Invariant: what a call may send is known, and there is room for it, before a
byte of it is kept.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager

from safelight.v1 import images_pb2

from safelight_server import wire
from safelight_server.cache.images import Images
from safelight_server.domain.caller import Caller
from safelight_server.domain.errors import (
    DeadlineExceededError,
    FieldViolation,
    InvalidRequestError,
    NotFoundError,
    QueueFullError,
    UnavailableError,
)
from safelight_server.domain.uploads import PictureFileError, check_picture
from safelight_server.storage.base import StoreError
from safelight_server.validation import check_upload, resolve_image

UPLOAD_S = 120.0
"""How long an upload may take: 16 MiB at 1.2 Mbit/s."""
MAX_UPLOADS = 16
"""Uploads at once, each with at most `max_image_bytes` in memory; one tenant may have a quarter of them."""
RETRY_S = 1.0


class UploadSlots:
    """Counts the uploads that are under way, in all and by tenant. Pure.

    Args:
        max_uploads: in all; a tenant may have a quarter of them.
    """

    def __init__(self, max_uploads: int) -> None:
        self._max_all = max_uploads
        self._max_each = max(1, max_uploads // 4)
        self._open: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._open.total()

    @contextmanager
    def upload(self, tenant: str) -> Iterator[None]:
        """Counts an upload of a tenant while the block runs.

        Raises:
            QueueFullError: as many are under way as may be.
        """
        for subject, num_open, limit in (
            (f"tenant {tenant}", self._open[tenant], self._max_each),
            ("this server", self._open.total(), self._max_all),
        ):
            if num_open >= limit:
                raise QueueFullError(
                    f"{subject} has {limit} uploads under way, as many as it may have",
                    reason="TOO_MANY_UPLOADS",
                    metadata={"bound": "uploads", "subject": subject, "limit": str(limit)},
                    retry_after_s=RETRY_S,
                )
        self._open[tenant] += 1
        try:
            yield
        finally:
            self._open[tenant] -= 1
            if not self._open[tenant]:
                del self._open[tenant]


class ImageCalls:
    """ImageService.

    Args:
        pool: threads for decoding.
        max_bytes: of a file.
        max_pixels: of a picture.
    """

    def __init__(self, images: Images, slots: UploadSlots, pool: Executor, max_bytes: int, max_pixels: int) -> None:
        self._images = images
        self._slots = slots
        self._pool = pool
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels
        self._one = asyncio.Semaphore(1)  # a large picture takes much memory while it is decoded

    async def upload_image(
        self, pieces: AsyncIterator[images_pb2.UploadImageRequest], caller: Caller
    ) -> images_pb2.UploadImageResponse:
        """Takes a picture, looks whether it can be decoded, and keeps it."""
        with self._slots.upload(caller.tenant):
            try:
                async with asyncio.timeout(UPLOAD_S):
                    digest, data = await self._receive(pieces)
            except TimeoutError:
                raise DeadlineExceededError(f"the picture did not come within {UPLOAD_S:g} s") from None
            try:
                async with self._one:
                    loop = asyncio.get_running_loop()
                    facts = await loop.run_in_executor(self._pool, check_picture, data, self._max_pixels)
            except PictureFileError as error:
                raise InvalidRequestError([FieldViolation("data", str(error))]) from None
            image = await self._images.put(caller.tenant, digest.hex(), data, facts)
        return images_pb2.UploadImageResponse(image=wire.image_message(image))

    async def _receive(self, pieces: AsyncIterator[images_pb2.UploadImageRequest]) -> tuple[bytes, bytes]:
        """The digest and the bytes of a file."""
        data = bytearray()
        digest, total_bytes = b"", 0
        async for piece in pieces:
            if not digest:
                digest, total_bytes = check_upload(piece, self._max_bytes)
            data += piece.data
            if len(data) > total_bytes:
                break
        if not digest or len(data) != total_bytes:
            what = f"has {'more' if len(data) > total_bytes else len(data)} bytes where {total_bytes} were announced"
            raise InvalidRequestError([FieldViolation("data", what if digest else "is missing: send the file")])
        if hashlib.sha256(data).digest() != digest:
            raise InvalidRequestError([FieldViolation("sha256", "is not that of the bytes that came")])
        return digest, bytes(data)

    async def get_image(self, request: images_pb2.GetImageRequest, caller: Caller) -> images_pb2.GetImageResponse:
        """Returns what is known of a picture of the caller's tenant."""
        digest = resolve_image(request.name)
        try:
            image = await self._images.get(caller.tenant, digest)
        except StoreError:
            raise UnavailableError("uploaded pictures cannot be read now; try again", retry_after_s=1.0) from None
        if image is None:
            raise NotFoundError(f"there is no images/{digest}", reason="IMAGE_NOT_FOUND")
        return images_pb2.GetImageResponse(image=wire.image_message(image))
