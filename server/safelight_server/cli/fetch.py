"""`safelight fetch`: copies models from an object store into a folder; every file is checked against its SHA-256.

It is meant for the start of a container: a file that exists with the right digest is not fetched again, and a file
appears under its name only when it is complete and has the right digest.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated

import obstore
import typer
from obstore.exceptions import BaseError
from obstore.store import from_url

from safelight_server.files import read_regular_file

LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")
PIECE_BYTES = 8 << 20


class FetchError(Exception):
    """A file cannot be fetched, or has a wrong digest; the message names it."""


def fetch(
    url: Annotated[
        str, typer.Argument(help="Folder to copy from: s3://BUCKET/PREFIX, gs://, az://, https:// or file:///.")
    ],
    sums: Annotated[Path, typer.Option(help="List of the files in `sha256sum` format: DIGEST, two spaces, path.")],
    out: Annotated[Path, typer.Option(help="Folder to copy to.")],
) -> None:
    """Copy models into a folder, each file checked against its SHA-256."""
    try:
        text = read_regular_file(sums).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise FetchError(f"--sums {sums}: {error}") from None
    digests = parse_sums(text, str(sums))
    try:
        store = from_url(url)
    except (BaseError, ValueError) as error:
        raise FetchError(f"{url}: {str(error).splitlines()[0]}") from None
    for path, digest in digests.items():
        copied = _copy(store, path, digest, out / path, url)
        typer.echo(f"{'fetched' if copied else 'is there'}  {path}")


def parse_sums(text: str, name: str = "sums") -> Mapping[str, str]:
    """The digests by path.

    Raises:
        FetchError: a line is malformed, a path leads out of the folder or has two digests, or there is no line.
    """
    digests: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        if (match := LINE.fullmatch(line)) is None:
            raise FetchError(f"{name}, line {number}: must be DIGEST, two spaces, path")
        digest, path = match.groups()
        pure = PurePosixPath(path.removeprefix("./"))
        if pure.is_absolute() or ".." in pure.parts or not pure.parts:
            raise FetchError(f"{name}, line {number}: {path}: must be a path below the folder")
        if digests.setdefault(str(pure), digest) != digest:
            raise FetchError(f"{name}, line {number}: {path}: has two digests")
    if not digests:
        raise FetchError(f"{name}: lists no file")
    return digests


def _copy(store: obstore.store.ObjectStore, path: str, digest: str, target: Path, url: str) -> bool:
    """Copies one file. Returns False if the right file exists already."""
    try:
        if target.is_file() and _digest(_pieces(target)) == digest:
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        found = hashlib.sha256()
        with partial.open("wb") as file:
            for piece in obstore.get(store, path).stream(min_chunk_size=PIECE_BYTES):
                found.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        if found.hexdigest() != digest:
            partial.unlink()
            raise FetchError(f"{url}: {path}: has SHA-256 {found.hexdigest()} and should have {digest}")
        partial.replace(target)
    except (BaseError, OSError) as error:
        raise FetchError(f"{url}: {path}: {str(error).splitlines()[0]}") from None
    return True


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece


def _digest(pieces: Iterator[bytes]) -> str:
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
    return found.hexdigest()
