"""The routes of HTTP and what they share: checks of host and origin, CORS, and one form of errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from email.utils import formatdate
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from safelight_server.api.images import ImageCalls
from safelight_server.api.service import GENERATION_SERVICE, MODEL_SERVICE
from safelight_server.catalog.catalog import Catalog
from safelight_server.http.calls import BodyReader, Calls, Endpoint, Fail, Method, respond_error
from safelight_server.http.context import Rpcs
from safelight_server.http.edits import EditReader, ImageEdits
from safelight_server.http.errors import refusal_response
from safelight_server.http.grpc_web import GrpcWebMethod, send_status
from safelight_server.http.images import ImageGenerations, send_error
from safelight_server.http.models import ModelListing
from safelight_server.http.static import page_routes
from safelight_server.settings import is_loopback

WEB_SERVICES = (GENERATION_SERVICE, MODEL_SERVICE)
"""The services that pages may call by gRPC-Web; those for administrators are not among them."""
EXPOSED = ("retry-after", "x-should-retry")
"""Headers of answers that pages of other origins may read."""


def build_app(
    rpcs: Rpcs,
    catalog: Catalog,
    calls: Calls,
    uploads: ImageCalls,
    healthy: Callable[[], bool],
    *,
    max_text_bytes: int,
    cors_origins: Sequence[str] = (),
    only_loopback: bool = False,
) -> ASGIApp:
    """The ASGI application.

    Args:
        healthy: whether the server takes work, for load balancers.
        uploads: takes the pictures that requests bring.
        max_text_bytes: bound on the parts of a form that are not files.
        cors_origins: origins whose pages may call; "*" for all.
        only_loopback: whether requests that name another host are refused.
    """
    images, models = ImageGenerations(rpcs, catalog), ModelListing(rpcs)
    edits, edit_reader = ImageEdits(images, uploads, catalog), EditReader(uploads, max_text_bytes, cors_origins)

    def route(
        verb: str, path: str, method: Method, fail: Fail = respond_error, reader: BodyReader | None = None
    ) -> Route:
        return Route(path, Endpoint(calls, path, method, fail, reader), methods=[verb])

    routes = [
        route("GET", "/v1/models", models.list_models),
        route("GET", "/v1/models/{model}", models.get_model),
        route("POST", "/v1/images/generations", images.generate, send_error),
        route("POST", "/v1/images/edits", edits.edit, send_error, edit_reader),
        *(
            route("POST", f"/{service}/{name}", GrpcWebMethod(handler), send_status)
            for service in WEB_SERVICES
            for name, handler in rpcs.of(service).items()
        ),
    ]
    return front(routes, healthy, cors_origins, only_loopback)


def front(
    routes: Sequence[Route], healthy: Callable[[], bool], cors_origins: Sequence[str], only_loopback: bool
) -> ASGIApp:
    """The ASGI application of these routes, with the page, the health check and what holds for all.

    The arguments are those of `build_app`.
    """

    async def health(_request: Request) -> Response:
        serving = healthy()
        return JSONResponse({"status": "serving" if serving else "not serving"}, 200 if serving else 503)

    cors = Middleware(
        CORSMiddleware,
        allow_origins=cors_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        allow_private_network=True,  # an allowed page may also call a server on loopback
        expose_headers=EXPOSED,
    )
    app = Starlette(
        routes=[*page_routes(), Route("/healthz", health, methods=["GET"]), *routes],
        middleware=[cors] if cors_origins else [],
        exception_handlers={HTTPException: _refused},
    )
    return Front(app, only_loopback)


class Front:
    """ASGI middleware that adds a date to every response, and refuses requests that name another host.

    Args:
        only_loopback: whether to refuse requests whose Host is no name of this machine. A server without keys trusts
            all callers of its machine, but must not trust a page whose own name resolves to it (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, only_loopback: bool) -> None:
        self._app = app
        self._only_loopback = only_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def dated(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"date", formatdate(usegmt=True).encode())]
            await send(message)

        if self._only_loopback and not _names_loopback(Request(scope)):
            what = "this server has no keys and answers only as localhost; set api_key_file to use another host name"
            await refusal_response(HTTPException(421, what))(scope, receive, dated)
            return
        await self._app(scope, receive, dated)


def _names_loopback(request: Request) -> bool:
    try:
        return is_loopback(urlsplit(f"//{request.headers.get('host', '')}").hostname or "")
    except ValueError:  # not an address
        return False


async def _refused(_request: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, HTTPException)
    allowed = (refusal.headers or {}).get("Allow")
    if refusal.status_code == 404:
        refusal = HTTPException(404, "there is nothing at this path; docs/http.md lists those of this server")
    elif refusal.status_code == 405 and allowed:
        refusal = HTTPException(405, f"use {allowed} at this path", refusal.headers)
    return refusal_response(refusal)
