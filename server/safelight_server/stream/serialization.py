"""Serializes events to response messages, once for all streams of a generation.

A GenerateResponse and a WatchGenerationResponse have the same wire form, so
one serialization serves both calls.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

from safelight.v1 import generation_pb2 as pb

from safelight_server.domain.events import Event
from safelight_server.domain.picture import EncodedPicture
from safelight_server.domain.request import MediaType
from safelight_server.preview import RenderedPreview
from safelight_server.wire import event_message
from safelight_server.wire.enums import PREVIEW_METHODS

ITEM_BYTES = 128
"""Memory of an event or a piece of a picture in addition to its bytes, in CPython 3.11."""


@dataclass(frozen=True, slots=True)
class SerializedEvent:
    """A numbered state event.

    Attributes:
        ends_output: index of the output that the event ends; None: it ends none.
        is_last: whether the event is Finished.
    """

    sequence: int
    data: bytes
    ends_output: int | None
    is_last: bool

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        return len(self.data) + ITEM_BYTES


@dataclass(frozen=True, slots=True)
class SerializedArtifact:
    """A finished picture in pieces of `piece_bytes`; the last one may be shorter."""

    output_index: int
    total_bytes: int
    piece_bytes: int
    pieces: tuple[bytes, ...]

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        return sum(map(len, self.pieces)) + ITEM_BYTES * (1 + len(self.pieces))

    def piece(self, number: int, offset: int = 0) -> bytes:
        """Piece `number`, cut to begin at byte `offset` of the picture if that lies within the piece."""
        if offset <= number * self.piece_bytes:
            return self.pieces[number]
        response = pb.GenerateResponse.FromString(self.pieces[number])
        chunk = response.event.artifact_chunk
        chunk.data = chunk.data[offset - chunk.offset :]
        chunk.offset = offset
        return response.SerializeToString()

    def picture(self) -> EncodedPicture:
        """The picture, joined from its pieces."""
        chunks = [pb.GenerateResponse.FromString(piece).event.artifact_chunk for piece in self.pieces]
        first = chunks[0]
        data = b"".join(chunk.data for chunk in chunks)
        return EncodedPicture(MediaType(first.media_type), first.width_px, first.height_px, first.stride_bytes, data)


def serialize(generation: str, event: Event, sequence: int = 0) -> bytes:
    """An event as a GenerateResponse or WatchGenerationResponse."""
    message = event_message(event)
    message.sequence = sequence
    return _stamped(generation, pb.GenerateResponse(event=message))


def _stamped(generation: str, response: pb.GenerateResponse) -> bytes:
    """Adds the time and the generation's name to the event, and serializes."""
    event = response.event
    event.generation = generation
    event.event_time.seconds, event.event_time.nanos = divmod(time.time_ns(), 1_000_000_000)
    return response.SerializeToString()


def artifact(generation: str, output_index: int, picture: EncodedPicture, piece_bytes: int) -> SerializedArtifact:
    """Cuts a picture into serialized pieces; the last one has the SHA-256 of the whole."""
    total = len(picture.data)
    pieces = []
    for start in range(0, total, piece_bytes):
        response = pb.GenerateResponse()  # filled in place: a message that is put into another one is copied
        chunk = response.event.artifact_chunk
        chunk.output_index = output_index
        chunk.media_type = picture.media_type.value
        chunk.width_px, chunk.height_px = picture.width_px, picture.height_px
        chunk.stride_bytes = picture.stride_bytes
        chunk.offset, chunk.total_bytes = start, total
        chunk.data = picture.data[start : start + piece_bytes]
        if start + piece_bytes >= total:
            chunk.sha256 = hashlib.sha256(picture.data).digest()
        pieces.append(_stamped(generation, response))
    return SerializedArtifact(output_index, total, piece_bytes, tuple(pieces))


def preview(generation: str, output_index: int, rendered: RenderedPreview, num_dropped: int) -> bytes:
    """A serialized preview. Streams that dropped no frame before it share the bytes."""
    place = (generation, output_index)
    if num_dropped == 0 and place in rendered.messages:
        return rendered.messages[place]
    response, picture = pb.GenerateResponse(), rendered.picture
    message = response.event.preview
    message.output_index, message.step = output_index, rendered.step
    message.media_type = picture.media_type.value
    message.width_px, message.height_px = picture.width_px, picture.height_px
    message.stride_bytes = picture.stride_bytes
    message.method = PREVIEW_METHODS[rendered.method]
    message.num_dropped = num_dropped
    message.data = picture.data
    data = _stamped(generation, response)
    if num_dropped == 0:
        rendered.messages[place] = data
    return data
