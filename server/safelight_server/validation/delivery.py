"""How pixels travel: encodings, preview policies, and what a lost stream means."""

from __future__ import annotations

from safelight_server.catalog.catalog import Pipeline
from safelight_server.domain.request import DisconnectPolicy, MediaType, PixelEncoding, PreviewMethod, PreviewPolicy
from safelight_server.validation.draft import DisconnectDraft, EncodingDraft, PreviewDraft, Unknown
from safelight_server.validation.violations import Violations, listed, shown

MIN_EDGE_PX = 8
MIN_BYTES_PER_SECOND = 1024
MAX_ROW_ALIGNMENT = 4096
MAX_ACCEPTED = 16
LOSSY = (MediaType.JPEG, MediaType.WEBP)


def encoding_of(draft: EncodingDraft, field: str, faults: Violations) -> PixelEncoding:
    """The encoding that a draft at `field` means."""
    media_type = _media_type(draft.media_type)
    if media_type is None:
        faults.add(f"{field}.media_type", f"{shown(draft.media_type)} is not offered; there is {listed(MediaType)}")
        return PixelEncoding()
    raw, default = media_type is MediaType.RAW_RGBA8, PixelEncoding(media_type)
    quality, alignment = draft.quality, draft.row_alignment_bytes
    if quality is not None and faults.check(
        media_type in LOSSY, f"{field}.quality", f"{media_type} has none; leave it out or use {listed(LOSSY)}"
    ):
        faults.check(1 <= quality <= 100, f"{field}.quality", "must be from 1 to 100")
    only_raw = f"only {MediaType.RAW_RGBA8} has it; leave it out"
    if alignment is not None and faults.check(raw, f"{field}.row_alignment_bytes", only_raw):
        power = 4 <= alignment <= MAX_ROW_ALIGNMENT and alignment & (alignment - 1) == 0
        faults.check(power, f"{field}.row_alignment_bytes", f"must be a power of two from 4 to {MAX_ROW_ALIGNMENT}")
    if draft.bottom_up is not None and faults.check(raw, f"{field}.row_order", only_raw):
        known = not isinstance(draft.bottom_up, Unknown)
        faults.check(known, f"{field}.row_order", "must be ROW_ORDER_TOP_DOWN or ROW_ORDER_BOTTOM_UP")
    return PixelEncoding(
        media_type,
        default.quality if quality is None else quality,
        default.row_alignment_bytes if alignment is None else alignment,
        draft.bottom_up is True,
    )


def preview_of(draft: PreviewDraft, pipeline: Pipeline, faults: Violations) -> PreviewPolicy:
    """The policy that a draft means; an empty one is the default."""
    method = PreviewMethod.AUTO if draft.method is None else draft.method
    if method is PreviewMethod.NONE:
        others = [
            name for name in PreviewDraft.__slots__ if name != "method" and getattr(draft, name) not in (None, ())
        ]
        faults.check(
            not others, "preview.method", f"PREVIEW_METHOD_NONE contradicts {listed(map(_proto_name, others))}"
        )
        return PreviewPolicy(method=method)
    if isinstance(method, Unknown):
        faults.add("preview.method", f"{method.number} is no method of this server; see Model.preview_methods")
        method = PreviewMethod.AUTO
    if method is PreviewMethod.TINY_DECODER and not pipeline.has_preview_decoder:
        faults.add("preview.method", f"models/{pipeline.name} has no PREVIEW_METHOD_TINY_DECODER; use another or AUTO")
    every, interval_s = draft.every_n_steps, draft.min_interval_s
    edge, rate = draft.max_edge_px, draft.max_bytes_per_second
    faults.check(every is None or every >= 1, "preview.every_n_steps", "must be at least 1")
    faults.check(interval_s is None or interval_s > 0, "preview.min_interval", "must be a Duration of more than 0")
    faults.check(edge is None or edge >= MIN_EDGE_PX, "preview.max_edge_px", f"must be at least {MIN_EDGE_PX}")
    faults.check(
        rate is None or rate >= MIN_BYTES_PER_SECOND,
        "preview.max_bytes_per_second",
        f"must be at least {MIN_BYTES_PER_SECOND}",
    )
    return PreviewPolicy(
        encoding=_accepted(draft.accept, faults),
        method=method,
        max_edge_px=edge,
        every_n_steps=1 if every is None else every,
        min_interval_s=0.0 if interval_s is None else interval_s,
        max_bytes_per_second=rate,
    )


def disconnect_of(draft: DisconnectDraft, default_s: float, most_s: float, faults: Violations) -> DisconnectPolicy:
    """What a lost stream means; absent: stop, and keep the state for `default_s`."""
    detach = draft.detach is True
    known = not isinstance(draft.detach, Unknown)
    faults.check(known, "disconnect.action", "must be ACTION_CANCEL or ACTION_DETACH")
    grace_s = draft.resume_grace_s
    if grace_s is None:
        return DisconnectPolicy(detach, default_s)
    field = "disconnect.resume_grace"
    if faults.check(not detach, field, "has no meaning with ACTION_DETACH; leave one of them out"):
        faults.check(0 <= grace_s <= most_s, field, f"must be a Duration from 0 to {most_s:g} s")
    return DisconnectPolicy(detach, grace_s)


def _accepted(drafts: tuple[EncodingDraft, ...], faults: Violations) -> PixelEncoding:
    """The first that the server has; ones it has not may stand before it, faulty ones may not."""
    if not drafts:
        return PreviewPolicy().encoding
    if len(drafts) > MAX_ACCEPTED:
        faults.add("preview.accept", f"has more than {MAX_ACCEPTED} entries; leave some out")
        return PreviewPolicy().encoding
    known = [at for at, draft in enumerate(drafts) if _media_type(draft.media_type) is not None]
    faults.check(bool(known), "preview.accept", f"none of these is offered; there is {listed(MediaType)}")
    encodings = [encoding_of(drafts[at], f"preview.accept[{at}]", faults) for at in known]
    return encodings[0] if encodings else PreviewPolicy().encoding


def _media_type(name: str) -> MediaType | None:
    try:
        return MediaType(name)
    except ValueError:
        return None


def _proto_name(name: str) -> str:
    return "min_interval" if name == "min_interval_s" else name
