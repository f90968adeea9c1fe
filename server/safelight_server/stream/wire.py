"""The bytes of events: serialized once, shared by all streams of a generation.

A GenerateResponse and a WatchGenerationResponse have the same wire form, so
one serialization serves both calls.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

from safelight.v1 import generation_pb2 as pb
from safelight_server.picture import Encoded
from safelight_server.preview import Rendered
from safelight_server.request import PreviewMethod

METHODS = {
    PreviewMethod.LINEAR: pb.PREVIEW_METHOD_LINEAR,
    PreviewMethod.TINY_DECODER: pb.PREVIEW_METHOD_TINY_DECODER,
    PreviewMethod.FULL_DECODER: pb.PREVIEW_METHOD_FULL_DECODER,
}


@dataclass(frozen=True, slots=True)
class State:
    """A numbered state event.

    Attributes:
        ends_output: the output that it ends, if any.
        is_last: it is Finished.
    """

    sequence: int
    data: bytes
    ends_output: int | None
    is_last: bool


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished picture in pieces of `piece_bytes`; the last is what is left."""

    output_index: int
    total_bytes: int
    piece_bytes: int
    pieces: tuple[bytes, ...]

    def piece(self, number: int, offset: int = 0) -> bytes:
        """Piece `number`, from byte `offset` of the picture on if that lies within it."""
        if offset <= number * self.piece_bytes:
            return self.pieces[number]
        response = pb.GenerateResponse.FromString(self.pieces[number])
        chunk = response.event.artifact_chunk
        chunk.data = chunk.data[offset - chunk.offset :]
        chunk.offset = offset
        return response.SerializeToString()


def serialize(generation: str, event: pb.GenerationEvent) -> bytes:
    """An event as a response of either stream, stamped with the time and the generation's name."""
    event.generation = generation
    event.event_time.seconds, event.event_time.nanos = divmod(time.time_ns(), 1_000_000_000)
    return pb.GenerateResponse(event=event).SerializeToString()


def artifact(generation: str, output_index: int, picture: Encoded, piece_bytes: int) -> Artifact:
    """A picture, cut and serialized; the last piece has its hash."""
    total = len(picture.data)
    pieces = []
    for start in range(0, total, piece_bytes):
        event = pb.GenerationEvent()
        chunk = event.artifact_chunk
        chunk.output_index = output_index
        chunk.media_type = picture.media_type.value
        chunk.width_px, chunk.height_px = picture.width_px, picture.height_px
        chunk.stride_bytes = picture.stride_bytes
        chunk.offset, chunk.total_bytes = start, total
        chunk.data = picture.data[start : start + piece_bytes]
        if start + piece_bytes >= total:
            chunk.sha256 = hashlib.sha256(picture.data).digest()
        pieces.append(serialize(generation, event))
    return Artifact(output_index, total, piece_bytes, tuple(pieces))


def preview(generation: str, rendered: Rendered, num_dropped: int) -> bytes:
    """A preview; all streams that passed over as many share the bytes where that is none."""
    if num_dropped == 0 and rendered.message is not None:
        return rendered.message
    event, picture = pb.GenerationEvent(), rendered.picture
    message = event.preview
    message.output_index, message.step = rendered.output_index, rendered.step
    message.media_type = picture.media_type.value
    message.width_px, message.height_px = picture.width_px, picture.height_px
    message.stride_bytes = picture.stride_bytes
    message.method = METHODS[rendered.method]
    message.num_dropped = num_dropped
    message.data = picture.data
    data = serialize(generation, event)
    if num_dropped == 0:
        rendered.message = data
    return data
