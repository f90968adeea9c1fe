"""Frames of HTTP/2: writing and parsing, as far as tests need it."""

from __future__ import annotations

from collections.abc import Iterator

DATA, HEADERS, RST_STREAM = 0, 1, 3
END_STREAM, END_HEADERS = 1, 4
CANCEL = 8


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Makes a frame."""
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def header(name: bytes, value: bytes) -> bytes:
    """Makes a header as a literal without indexing; name and value have less than 127 bytes."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def reset(stream: int) -> bytes:
    """The frame with which a server resets a call."""
    return frame(RST_STREAM, 0, stream, CANCEL.to_bytes(4))


def cancelled(stream: int) -> bytes:
    """The frame with which a server ends a call with the status CANCELLED and no details."""
    return frame(HEADERS, END_STREAM | END_HEADERS, stream, header(b"grpc-status", b"1"))


class Units:
    """Parses units whose header has the length of the rest; the data comes in pieces of any length.

    Args:
        header_bytes: length of the header.
        length: the part of the header with the length of the rest.
    """

    def __init__(self, header_bytes: int, length: slice) -> None:
        self._header_bytes = header_bytes
        self._length = length
        self._header = b""
        self._left = 0

    @property
    def at_end(self) -> bool:
        """Whether the last parsed byte is the end of a unit."""
        return not self._header

    def pieces(self, data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
        """The units, or parts of units, in `data`: the position after each, its header and its bytes."""
        at = 0
        while at < len(data):
            if len(self._header) < self._header_bytes:
                more = data[at : at + self._header_bytes - len(self._header)]
                self._header += more
                at += len(more)
                if len(self._header) < self._header_bytes:
                    return
                self._left = int.from_bytes(self._header[self._length])
            header, piece = self._header, data[at : at + self._left]
            self._left -= len(piece)
            at += len(piece)
            if not self._left:
                self._header = b""
            yield at, header, piece


class Messages:
    """Finds where a frame and a message end together, in the bytes that a gRPC server sends for one call."""

    def __init__(self) -> None:
        self._frames = Units(9, slice(0, 3))
        self._messages = Units(5, slice(1, 5))

    def ends(self, data: bytes) -> Iterator[tuple[int, int]]:
        """The positions after such frames in `data`, with the id of the call's stream."""
        for at, header, piece in self._frames.pieces(data):
            if header[3] == DATA:
                for _ in self._messages.pieces(piece):
                    pass
                if self._frames.at_end and self._messages.at_end:
                    yield at, int.from_bytes(header[5:])
