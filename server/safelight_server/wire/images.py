"""Uploaded pictures as Image messages."""

from __future__ import annotations

from datetime import UTC, datetime

from safelight.v1 import images_pb2

from safelight_server.cache.images import UploadedImage
from safelight_server.wire.specs import image_name
from safelight_server.wire.times import timestamp


def image_message(image: UploadedImage) -> images_pb2.Image:
    """An uploaded picture as a message."""
    return images_pb2.Image(
        name=image_name(image.digest),
        media_type=image.facts.media_type,
        width_px=image.facts.width_px,
        height_px=image.facts.height_px,
        total_bytes=len(image.data),
        expire_time=timestamp(datetime.fromtimestamp(image.expires_at, UTC)),
    )
