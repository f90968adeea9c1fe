"""Tests of the add-on without a screen: the content of images, saved files, and how generations end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safelight
from numpy.typing import NDArray
from safelight.v1 import generation_pb2 as pb
from safelight_server.api.identity import new_key

from tests.blender.conftest import Blender
from tests.clients.case import SIMULATED
from tests.conftest import Start, eventually
from tests.support.certificates import self_signed

PROMPT = "a red potion"
pytestmark = pytest.mark.timeout(400)


def shown(file: Path) -> NDArray[np.uint8]:
    """The pixels that Blender wrote, with the top row first."""
    return np.rint(np.load(file)[::-1] * 255).astype(np.uint8)


async def picture(address: str, prompt: str = PROMPT, **options: Any) -> NDArray[np.uint8]:
    """The pixels that the Python client gets."""
    async with safelight.Client(address) as client:
        return (await client.generate(prompt, **options).picture()).array()


async def test_an_image_develops_and_is_saved(blender: Blender, start: Start, tmp_path: Path) -> None:
    async with start() as running:
        developed = await blender.run("develop", running.address, tmp_path)
        expected = await picture(running.address, negative_prompt="blue", seed=7, steps=40)
        reopened = await blender.run("reopen", tmp_path)
    assert developed.pop("seen") >= 3, "previews were seen, not only the picture"
    assert developed.pop("sizes") == [[128, 128]], "smaller previews are scaled"
    assert np.array_equal(shown(tmp_path / "developed.npy"), expected), "the picture, to the pixel"
    assert np.array_equal(shown(tmp_path / "reopened.npy"), expected), "the file has it"
    properties = developed["properties"]
    assert properties.pop("safelight_generation").startswith("generations/")
    assert properties == {
        "safelight_prompt": PROMPT,
        "safelight_negative_prompt": "blue",
        "safelight_seed": 7,
        "safelight_steps": 40,
    }
    assert developed["name"] == PROMPT
    assert developed["packed"] and developed["colorspace"] == "sRGB" and developed["fake_user"]
    assert reopened["properties"].items() >= properties.items()
    assert reopened["packed"] and reopened["colorspace"] == "sRGB"


async def test_a_script_waits_and_starts_from_an_image(blender: Blender, start: Start, tmp_path: Path) -> None:
    async with start() as running:
        waited = await blender.run("wait", running.address, tmp_path)
        first = await picture(running.address, seed=3)
        async with safelight.Client(running.address) as client:
            start_from = (await client.generate(PROMPT, seed=3).picture()).data
        options = {"seed": 4, "init_image": start_from, "strength": 0.5}
        second = await picture(running.address, "a blue potion", **options)
    assert np.array_equal(shown(tmp_path / "first.npy"), first)
    assert np.array_equal(shown(tmp_path / "second.npy"), second), "from the pixels of the first"
    assert waited["second"]["name"] == "a blue potion"
    assert waited["second"]["properties"]["safelight_strength"] == 0.5
    assert 0 <= waited["drawn"] < 2**31, "a seed that Blender can be given again"


async def test_what_the_server_refuses_is_told_with_its_reason_by_tls_too(
    blender: Blender, start: Start, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.json"
    key, entry = new_key("blender", "studio")
    keys.write_text(f'{{"keys": [{entry}]}}')
    certificate, private = self_signed(tmp_path)
    tls = {"tls_cert_file": certificate, "tls_key_file": private}
    async with start(api_key_file=keys, **tls, **SIMULATED) as running:
        known = await blender.run("refused", running.address, key, certificate)
        unknown = await blender.run("refused", running.address, "another-key", certificate)
    developed, too_many, empty = known["texts"]
    assert developed == ""
    assert "INVALID_REQUEST" in too_many and "spec.num_inference_steps" in too_many
    assert "prompt: say" in empty
    assert known["models"] == ["simulated"] and known["panel"] == ""
    assert known["images"] == 1, "images without pixels are gone"
    assert all("UNAUTHENTICATED" in text for text in unknown["texts"][:2])
    assert unknown["models"] == [] and unknown["panel"] == "UNAUTHENTICATED" and unknown["images"] == 0


async def test_without_a_server_it_is_an_error_in_bounded_time(blender: Blender) -> None:
    refused = await blender.run("refused", "127.0.0.1:1")
    assert "UNAVAILABLE" in refused["texts"][0]
    assert refused["panel"] == "UNAVAILABLE"


async def test_all_that_ends_a_development_reaches_the_server(blender: Blender, start: Start, tmp_path: Path) -> None:
    """The operator, deleting an image, opening a file, and disabling the add-on, which leaves no thread."""
    async with start(**SIMULATED | {"simulated_base_ms": 100}) as running:
        cancelled = await blender.run("cancel", running.address, tmp_path)
        async with safelight.Client(running.address) as client:
            states = {how: (await client.get(name)).state for how, name in cancelled["names"].items()}
        await eventually(lambda: running.inspect().streams == 0)
    assert states == dict.fromkeys(
        ("operator", "removed", "file", "disabled", "enabled again"), pb.Generation.STATE_CANCELLED
    )
    assert cancelled["reason"] == "GENERATION_CANCELLED"
    assert "safelight" not in cancelled["threads"]
    unfinished = cancelled["unfinished"]
    assert unfinished["packed"] and unfinished["properties"]["safelight_unfinished"].startswith("GENERATION_CANCELLED")


async def test_the_end_of_blender_reaches_the_server(blender: Blender, start: Start) -> None:
    async with start(**SIMULATED | {"simulated_base_ms": 100}) as running:
        left = await blender.run("leave", running.address)
        async with safelight.Client(running.address) as client:
            assert (await client.get(left["name"])).state == pb.Generation.STATE_CANCELLED
