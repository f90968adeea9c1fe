"""The SDL2 program of the C client, on a virtual screen."""

from __future__ import annotations

import re
from pathlib import Path

from tests.clients.case import ROOT
from tests.conftest import Start
from tests.engines.sheet import develop

SOURCE = ROOT / "clients/cpp/examples/sprite_sheet.c"


async def test_a_sprite_sheet_develops(sprite_sheet: Path, start: Start, tmp_path: Path) -> None:
    [listed] = re.findall(r"prompts\[NUM_SPRITES\] = \{(.*?)\};", SOURCE.read_text(), re.DOTALL)
    prompts = re.findall(r'"(.*?)"', listed)
    assert len(prompts) == 8
    await develop(start, tmp_path, "sdl", prompts, sprite_sheet, SDL_AUDIODRIVER="dummy")
