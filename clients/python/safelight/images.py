"""Pictures that generations start from: named by the SHA-256 of their files, and uploaded if the server lacks them."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TypeAlias

import grpc

from safelight.events import Picture
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import images_pb2, images_pb2_grpc

CHUNK_BYTES = 32 << 10
"""Bytes of a file in one message of an upload."""

Metadata: TypeAlias = tuple[tuple[str, str], ...]
ImageSource: TypeAlias = str | bytes | Path | Picture | pb.Generation
"""A picture: its file as bytes or by its path, or the name "images/SHA256" of an uploaded picture. Or the picture of
another generation: a received `Picture`, its name "generations/ID/outputs/INDEX", or a generation or its name, which
means its first output."""


class ImageFile:
    """The file of a picture.

    Attributes:
        field: the argument that it was given for.
        name: its name at every server, "images/SHA256".
    """

    def __init__(self, data: bytes, field: str = "") -> None:
        self.data = data
        self.field = field
        self.sha256 = hashlib.sha256(data).digest()
        self.name = f"images/{self.sha256.hex()}"

    def pieces(self) -> list[images_pb2.UploadImageRequest]:
        """The messages of its upload."""
        first = images_pb2.UploadImageRequest(sha256=self.sha256, total_bytes=len(self.data))
        pieces = [
            images_pb2.UploadImageRequest(data=self.data[start : start + CHUNK_BYTES])
            for start in range(0, len(self.data), CHUNK_BYTES)
        ]
        return [first, *pieces]


def image_file(source: ImageSource, field: str) -> ImageFile | None:
    """The file of an argument; None if the server has it already: a name, a picture of a generation, or a generation.

    Raises:
        ValueError: it is none of these, or a file that cannot be read.
    """
    if isinstance(source, Picture):
        return None if source.generation else ImageFile(source.data, field)
    if isinstance(source, pb.Generation):
        return None
    if isinstance(source, str):
        if not source.startswith(("images/", "generations/")):
            raise ValueError(f"{field}: must be bytes, a pathlib.Path, a picture, or a name that begins with images/")
        return None
    if isinstance(source, bytes):
        return ImageFile(source, field)
    try:
        return ImageFile(source.read_bytes(), field)
    except OSError as error:
        raise ValueError(f"{field}: {source}: {error.strerror}") from None


def image_name(source: ImageSource, field: str) -> str:
    """The name that the picture of an argument has at the server.

    Raises:
        ValueError: as `image_file`.
    """
    file = image_file(source, field)
    if file is not None:
        return file.name
    if isinstance(source, Picture):
        return source.name
    name = source.name if isinstance(source, pb.Generation) else str(source)
    whole = name.startswith("generations/") and "/outputs/" not in name
    return f"{name}/outputs/0" if whole else name


async def upload(
    channel: grpc.aio.Channel, metadata: Metadata, file: ImageFile, timeout_s: float | None = None
) -> images_pb2.Image:
    """Uploads a file, whether or not the server has it.

    Raises:
        grpc.aio.AioRpcError: the server has refused it, or cannot be reached.
    """

    async def pieces() -> AsyncIterator[images_pb2.UploadImageRequest]:
        for piece in file.pieces():
            yield piece

    answer = await images_pb2_grpc.ImageServiceStub(channel).UploadImage(pieces(), metadata=metadata, timeout=timeout_s)
    return answer.image


async def upload_missing(
    channel: grpc.aio.Channel, metadata: Metadata, file: ImageFile, timeout_s: float | None
) -> None:
    """Uploads a file if the server does not have it.

    Raises:
        grpc.aio.AioRpcError: as `upload`.
    """
    request = images_pb2.GetImageRequest(name=file.name)
    try:
        await images_pb2_grpc.ImageServiceStub(channel).GetImage(request, metadata=metadata, timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
        await upload(channel, metadata, file, timeout_s)
