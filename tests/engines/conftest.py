"""Fixtures: the GStreamer plug-in and the SDL program, built once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.clients import toolchains
from tools.clients import cpp


def require(program: str, engine: str = "") -> None:
    """Skips the test if a program is missing, or packages of an engine that pkg-config must find."""
    toolchains.require("cpp")
    missing = cpp.lacks(*cpp.ENGINES.get(engine, ()))
    if shutil.which(program) is None:
        missing.append(program)
    if missing:
        pytest.skip(f"not here: {', '.join(missing)} (tools/install-system-packages engines)")


@pytest.fixture(scope="session")
def gstreamer() -> Path:
    """The folder of the plug-in."""
    require("gst-launch-1.0", "GSTREAMER")
    return cpp.build()


@pytest.fixture(scope="session")
def sprite_sheet() -> Path:
    """The SDL2 program."""
    require("Xvfb", "SDL")
    return cpp.build() / "sprite_sheet"


@pytest.fixture(scope="session")
def love() -> Path:
    """The folder of the C client's library; skips the test without LÖVE or a virtual screen."""
    require("Xvfb")
    require("love")
    return cpp.build()
