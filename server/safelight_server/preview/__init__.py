"""Previews: when one is due (`policy.py`), what it shows (`frames.py`), and making it once for all (`render.py`)."""

from safelight_server.preview.frames import Frame, RenderedPreview
from safelight_server.preview.policy import Budget, Cadence, choose_method
from safelight_server.preview.render import Decode, Renderer

__all__ = ["Budget", "Cadence", "Decode", "Frame", "RenderedPreview", "Renderer", "choose_method"]
