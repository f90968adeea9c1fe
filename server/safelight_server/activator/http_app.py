"""The routes of HTTP at the activator: those of a replica.

The contact sheet needs no key, so it must wake no machine: the activator has the page itself, and forwards its calls.
It also answers CORS preflights and health checks itself. A path that no replica has is refused at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from google.protobuf import descriptor_pool
from starlette.routing import Route
from starlette.types import ASGIApp

from safelight_server.activator.http_calls import HttpForwarder, WholeBodyReader, before_answers
from safelight_server.http.app import WEB_SERVICES, front
from safelight_server.http.calls import BodyReader, Calls, Endpoint, Fail
from safelight_server.http.grpc_web import send_status
from safelight_server.http.images import send_error

EDITS = "/v1/images/edits"
API = (
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("POST", "/v1/images/generations"),
    ("POST", EDITS),
)


def build_activator_app(
    forward: HttpForwarder,
    calls: Calls,
    forms: WholeBodyReader,
    healthy: Callable[[], bool],
    *,
    cors_origins: Sequence[str],
    only_loopback: bool,
) -> ASGIApp:
    """The ASGI application; the arguments are those of `http.app.build_app`.

    Args:
        forms: reads the form of an edit.
    """

    def route(verb: str, path: str, fail: Fail, reader: BodyReader | None = None) -> Route:
        return Route(path, Endpoint(calls, path, forward, before_answers(fail), reader), methods=[verb])

    pool = descriptor_pool.Default()
    routes = [
        *(route(verb, path, send_error, forms if path == EDITS else None) for verb, path in API),
        *(
            route("POST", f"/{service}/{method}", send_status)
            for service in WEB_SERVICES
            for method in pool.FindServiceByName(service).methods_by_name
        ),
    ]
    return front(routes, healthy, cors_origins, only_loopback)
