"""Checks how pixels are sent: encodings, preview policies, and what happens when the stream breaks."""

from __future__ import annotations

from collections.abc import Sequence

from safelight.v1 import generation_pb2 as pb

from safelight_server.catalog.pipeline import Pipeline
from safelight_server.domain.ktx2 import TextureFormat
from safelight_server.domain.request import DisconnectPolicy, MediaType, PixelEncoding, PreviewMethod, PreviewPolicy
from safelight_server.validation.violations import Violations, listed, shown
from safelight_server.wire.enums import BOTTOM_UP, DETACH, PREVIEW_METHODS, TEXTURE_FORMATS, from_number
from safelight_server.wire.times import seconds

MIN_EDGE_PX = 8
MIN_BYTES_PER_SECOND = 1024
MAX_ROW_ALIGNMENT = 4096
MAX_ACCEPTED = 16
LOSSY = (MediaType.JPEG, MediaType.WEBP)
ROWS = (MediaType.RAW_RGBA8, MediaType.KTX2)


def check_encoding(message: pb.PixelEncoding, field: str, faults: Violations) -> PixelEncoding:
    """Checks the PixelEncoding message at the path `field` of a request."""
    media_type = _media_type(message.media_type)
    if media_type is None:
        faults.add(f"{field}.media_type", f"{shown(message.media_type)} is not offered; there is {listed(MediaType)}")
        return PixelEncoding()
    is_raw = media_type is MediaType.RAW_RGBA8
    only_raw = f"only {MediaType.RAW_RGBA8} has it; leave it out"
    quality = row_alignment_bytes = None
    if message.HasField("quality"):
        quality = message.quality
        if faults.check(
            media_type in LOSSY, f"{field}.quality", f"{media_type} has none; leave it out or use {listed(LOSSY)}"
        ):
            faults.check(1 <= quality <= 100, f"{field}.quality", "must be from 1 to 100")
    if message.HasField("row_alignment_bytes"):
        row_alignment_bytes = message.row_alignment_bytes
        if faults.check(is_raw, f"{field}.row_alignment_bytes", only_raw):
            faults.check(
                4 <= row_alignment_bytes <= MAX_ROW_ALIGNMENT and row_alignment_bytes.bit_count() == 1,
                f"{field}.row_alignment_bytes",
                f"must be a power of two from 4 to {MAX_ROW_ALIGNMENT}",
            )
    bottom_up = from_number(BOTTOM_UP, message.row_order, default=False)
    if message.row_order:
        ordered = f"only {listed(ROWS)} have it; leave it out"
        if faults.check(media_type in ROWS, f"{field}.row_order", ordered):
            known = bottom_up is not None
            faults.check(known, f"{field}.row_order", "must be ROW_ORDER_TOP_DOWN or ROW_ORDER_BOTTOM_UP")
    texture_format = from_number(TEXTURE_FORMATS, message.texture_format, default=TextureFormat.BC1)
    only_ktx = f"only {MediaType.KTX2} has it; leave it out"
    if message.texture_format and faults.check(media_type is MediaType.KTX2, f"{field}.texture_format", only_ktx):
        known = texture_format is not None
        faults.check(known, f"{field}.texture_format", "must be TEXTURE_FORMAT_BC1 or TEXTURE_FORMAT_BC7")
    default = PixelEncoding(media_type)
    return PixelEncoding(
        media_type,
        default.quality if quality is None else quality,
        default.row_alignment_bytes if row_alignment_bytes is None else row_alignment_bytes,
        bottom_up is True,
        texture_format or TextureFormat.BC1,
    )


def check_preview(message: pb.PreviewPolicy, pipeline: Pipeline, faults: Violations) -> PreviewPolicy:
    """Checks a PreviewPolicy message; an empty one is the default policy."""
    method = from_number(PREVIEW_METHODS, message.method, default=PreviewMethod.AUTO)
    if method is PreviewMethod.NONE:
        others = [field.name for field, _ in message.ListFields() if field.name != "method"]
        faults.check(not others, "preview.method", f"PREVIEW_METHOD_NONE contradicts {listed(others)}")
        return PreviewPolicy(method=method)
    if method is None:
        faults.add("preview.method", f"{message.method} is unknown; use one of Model.preview_methods")
        method = PreviewMethod.AUTO
    if method is PreviewMethod.TINY_DECODER and not pipeline.has_preview_decoder:
        faults.add("preview.method", f"models/{pipeline.name} has no PREVIEW_METHOD_TINY_DECODER; use another or AUTO")
    every_n_steps = message.every_n_steps if message.HasField("every_n_steps") else 1
    faults.check(every_n_steps >= 1, "preview.every_n_steps", "must be at least 1")
    min_interval_s = 0.0
    if message.HasField("min_interval"):
        min_interval_s = seconds(message.min_interval)
        faults.check(min_interval_s > 0, "preview.min_interval", "must be a Duration of more than 0")
    max_edge_px = message.max_edge_px if message.HasField("max_edge_px") else None
    if max_edge_px is not None:
        faults.check(max_edge_px >= MIN_EDGE_PX, "preview.max_edge_px", f"must be at least {MIN_EDGE_PX}")
    max_bytes_per_second = message.max_bytes_per_second if message.HasField("max_bytes_per_second") else None
    if max_bytes_per_second is not None:
        enough = max_bytes_per_second >= MIN_BYTES_PER_SECOND
        faults.check(enough, "preview.max_bytes_per_second", f"must be at least {MIN_BYTES_PER_SECOND}")
    return PreviewPolicy(
        encoding=_first_offered(message.accept, faults),
        method=method,
        max_edge_px=max_edge_px,
        every_n_steps=every_n_steps,
        min_interval_s=min_interval_s,
        max_bytes_per_second=max_bytes_per_second,
    )


def check_disconnect(
    message: pb.DisconnectPolicy, default_grace_s: float, max_grace_s: float, faults: Violations
) -> DisconnectPolicy:
    """Checks a DisconnectPolicy message. Default: cancel `default_grace_s` after the last stream was lost."""
    detach = from_number(DETACH, message.action, default=False)
    faults.check(detach is not None, "disconnect.action", "must be ACTION_CANCEL or ACTION_DETACH")
    if not message.HasField("resume_grace"):
        return DisconnectPolicy(detach is True, default_grace_s)
    grace_s, field = seconds(message.resume_grace), "disconnect.resume_grace"
    if faults.check(not detach, field, "has no meaning with ACTION_DETACH; leave one of them out"):
        faults.check(0 <= grace_s <= max_grace_s, field, f"must be a Duration from 0 to {max_grace_s:g} s")
    return DisconnectPolicy(detach is True, grace_s)


def _first_offered(accept: Sequence[pb.PixelEncoding], faults: Violations) -> PixelEncoding:
    """The first of the accepted encodings that this server offers.

    Unknown media types are skipped, since a newer version may have them. A known media type with a fault is refused at
    any position.
    """
    default = PreviewPolicy().encoding
    if not accept:
        return default
    if len(accept) > MAX_ACCEPTED:
        faults.add("preview.accept", f"has more than {MAX_ACCEPTED} entries; leave some out")
        return default
    offered = [index for index, entry in enumerate(accept) if _media_type(entry.media_type) is not None]
    faults.check(bool(offered), "preview.accept", f"none of these is offered; there is {listed(MediaType)}")
    encodings = [check_encoding(accept[index], f"preview.accept[{index}]", faults) for index in offered]
    for index, encoding in zip(offered, encodings, strict=True):
        quick = encoding.texture_format is not TextureFormat.BC7
        field = f"preview.accept[{index}].texture_format"
        faults.check(quick, field, "takes too long to make for previews; use TEXTURE_FORMAT_BC1")
    return encodings[0] if encodings else default


def _media_type(name: str) -> MediaType | None:
    try:
        return MediaType(name)
    except ValueError:
        return None
