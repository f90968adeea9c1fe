"""Previews: when one is due (`policy.py`), and making it at most once however many watch (`render.py`)."""

from safelight_server.preview.policy import Budget, Cadence, choose_method
from safelight_server.preview.render import Frame, Rendered, Renderer

__all__ = ["Budget", "Cadence", "Frame", "Rendered", "Renderer", "choose_method"]
