"""The files of the page: their types and headers, and that unchanged files are not sent again."""

from __future__ import annotations

import re

import pytest

from tests.support.http import client, http_server

TYPES = {
    "/": "text/html; charset=utf-8",
    "/page/page.css": "text/css; charset=utf-8",
    "/page/main.js": "text/javascript; charset=utf-8",
    "/page/messages.js": "text/javascript; charset=utf-8",
    "/page/icon.svg": "image/svg+xml",
}


@pytest.fixture
async def http():
    async with http_server() as running, client(running) as opened:
        yield opened


async def test_files_have_their_types_and_nothing_from_elsewhere(http):
    for path, kind in TYPES.items():
        response = await http.get(path)
        assert (response.status_code, response.headers["content-type"]) == (200, kind)
        assert response.headers["x-content-type-options"] == "nosniff"
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none';")
        assert "unsafe" not in policy and "http" not in policy and "*" not in policy


async def test_head_is_get_without_the_body(http):
    got, head = await http.get("/"), await http.head("/")
    assert (head.status_code, head.content) == (200, b"")
    same = ("content-length", "content-type", "etag", "content-security-policy")
    assert [head.headers[name] for name in same] == [got.headers[name] for name in same]


async def test_a_file_that_has_not_changed_is_not_sent_again(http):
    etag = (await http.get("/page/main.js")).headers["etag"]
    for known in (etag, f'"other", W/{etag}', "*"):
        again = await http.get("/page/main.js", headers={"if-none-match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    assert (await http.get("/page/main.js", headers={"if-none-match": '"other"'})).status_code == 200


async def test_there_is_nothing_else(http):
    for path in ("/page/", "/page/index.html", "/page/../static.py", "/page/%2e%2e/static.py", "/page/nothing.js"):
        assert (await http.get(path)).status_code == 404
    assert (await http.post("/")).status_code == 405


async def test_the_page_has_no_script_or_style_of_its_own(http):
    text = (await http.get("/")).text
    assert re.findall(r"<style|<script(?! type=\"module\" src=\"/page/)|\sstyle=|\son\w+=|https?:", text) == []
