"""Takes the pictures that clients upload: piece by piece, within bounds of bytes, of number and of time.

Invariant: what a call may send is known, and there is room for it, before a
byte of it is kept.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
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
from safelight_server.domain.uploads import PictureFile, PictureFileError, check_picture, has_alpha
from safelight_server.storage.base import StoreError
from safelight_server.validation import check_upload, resolve_image

UPLOAD_S = 120.0
"""How long an upload may take: 16 MiB at 1.2 Mbit/s."""
MOST_AT_ONCE = 16
"""Uploads of the largest size that there is memory for at once; of smaller ones there may be more."""
RETRY_S = 1.0


class UploadRoom:
    """Counts the bytes of the uploads that are under way, in all and by tenant. Pure.

    Args:
        max_image_bytes: of one upload. There is room for `MOST_AT_ONCE` of these, and for a quarter of them a tenant.
    """

    def __init__(self, max_image_bytes: int) -> None:
        self._max_all = MOST_AT_ONCE * max_image_bytes
        self._max_each = self._max_all // 4
        self._bytes: Counter[str] = Counter()

    @property
    def num_bytes(self) -> int:
        """Bytes that the uploads under way have announced."""
        return self._bytes.total()

    @contextmanager
    def upload(self, tenant: str, num_bytes: int) -> Iterator[None]:
        """Keeps room for an upload of a tenant while the block runs.

        Raises:
            QueueFullError: there is none.
        """
        for subject, taken, limit in (
            (f"tenant {tenant}", self._bytes[tenant], self._max_each),
            ("this server", self._bytes.total(), self._max_all),
        ):
            if taken + num_bytes > limit:
                raise QueueFullError(
                    f"{subject} has uploads of {taken} bytes under way, and may have {limit}",
                    reason="TOO_MANY_UPLOADS",
                    metadata={"bound": "bytes of uploads", "subject": subject, "limit": str(limit)},
                    retry_after_s=RETRY_S,
                )
        self._bytes[tenant] += num_bytes
        try:
            yield
        finally:
            self._bytes[tenant] -= num_bytes
            if not self._bytes[tenant]:
                del self._bytes[tenant]


class ImageCalls:
    """ImageService, and what else brings pictures of clients.

    Args:
        pool: threads for decoding.
        max_bytes: of a file.
        max_pixels: of a picture.

    Attributes:
        room: for the uploads that are under way.
        max_bytes: of a file.
    """

    def __init__(self, images: Images, room: UploadRoom, pool: Executor, max_bytes: int, max_pixels: int) -> None:
        self.room = room
        self.max_bytes = max_bytes
        self._images = images
        self._pool = pool
        self._max_pixels = max_pixels
        self._one = asyncio.Semaphore(1)  # a large picture takes much memory while it is decoded

    async def upload_image(
        self, pieces: AsyncIterator[images_pb2.UploadImageRequest], caller: Caller
    ) -> images_pb2.UploadImageResponse:
        """Takes a picture, looks whether it can be decoded, and keeps it."""
        first = await anext(pieces, None)
        if first is None:
            raise InvalidRequestError([FieldViolation("data", "is missing: send the file")])
        digest, total_bytes = check_upload(first, self.max_bytes)
        with self.room.upload(caller.tenant, total_bytes):
            try:
                async with asyncio.timeout(UPLOAD_S):
                    data = await _received(first, pieces, total_bytes)
            except TimeoutError:
                raise DeadlineExceededError(f"the picture did not come within {UPLOAD_S:g} s") from None
            image = await self._keep(caller, data, functools.partial(_announced, digest=digest))
        return images_pb2.UploadImageResponse(image=image)

    async def keep(self, caller: Caller, data: bytes, field: str, *, transparent: bool = False) -> images_pb2.Image:
        """Looks whether a file that has come in another way can be decoded, and keeps it like one that was uploaded.

        Args:
            field: names it in errors.
            transparent: it must be a PNG with an alpha channel.

        Raises:
            InvalidRequestError: it is too large, no picture, or none with such a channel.
            UnavailableError: it cannot be kept now.
        """
        if len(data) > self.max_bytes:
            what = f"has {len(data)} bytes; at most {self.max_bytes} are taken"
            raise InvalidRequestError([FieldViolation(field, what)])
        check = _check_transparent if transparent else check_picture
        return await self._keep(caller, data, functools.partial(_checked, field=field, check=check))

    async def _keep(
        self, caller: Caller, data: bytes, check: Callable[[bytes, int], tuple[str, PictureFile]]
    ) -> images_pb2.Image:
        async with self._one:
            loop = asyncio.get_running_loop()
            digest, facts = await loop.run_in_executor(self._pool, check, data, self._max_pixels)
        return wire.image_message(await self._images.put(caller.tenant, digest, data, facts))

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


def _announced(data: bytes, max_pixels: int, *, digest: bytes) -> tuple[str, PictureFile]:
    """As `_checked`, of a file whose bytes must be those that were announced. Slow enough for a thread."""
    if hashlib.sha256(data).digest() != digest:
        raise InvalidRequestError([FieldViolation("sha256", "is not that of the bytes that came")])
    return _checked(data, max_pixels, field="data", check=check_picture)


def _checked(
    data: bytes, max_pixels: int, *, field: str, check: Callable[[bytes, int], PictureFile]
) -> tuple[str, PictureFile]:
    """The digest of a file and what is known of it. Slow enough for a thread."""
    try:
        return hashlib.sha256(data).hexdigest(), check(data, max_pixels)
    except PictureFileError as error:
        raise InvalidRequestError([FieldViolation(field, str(error))]) from None


def _check_transparent(data: bytes, max_pixels: int) -> PictureFile:
    """Checks a mask in the form of OpenAI's API, in which what is transparent is developed anew."""
    facts = check_picture(data, max_pixels)
    if facts.media_type != "image/png" or not has_alpha(data):
        raise PictureFileError("must be a PNG with an alpha channel: what is transparent is developed anew")
    return facts


async def _received(
    first: images_pb2.UploadImageRequest, pieces: AsyncIterator[images_pb2.UploadImageRequest], total_bytes: int
) -> bytes:
    """The bytes of a file, no more than were announced."""
    data = bytearray(first.data)
    async for piece in pieces:
        data += piece.data
        if len(data) > total_bytes:
            break
    if len(data) != total_bytes:
        found = "more" if len(data) > total_bytes else f"{len(data)}"
        raise InvalidRequestError([FieldViolation("data", f"has {found} bytes where {total_bytes} were announced")])
    return bytes(data)
