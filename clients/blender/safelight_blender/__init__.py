"""Safelight for Blender: an image datablock shows the previews of a picture while it is computed."""

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
"""Folder with the Safelight client and the packages it needs, made by `tools/blender_addon.py`."""


def register() -> None:
    """Called by Blender when the add-on is enabled. The receiver's thread starts at its first use."""
    # First on the path, since the system's protobuf may be older than the client's stubs.
    sys.path.insert(0, MODULES)
    from . import interface

    interface.register()


def unregister() -> None:
    """Called by Blender when the add-on is disabled and at exit. Cancels all running generations at the server."""
    from . import developments, interface

    developments.close()
    interface.unregister()
    if MODULES in sys.path:
        sys.path.remove(MODULES)
