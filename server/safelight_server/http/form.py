"""Forms (multipart/form-data): texts and files by their names, parsed while they arrive, and kept in memory.

Starlette's parser puts large files on disk. The server writes no user data to disk
unencrypted, so here all parts stay in memory; the bound on the body bounds them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from safelight_server.domain.errors import FieldViolation, InvalidRequestError

CONTENT_TYPE = "multipart/form-data"
MAX_FILES, MAX_TEXTS = 16, 64
"""Bounds on the parts of a form. They exceed what any endpoint uses, so that surplus parts are refused by name."""


@dataclass(frozen=True, slots=True)
class Form:
    """The parts of a form by name, in the order in which they came. A name may occur several times."""

    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    files: Mapping[str, Sequence[bytes]] = field(default_factory=dict)


class _ParserInMemory(MultiPartParser):
    spool_max_size = 0  # a SpooledTemporaryFile with 0 stays in memory at any size


async def read_form(headers: Headers, pieces: AsyncGenerator[bytes, None], max_text_bytes: int) -> Form:
    """Reads a form from the pieces of a body.

    Args:
        max_text_bytes: bound on each text.

    Raises:
        InvalidRequestError: the body is no form, or has too many parts.
    """
    parser = _ParserInMemory(headers, pieces, max_files=MAX_FILES, max_fields=MAX_TEXTS, max_part_size=max_text_bytes)
    texts, files = dict[str, list[str]](), dict[str, list[bytes]]()
    try:
        parts = (await parser.parse()).multi_items()
    except MultiPartException as error:
        what = f"cannot be read as a form: {error.message}"
        raise InvalidRequestError([FieldViolation("body", what)]) from None
    for name, value in parts:
        if isinstance(value, UploadFile):
            files.setdefault(name, []).append(value.file.read())
            value.file.close()
        else:
            texts.setdefault(name, []).append(value)
    return Form(texts, files)
