"""The plug-in and the program, built once."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.clients import cpp


def require(programs: tuple[str, ...], packages: tuple[str, ...]) -> None:
    """Skips the test where a program, or what pkg-config should find, is missing."""
    cpp.require()
    missing = [name for name in programs if shutil.which(name) is None]
    missing += [name for name in packages if subprocess.run(["pkg-config", "--exists", name]).returncode]
    if missing:
        pytest.skip(f"not here: {', '.join(missing)} (tools/install-system-packages engines)")


@pytest.fixture(scope="session")
def gstreamer() -> Path:
    """The folder of the plug-in."""
    require(("gst-launch-1.0",), ("gstreamer-base-1.0", "gstreamer-video-1.0"))
    return cpp.build("-DSAFELIGHT_BUILD_GSTREAMER=ON", folder="gstreamer")


@pytest.fixture(scope="session")
def sprite_sheet() -> Path:
    """The SDL2 program."""
    require(("Xvfb",), ("sdl2",))
    return cpp.build("-DSAFELIGHT_BUILD_SDL=ON", folder="sdl") / "sprite_sheet"
