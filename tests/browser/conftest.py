"""Fixtures: Debian's Chromium, and pages that may connect only to their server."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright, expect
from safelight_server.app.server import Running

from load_tests.ports import free_port
from tests.conftest import serving_here

PAGE_TIMEOUT_MS = 30_000
expect.set_options(timeout=PAGE_TIMEOUT_MS)  # it has a limit of its own, of five seconds


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def browser() -> AsyncIterator[Browser]:
    chromium = shutil.which("chromium")
    assert chromium, "chromium is needed: tools/install-system-packages"
    # Chromium makes a socket in its temporary folder. Socket paths have at most 107 bytes, so it must not be deep.
    with tempfile.TemporaryDirectory(prefix="safelight-", dir="/tmp") as folder:
        async with async_playwright() as playwright:
            opened = await playwright.chromium.launch(
                executable_path=chromium,
                args=["--no-sandbox"],  # Chromium has no sandbox as root; the pages are trusted
                env=os.environ | {"TMPDIR": folder},
            )
            yield opened
            await opened.close()


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def server() -> AsyncIterator[Running]:
    """A running server with the real model."""
    async with serving_here(http_port=free_port()) as running:
        yield running


class Visit:
    """An open page.

    Attributes:
        page: Playwright's page.
        requests: method and address of all its requests.
        complaints: errors that the browser reported: exceptions, failed requests, violations of the page's policy.
    """

    def __init__(self, page: Page, origin: str) -> None:
        self.page = page
        self.origin = origin
        self.requests: list[tuple[str, str]] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requests.append((request.method, request.url)))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda line: self.complaints.append(line.text) if line.type != "log" else None)

    def card(self, at: int) -> Any:
        """The card of a picture, by its position in the sheet."""
        return self.page.locator("#sheet > li").nth(at)

    async def develop(self, prompt: str, count: int = 1, **fields: str) -> None:
        """Fills in the form and sends it."""
        await self.page.get_by_label("Prompt").fill(prompt)
        await self.page.get_by_role("combobox", name="Pictures").select_option(str(count))
        for name, value in fields.items():
            await self.page.locator(f"#{name}").fill(value)
        await self.page.get_by_role("button", name="Develop", exact=True).click()


@asynccontextmanager
async def visit(browser: Browser, address: str, **options: Any) -> AsyncIterator[Visit]:
    """Opens the page of the server at HOST:PORT in a new profile. It must call no other host and report no error."""
    context = await browser.new_context(**options)
    context.set_default_timeout(PAGE_TIMEOUT_MS)
    try:
        page = await context.new_page()
        origin = f"http://{address}"
        seen = Visit(page, origin)
        await page.goto(f"{origin}/")
        yield seen
        assert [url for _, url in seen.requests if not url.startswith((f"{origin}/", "blob:"))] == []
        assert seen.complaints == []
    finally:
        await context.close()
