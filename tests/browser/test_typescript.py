"""Tests of the TypeScript client in a real browser, bundled as in an application, on a page of another origin."""

from __future__ import annotations

import functools
import hashlib
import subprocess
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import safelight
from playwright.async_api import Browser
from safelight_server.app.server import Running

from tests.support.http import http_server

pytestmark = pytest.mark.asyncio(loop_scope="package")
ROOT = Path(__file__).parent.parent.parent
BIN = ROOT / "node_modules" / ".bin"
SPEC = {"prompt": "a red potion", "steps": 6, "seed": 7}
DEVELOP = """async ([target, options]) => {
    const { Client, SafelightError } = await import("/client.js");
    const client = new Client(target);
    const seen = [];
    try {
        for await (const event of client.generate({ ...options, preview: { mediaType: "image/webp" } })) {
            if (event.type !== "preview" && event.type !== "picture") { seen.push([event.type]); continue; }
            const bitmap = await createImageBitmap(new Blob([event.data], { type: event.mediaType }));
            const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", event.data));
            seen.push([event.type, bitmap.width, Array.from(digest, one => one.toString(16).padStart(2, "0")).join("")]);
        }
        return seen;
    } catch (error) {
        return [error instanceof SafelightError, error.reason, Object.keys(error.fieldViolations ?? {})];
    }
}"""


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A web server with a page and the client as one ES module. A page without an origin may not call loopback."""
    client, folder = ROOT / "clients" / "typescript", tmp_path_factory.mktemp("page")
    subprocess.run([BIN / "tsc", "--project", client], check=True)
    entry, bundle = client / "dist" / "web.js", folder / "client.js"
    options = ["--bundle", "--format=esm", "--conditions=browser", f"--outfile={bundle}"]
    subprocess.run([BIN / "esbuild", entry, *options], check=True)
    (folder / "index.html").write_text('<!doctype html><link rel="icon" href="data:,"><title>app</title>')
    handler = functools.partial(SimpleHTTPRequestHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


async def develop(browser: Browser, origin: str, running: Running, **options: object) -> list[Any]:
    """The events of a generation that a page of an origin receives."""
    page = await browser.new_page()
    await page.goto(f"{origin}/")
    try:
        return await page.evaluate(DEVELOP, [f"http://{running.http_address}", SPEC | options])
    finally:
        await page.close()


async def test_a_page_of_another_origin_streams_without_a_proxy(browser, origin):
    async with http_server(http_cors_origins=origin, simulated_base_ms=50.0) as running:
        seen = await develop(browser, origin, running)
        async with safelight.Client(running.address) as client:
            picture = await client.generate("a red potion", steps=6, seed=7).picture()
    kinds = [kind for kind, *_ in seen]
    assert (kinds[0], kinds[-1]) == ("accepted", "finished")
    assert "preview" in kinds
    assert [one for one in seen if one[0] == "picture"] == [
        ["picture", picture.width_px, hashlib.sha256(picture.data).hexdigest()]
    ]


async def test_errors_of_the_server_reach_a_page_with_their_fields(browser, origin):
    async with http_server(http_cors_origins=origin) as running:
        seen = await develop(browser, origin, running, steps=9000)
    assert seen == [True, "INVALID_REQUEST", ["spec.num_inference_steps"]]


async def test_a_page_of_an_origin_that_is_not_named_may_not_call(browser, origin):
    async with http_server(http_cors_origins="https://app.example") as running:
        seen = await develop(browser, origin, running, patienceMs=0)
    assert seen == [True, "", []]
