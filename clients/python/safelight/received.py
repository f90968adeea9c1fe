"""How far a generation was received: turns messages into events, and remembers where another connection resumes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from safelight.events import Accepted, Degradation, Event, Finished, Origin, Picture, Preview, Progress
from safelight.pixels import RAW
from safelight.v1 import generation_pb2 as pb


@dataclass(slots=True)
class Received:
    """The state of receiving one generation, over all connections.

    Attributes:
        at: index of the current server.
        preview: the policy of the stream; raw previews have its row order.
        num_events: number of events received on all connections.
        finished: whether the last event was received.
        parts: the received bytes of each picture, by output.
    """

    at: int
    preview: pb.PreviewPolicy | None = None
    name: str = ""
    num_events: int = 0
    finished: bool = False
    durable: bool = False
    sequence: int = 0
    seeds: tuple[int, ...] = ()
    bottom_up: bool = False
    parts: dict[int, bytearray] = field(default_factory=dict)

    def watch(self) -> pb.WatchGenerationRequest:
        """The request that resumes where the last connection ended."""
        return pb.WatchGenerationRequest(
            name=self.name,
            after_sequence=self.sequence,
            preview=self.preview,
            artifact_offsets=[
                pb.ArtifactOffset(output_index=index, offset=len(part)) for index, part in self.parts.items()
            ],
        )

    def take(self, event: pb.GenerationEvent) -> Event | None:
        """Converts a message to an event for the caller; None for an incomplete picture and for internal messages.

        Raises:
            ValueError: a picture arrived damaged.
        """
        self.name = event.generation
        self.num_events += 1
        self.finished = event.WhichOneof("event") == "finished"
        self.sequence = max(self.sequence, event.sequence)
        match event.WhichOneof("event"):
            case "accepted":
                return self._accepted(event.accepted)
            case "progress":
                at = event.progress
                return Progress(at.output_index, at.step, at.num_steps, at.batch_size)
            case "preview":
                return self._preview(event.preview)
            case "artifact_chunk":
                return self._artifact(event.artifact_chunk)
            case "finished" if not event.finished.status.code:
                origins = tuple(_origin(result) for result in event.finished.cache_results)
                given_up = tuple(map(_degradation, event.finished.degradations))
                return Finished(event.generation, event.finished.usage, event.finished.timings, origins, given_up)
        return None

    def _accepted(self, accepted: pb.Accepted) -> Accepted:
        self.seeds = tuple(output.seed for output in accepted.spec.outputs)
        self.durable = accepted.durability == pb.Accepted.DURABILITY_REPLICATED
        self.bottom_up = _is_bottom_up(accepted.encoding)
        warnings = {warning.reason: warning.message for warning in accepted.warnings}
        size = accepted.spec.width_px, accepted.spec.height_px
        return Accepted(self.name, self.seeds, accepted.numerics_id, self.durable, warnings, *size)

    def _preview(self, seen: pb.Preview) -> Preview:
        accept = self.preview.accept if self.preview is not None else ()
        first_raw = next((encoding for encoding in accept if encoding.media_type == RAW), None)
        return Preview(
            seen.output_index,
            seen.step,
            seen.media_type,
            seen.width_px,
            seen.height_px,
            seen.data,
            seen.stride_bytes,
            seen.media_type == RAW and first_raw is not None and _is_bottom_up(first_raw),
            seen.num_dropped,
        )

    def _artifact(self, chunk: pb.ArtifactChunk) -> Picture | None:
        index = chunk.output_index
        part = self.parts.setdefault(index, bytearray())
        if chunk.offset != len(part):
            return None
        part += chunk.data
        if len(part) < chunk.total_bytes or not chunk.sha256:
            return None
        if hashlib.sha256(part).digest() != chunk.sha256:
            raise ValueError(f"output {index} arrived damaged")
        seed = self.seeds[index] if index < len(self.seeds) else 0
        sizes = (chunk.width_px, chunk.height_px)
        stride, data = chunk.stride_bytes, bytes(part)
        return Picture(index, chunk.media_type, *sizes, seed, data, stride, self.bottom_up, self.name)


def _is_bottom_up(encoding: pb.PixelEncoding) -> bool:
    return encoding.row_order == pb.PixelEncoding.ROW_ORDER_BOTTOM_UP


def _origin(result: pb.CacheResult) -> Origin:
    name = pb.CacheResult.Disposition.Name(result.disposition).removeprefix("DISPOSITION_").lower()
    return Origin(name, result.similarity, result.source, result.num_steps_skipped, result.numerics_id)


def _degradation(given_up: pb.Degradation) -> Degradation:
    kind = pb.Degradation.Kind.Name(given_up.kind).removeprefix("KIND_").lower()
    return Degradation(kind, given_up.requested, given_up.applied)
