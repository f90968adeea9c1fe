"""Pages of a list that is ordered by name (AIP-158). Pure.

A page token is opaque to clients and holds the last name of its page. It stays
valid when that name has been removed meanwhile: the next page begins after it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from itertools import islice

from safelight_server.domain.errors import FieldViolation, InvalidRequestError

DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE = 50, 100
VERSION = "1"


def page(names: Sequence[str], page_size: int, page_token: str) -> tuple[list[str], str]:
    """A page of the sorted `names`, and the token of the next page ("" if this is the last).

    Raises:
        InvalidRequestError: `page_size` is negative, or the server did not make `page_token`.
    """
    faults = []
    if page_size < 0:
        faults.append(FieldViolation("page_size", "must not be negative; 0 leaves it to the server"))
    after = _after(page_token)
    if after is None:
        faults.append(FieldViolation("page_token", "must be next_page_token of an earlier response, or empty"))
    if faults or after is None:
        raise InvalidRequestError(faults)
    size = min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
    found = list(islice((name for name in names if name > after), size + 1))
    return found[:size], _token(found[size - 1]) if len(found) > size else ""


def _token(last: str) -> str:
    return base64.urlsafe_b64encode(f"{VERSION}:{last}".encode()).decode()


def _after(token: str) -> str | None:
    """The name after which the page of a token begins; None for a token that the server did not make."""
    if not token:
        return ""
    try:
        version, colon, name = base64.b64decode(token, altchars=b"-_", validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        return None
    return name if colon and version == VERSION else None
