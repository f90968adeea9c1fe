"""The contact sheet in a real browser, with the real model."""

from __future__ import annotations

import pytest
from playwright.async_api import expect

from tests.browser.conftest import visit

pytestmark = pytest.mark.asyncio(loop_scope="package")
POTION = "a glowing red potion on a dark background"


async def test_pictures_develop_side_by_side(browser, server):
    async with visit(browser, server) as seen:
        await seen.develop(POTION, 3, steps="12", seed="100")
        await expect(seen.page.locator("#sheet > li")).to_have_count(3)
        for at in range(3):
            card = seen.card(at)
            await expect(card.locator(".state")).to_have_text("Finished")
            await expect(card.locator("dl")).to_contain_text(f"Seed{100 + at}")
            await expect(card.locator("dl")).to_contain_text("First preview")
            await expect(card.locator("dl")).to_contain_text("Steps saved0 of 12")
            await expect(card.locator("dl")).to_contain_text("Compute")
            assert await card.locator("img").evaluate("image => [image.naturalWidth, image.naturalHeight]") == [
                128,
                128,
            ]
        await expect(seen.page.get_by_role("img", name=f"Finished picture: {POTION}")).to_have_count(3)
        tops = {(await seen.card(at).bounding_box())["y"] for at in range(3)}
        assert len(tops) == 1, "side by side"
