"""Checks the names of pictures to start from, and the announced size and digest of an upload before it is read."""

from __future__ import annotations

import re

from safelight.v1 import images_pb2

from safelight_server.domain.errors import FieldViolation, InvalidRequestError
from safelight_server.validation.violations import NAME, Violations

IMAGE_NAME = re.compile("images/([0-9a-f]{64})")
OUTPUT_NAME = re.compile(f"generations/{NAME}/outputs/[0-9]{{1,9}}")
NOT_A_NAME = "must be images/SHA256 with 64 hexadecimal digits, as UploadImage returns it"
DIGEST_BYTES = 32


def source_image(name: str, field: str, faults: Violations) -> str:
    """Checks the name of a picture to start from, at the path `field` of a request.

    Returns:
        The digest of an uploaded picture, or the name of an output unchanged; "" for a malformed name.
    """
    if (found := IMAGE_NAME.fullmatch(name)) is not None:
        return found[1]
    good = OUTPUT_NAME.fullmatch(name) is not None
    faults.check(good, field, f"{NOT_A_NAME}, or generations/ID/outputs/INDEX")
    return name if good else ""


def resolve_image(name: str) -> str:
    """The digest in the name of a picture.

    Raises:
        InvalidRequestError: the name is malformed.
    """
    found = IMAGE_NAME.fullmatch(name)
    if found is None:
        raise InvalidRequestError([FieldViolation("name", NOT_A_NAME)])
    return found[1]


def check_upload(piece: images_pb2.UploadImageRequest, max_bytes: int) -> tuple[bytes, int]:
    """The digest and the size that the first piece of an upload announces.

    Raises:
        InvalidRequestError: with all faults.
    """
    faults = Violations()
    size = f"must be the SHA-256 of the file, {DIGEST_BYTES} bytes"
    faults.check(len(piece.sha256) == DIGEST_BYTES, "sha256", size)
    faults.check(0 < piece.total_bytes <= max_bytes, "total_bytes", f"must be from 1 to {max_bytes}")
    faults.done()
    return piece.sha256, piece.total_bytes
