"""The contact sheet: a page that develops pictures in a browser, from files of this package.

It calls the server by gRPC-Web, as any page may. The files are the same for everyone
and contain no secrets, so they need no key; the calls of the page need one like any
other call.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "page"
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    # Pictures are blobs that the page makes of received bytes. Everything else comes from this server.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # browsers revalidate each time; the ETag saves the transfer
}


def page_routes() -> list[Route]:
    """The routes of the page and its files, which are read now."""
    return [
        _route("/" if path.name == "index.html" else f"/page/{path.name}", path) for path in sorted(FOLDER.iterdir())
    ]


def _route(address: str, path: Path) -> Route:
    data = path.read_bytes()
    headers = HEADERS | {"etag": f'"{hashlib.sha256(data).hexdigest()[:32]}"', "content-type": TYPES[path.suffix]}

    async def answer(request: Request) -> Response:
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        if headers["etag"] in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(data, headers=headers)

    return Route(address, answer, methods=["GET"])  # and HEAD
