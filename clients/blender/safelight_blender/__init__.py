"""Safelight for Blender: a prompt becomes an image datablock that develops while Blender goes on."""

import sys
from pathlib import Path

bl_info = {
    "name": "Safelight",
    "description": "Text to image on a Safelight server: an image that develops while you watch",
    "author": "The Safelight project",
    "version": (0, 1, 0),
    "blender": (3, 4, 0),
    "location": "Image Editor, Shader Editor and 3D View > Sidebar > Safelight",
    "category": "Paint",
}

MODULES = str(Path(__file__).parent / "modules")
"""The Safelight client and what it needs, as `tools/blender_addon.py` packs them."""


def register() -> None:
    """Called by Blender where the add-on is enabled. The thread is started at its first use."""
    # First on the path: the system's protobuf may be older than the client's stubs.
    sys.path.insert(0, MODULES)
    from . import interface

    interface.register()


def unregister() -> None:
    """Called by Blender where the add-on is disabled, and at its end. Cancels what develops, at the server."""
    from . import developments, interface

    developments.close()
    interface.unregister()
    if MODULES in sys.path:
        sys.path.remove(MODULES)
