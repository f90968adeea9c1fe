"""POST /v1/images/edits: pictures from a picture, as in OpenAI's image API. Responses are those of `images.py`.

The files of the form are kept like uploads to ImageService, and are named in the
GenerateRequest. They count as uploads in the bounds.
Invariant: pages of other origins cannot make the server work. Browsers let a page send
a form to any origin without a CORS preflight, so the origin is checked here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from urllib.parse import urlsplit

from safelight.v1 import generation_pb2 as pb
from starlette.exceptions import HTTPException
from starlette.responses import Response

from safelight_server.api.images import UPLOAD_S, ImageCalls
from safelight_server.catalog.catalog import Catalog
from safelight_server.domain.caller import Caller
from safelight_server.domain.errors import FieldViolation, InvalidRequestError, SafelightError
from safelight_server.http.calls import CLOSE, HttpCall, bounded, discard, num_announced, timely
from safelight_server.http.form import CONTENT_TYPE, read_form
from safelight_server.http.images import ImageAnswer, ImageGenerations
from safelight_server.http.images_request import EditParameters, edit_request, idempotency_key, parse_edit

EDIT = "image_edit"
"""The part before the dot of the event types of a stream."""
NUM_FILES = 2


class EditReader:
    """Reads the form of an edit, within the bounds of uploads.

    Args:
        max_text_bytes: bound on the parts of the form that are not files, together and each.
        cors_origins: origins whose pages may send forms; "*" for all.
    """

    def __init__(self, uploads: ImageCalls, max_text_bytes: int, cors_origins: Sequence[str]) -> None:
        self._uploads = uploads
        self._max_text_bytes = max_text_bytes
        self._cors_origins = cors_origins

    async def __call__(self, call: HttpCall, caller: Caller) -> None:
        """Reads the form; reserves room among the uploads of the caller's tenant until the body is dropped."""
        request = call.request
        most = NUM_FILES * self._uploads.max_bytes + self._max_text_bytes
        try:
            self._check_kind(call)
            call.held.enter_context(self._uploads.room.upload(caller.tenant, num_announced(request, most)))
        except (HTTPException, SafelightError):
            await discard(request)
            raise
        async with timely(UPLOAD_S), contextlib.aclosing(bounded(request, most)) as pieces:
            call.form = await read_form(request.headers, pieces, self._max_text_bytes)

    def _check_kind(self, call: HttpCall) -> None:
        kind, _, more = call.request.headers.get("content-type", "").lower().partition(";")
        if kind.strip() != CONTENT_TYPE or "boundary=" not in more:
            raise HTTPException(415, f"send content-type: {CONTENT_TYPE}; boundary=…", CLOSE)
        origin, own = call.request.headers.get("origin"), call.request.headers.get("host", "")
        if origin is None or origin in self._cors_origins or "*" in self._cors_origins:
            return
        if _host(origin) != own:
            what = f"pages of {origin[:256]} may not send forms here; the operator can allow it by http_cors_origins"
            raise HTTPException(403, what, CLOSE)


class ImageEdits:
    """Answers requests for pictures from a picture.

    Args:
        generations: develops the pictures and sends the responses.
    """

    def __init__(self, generations: ImageGenerations, uploads: ImageCalls, catalog: Catalog) -> None:
        self._generations = generations
        self._uploads = uploads
        self._catalog = catalog

    async def edit(self, call: HttpCall) -> Response | None:
        """Makes the pictures of a request. Sends events, or returns the response with all pictures."""
        parameters, message, pictures = await self._take(call)
        call.drop_body()
        return await self._generations.develop(call, parameters, message, pictures)

    async def _take(self, call: HttpCall) -> tuple[EditParameters, pb.GenerateRequest, ImageAnswer]:
        """Checks the form and keeps its files."""
        edit = parse_edit(call.form)
        message, pipeline = edit_request(edit.parameters, self._catalog, idempotency_key(call.request.headers))
        image = await self._uploads.keep(call.caller, edit.image, "image")
        message.spec.init_image = image.name
        if edit.mask is not None:
            mask = await self._uploads.keep(call.caller, edit.mask, "mask", transparent=True)
            if (mask.width_px, mask.height_px) != (image.width_px, image.height_px):
                what = (
                    f"has {mask.width_px}x{mask.height_px} pixels where the picture has "
                    f"{image.width_px}x{image.height_px}; both must have the same size"
                )
                raise InvalidRequestError([FieldViolation("mask", what)])
            message.spec.mask = mask.name
        return edit.parameters, message, ImageAnswer(edit.parameters, pipeline, EDIT)


def _host(origin: str) -> str | None:
    """The host of an origin with its port; None: it is malformed."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None
