"""Receives the pictures that clients upload, piece by piece, with bounds on bytes, on number and on time.

Invariant: before a byte is kept, the size of the upload is known and there is room for
it.
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
from safelight_server.threads import OneAtATime
from safelight_server.validation import check_upload, resolve_image

UPLOAD_S = 120.0
"""How long an upload may take: 16 MiB at 1.2 Mbit/s."""
MOST_AT_ONCE = 16
"""Memory is reserved for so many uploads of the largest size at once; there may be more smaller ones."""
RETRY_S = 1.0


class UploadRoom:
    """Counts the bytes of the uploads that are under way, in all and by tenant. Pure.

    Args:
        max_image_bytes: bound on one upload. There is room for `MOST_AT_ONCE` of that size, a quarter of it per tenant.
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
        """Reserves room for an upload of a tenant while the block runs.

        Raises:
            QueueFullError: there is no room.
        """
        for subject, taken, limit in (
            (f"tenant {tenant}", self._bytes[tenant], self._max_each),
            ("this server", self._bytes.total(), self._max_all),
        ):
            if taken + num_bytes > limit:
                raise QueueFullError(
                    f"{subject} has uploads of {taken} bytes in progress, of {limit} allowed; upload again later",
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
    """The methods of ImageService, and `keep` for pictures that come over HTTP.

    Args:
        pool: threads for decoding.
        max_bytes: bound on the size of a file.
        max_pixels: bound on the pixels of a picture.

    Attributes:
        room: counts the uploads in progress.
        max_bytes: bound on the size of a file.
    """

    def __init__(self, images: Images, room: UploadRoom, pool: Executor, max_bytes: int, max_pixels: int) -> None:
        self.room = room
        self.max_bytes = max_bytes
        self._images = images
        self._max_pixels = max_pixels
        self._decoding = OneAtATime(pool)  # a large picture takes much memory while it is decoded

    async def upload_image(
        self, pieces: AsyncIterator[images_pb2.UploadImageRequest], caller: Caller
    ) -> images_pb2.UploadImageResponse:
        """Receives a picture, checks that it can be decoded, and keeps it."""
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
        """Checks that a file can be decoded, and keeps it as if it had been uploaded.

        Args:
            field: the name of the file's field, for errors.
            transparent: whether it must be a PNG with an alpha channel.

        Raises:
            InvalidRequestError: the file is too large, no picture, or has no such channel.
            UnavailableError: no store takes it now.
        """
        if len(data) > self.max_bytes:
            what = f"has {len(data)} bytes; it must have at most {self.max_bytes}"
            raise InvalidRequestError([FieldViolation(field, what)])
        check = _check_transparent if transparent else check_picture
        return await self._keep(caller, data, functools.partial(_checked, field=field, check=check))

    async def _keep(
        self, caller: Caller, data: bytes, check: Callable[[bytes, int], tuple[str, PictureFile]]
    ) -> images_pb2.Image:
        digest, facts = await self._decoding.run(caller.tenant, check, data, self._max_pixels)
        return wire.image_message(await self._images.put(caller.tenant, digest, data, facts))

    async def get_image(self, request: images_pb2.GetImageRequest, caller: Caller) -> images_pb2.GetImageResponse:
        """Returns the facts of a picture of the caller's tenant."""
        digest = resolve_image(request.name)
        try:
            image = await self._images.get(caller.tenant, digest)
        except StoreError:
            raise UnavailableError("uploaded pictures cannot be read now; try again", retry_after_s=1.0) from None
        if image is None:
            raise NotFoundError(f"there is no images/{digest}", reason="IMAGE_NOT_FOUND")
        return images_pb2.GetImageResponse(image=wire.image_message(image))


def _announced(data: bytes, max_pixels: int, *, digest: bytes) -> tuple[str, PictureFile]:
    """Like `_checked`, but also checks that the bytes have the announced digest. Slow: runs in a thread."""
    if hashlib.sha256(data).digest() != digest:
        raise InvalidRequestError([FieldViolation("sha256", "does not match the bytes that came")])
    return _checked(data, max_pixels, field="data", check=check_picture)


def _checked(
    data: bytes, max_pixels: int, *, field: str, check: Callable[[bytes, int], PictureFile]
) -> tuple[str, PictureFile]:
    """The digest and the facts of a file that `check` accepts. Slow: runs in a thread."""
    try:
        return hashlib.sha256(data).hexdigest(), check(data, max_pixels)
    except PictureFileError as error:
        raise InvalidRequestError([FieldViolation(field, str(error))]) from None


def _check_transparent(data: bytes, max_pixels: int) -> PictureFile:
    """Checks a mask in the form of OpenAI's API, whose transparent part is developed anew."""
    facts = check_picture(data, max_pixels)
    if facts.media_type != "image/png" or not has_alpha(data):
        raise PictureFileError("must be a PNG with an alpha channel: its transparent part is developed anew")
    return facts


async def _received(
    first: images_pb2.UploadImageRequest, pieces: AsyncIterator[images_pb2.UploadImageRequest], total_bytes: int
) -> bytes:
    """The bytes of a file. Stops reading when more come than were announced.

    Raises:
        InvalidRequestError: there are more or fewer bytes than announced.
    """
    data = bytearray(first.data)
    async for piece in pieces:
        data += piece.data
        if len(data) > total_bytes:
            break
    if len(data) != total_bytes:
        found = "more" if len(data) > total_bytes else f"{len(data)}"
        raise InvalidRequestError([FieldViolation("data", f"has {found} bytes where {total_bytes} were announced")])
    return bytes(data)
