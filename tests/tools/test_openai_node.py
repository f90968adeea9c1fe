"""The official OpenAI package for Node works unchanged against HTTP."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from tests.integration.test_edits import CLEAR
from tests.integration.test_images import PHOTO
from tests.support.http import http_server

PROGRAM = Path(__file__).parent / "openai.mjs"


async def test_pictures_streams_edits_a_refusal_and_the_models(tmp_path: Path) -> None:
    photo, mask = tmp_path / "photo.png", tmp_path / "mask.png"
    photo.write_bytes(PHOTO)
    mask.write_bytes(CLEAR)
    async with http_server() as running:
        arguments = str(PROGRAM), running.http_address, str(photo), str(mask)
        process = await asyncio.create_subprocess_exec(
            "node", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, said = await process.communicate()
    assert process.returncode == 0, said.decode()
    found = json.loads(out)
    assert found["pictures"] == ["\x89PNG", "\x89PNG"]
    assert found["seeds"] == [7, 8]
    assert found["usage"]["output_tokens"] == 2 * 16 * 16
    *partial, completed = found["events"]
    assert [event["type"] for event in partial] == ["image_generation.partial_image"] * len(partial)
    assert [event["index"] for event in partial] == list(range(len(partial)))
    assert partial
    assert completed["type"] == "image_generation.completed"
    assert {event["begins"] for event in found["events"]} == {"\x89PNG"}
    assert found["refused"] == {"kind": "BadRequestError", "status": 400, "param": "style", "code": "INVALID_REQUEST"}
    assert found["edited"] == {"pictures": ["\x89PNG"], "strength": 0.6}
    pictures = [event["image"] for event in found["edits"] if event["type"] == "image_edit.completed"]
    assert sorted(pictures) == [0, 1]
    assert found["models"] == ["simulated"]
