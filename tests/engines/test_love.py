"""Tests of `clients/cpp/love` in the game engine LÖVE on a virtual screen."""

from __future__ import annotations

import re
from pathlib import Path

from tests.clients.case import ROOT
from tests.conftest import Start
from tests.engines.sheet import develop
from tools.clients import cpp

GAME = ROOT / "clients/cpp/love"


async def test_a_sprite_sheet_develops(love: Path, start: Start, tmp_path: Path) -> None:
    [listed] = re.findall(r"prompts = \{(.*?)\n\}", (GAME / "main.lua").read_text(), re.DOTALL)
    prompts = re.findall(r'"(.*?)"', listed)
    assert len(prompts) == 8
    library = str(love / "libsafelight.so.1")
    await develop(start, tmp_path, "love", prompts, "love", GAME, SAFELIGHT_LIBRARY=library, LIBGL_ALWAYS_SOFTWARE="1")


def test_its_declarations_are_those_of_the_header() -> None:
    """LuaJIT does not check C declarations: with a wrong one it crashes."""

    def declared(text: str) -> set[str]:
        functions = re.findall(r"^(?:SAFELIGHT_API )?([\w *]+?\w+\([^;{]*?\));", text, re.MULTILINE)
        return {" ".join(one.replace("safelight_state ", "int ").split()) for one in functions}

    [lua] = re.findall(r"ffi\.cdef \[\[(.*?)\]\]", (GAME / "safelight.lua").read_text(), re.DOTALL)
    header = declared((cpp.SOURCE / "include/safelight.h").read_text())
    assert len(declared(lua)) > 20
    assert declared(lua) <= header
