"""`safelight demo` against a server of this process."""

from __future__ import annotations

import io
from contextlib import asynccontextmanager

from PIL import Image
from rich.console import Console
from safelight_server.cli import demo
from safelight_server.settings import load

from tests.conftest import serving_here
from tests.support.http import SIMULATED, simulate_adapters


async def test_each_picture_is_developed_without_adapters_and_with_them(tmp_path, monkeypatch):
    simulate_adapters(monkeypatch, tmp_path / "adapters", "pixel")
    out, told = tmp_path / "out", io.StringIO()
    async with serving_here(**SIMULATED) as running:

        @asynccontextmanager
        async def here(settings):
            yield running.address

        monkeypatch.setattr(demo, "_server", here)
        await demo.demo(load(), out, Console(file=told, width=200), {"pixel": 0.8})
    folders = sorted(path.name for path in out.iterdir() if path.is_dir())
    assert len(folders) == 2 * len(demo.PROMPTS)
    assert [f"{name}-pixel" for name in folders[::2]] == folders[1::2]
    assert all((out / name / "picture.png").is_file() for name in folders)
    with Image.open(out / "without-and-with.png") as sheet:
        assert sheet.size == (6 * 132 - 4, 2 * 132 - 4)
    assert "12 pictures in" in told.getvalue()
