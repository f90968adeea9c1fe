"""Previews: which step is due for a stream (`policy.py`), and making each preview once for all (`frames.py`)."""

from safelight_server.preview.frames import Decode, Frame, FrameFeed, RenderedPreview
from safelight_server.preview.policy import Budget, Cadence, choose_method

__all__ = ["Budget", "Cadence", "Decode", "Frame", "FrameFeed", "RenderedPreview", "choose_method"]
