"""POST /v1/images/generations: pictures as OpenAI's image API sends them, at once or as server-sent events.

A stream has `image_generation.partial_image` for each preview, in the encoding
of the picture, then `image_generation.completed` for each picture, or `error`.
It pulls the next preview only when its client's connection takes more: a slow
reader gets fewer and newer previews. Facts that OpenAI's API has no field for are
in the object `safelight` of the response. `edits.py` uses this module too.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

from google.rpc import status_pb2
from safelight.v1 import generation_pb2 as pb
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from safelight_server.api.service import GENERATION_SERVICE
from safelight_server.catalog.catalog import Catalog
from safelight_server.catalog.pipeline import Pipeline
from safelight_server.domain.errors import FieldViolation, InvalidRequestError
from safelight_server.http.calls import CLOSE, HttpCall
from safelight_server.http.context import CallAbortError, Rpcs
from safelight_server.http.errors import error_body, error_response
from safelight_server.http.images_request import (
    ImageParameters,
    generate_request,
    idempotency_key,
    in_parameters,
    parse,
)

GENERATION = "image_generation"
"""The part before the dot of the event types of a stream."""
ERROR = "error"
EVENT_STREAM: Mapping[str, str] = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would buffer the events
}
SILENCE_S, COMMENT = 15.0, b":\n\n"
"""After so long without an event a comment is sent, so that no proxy closes the connection as idle."""


class ImageAnswer:
    """Collects the outputs of a generation as they arrive, and makes OpenAI's events and responses of them.

    Args:
        parameters: the parameters of the request.
        pipeline: the pipeline that makes the pictures.
        kind: the part before the dot of the event types of its stream.
    """

    def __init__(self, parameters: ImageParameters, pipeline: Pipeline, kind: str = GENERATION) -> None:
        self._parameters = parameters
        self._pipeline = pipeline
        self._kind = kind
        self._accepted = pb.Accepted()
        self._data: dict[int, bytearray] = {}
        self._num_partial: dict[int, int] = {}
        self._num_ended = 0

    def accept(self, accepted: pb.Accepted) -> None:
        """Handles the first event of a generation."""
        self._accepted = accepted

    def add(self, chunk: pb.ArtifactChunk) -> None:
        """Adds a piece of a picture."""
        self._data.setdefault(chunk.output_index, bytearray()).extend(chunk.data)

    def partial(self, event: pb.GenerationEvent) -> dict[str, Any] | None:
        """The event for a preview; None if as many as requested were sent for its picture."""
        index = event.preview.output_index
        number = self._num_partial.get(index, 0)
        if number == (self._parameters.partial_images or 0):
            return None
        self._num_partial[index] = number + 1
        data = _base64(event.preview.data)
        return self._event("partial_image", event, index, data) | {"partial_image_index": number}

    def completed(self, event: pb.GenerationEvent) -> dict[str, Any] | None:
        """The event for an output that has ended with a picture; None for the last output, which `last` handles."""
        ended = event.output_finished
        self._num_ended += 1
        if self._num_ended == len(self._accepted.spec.outputs) or ended.output_index not in self._data:
            return None
        data = _base64(self._data.pop(ended.output_index))
        return self._event("completed", event, ended.output_index, data) | {"usage": self._usage(0, 1)}

    def last(self, event: pb.GenerationEvent) -> dict[str, Any]:
        """The last event of a stream: the picture that came last, and the facts of the whole request."""
        [(index, data)] = self._data.items()
        more = {"usage": self._usage(1, 1), "safelight": self._more(event)}
        return self._event("completed", event, index, _base64(data)) | more

    def answer(self, event: pb.GenerationEvent) -> dict[str, Any]:
        """The response to a request without a stream: all pictures, in the order of their outputs."""
        return {
            "created": event.event_time.seconds,
            "data": [{"b64_json": _base64(self._data[index])} for index in sorted(self._data)],
            "background": "opaque",
            "output_format": self._parameters.format,
            "size": self._size,
            "usage": self._usage(1, len(self._accepted.spec.outputs)),
            "safelight": self._more(event),
        }

    @property
    def _size(self) -> str:
        return f"{self._accepted.spec.width_px}x{self._accepted.spec.height_px}"

    def _event(self, what: str, event: pb.GenerationEvent, index: int, data: str) -> dict[str, Any]:
        """An event of a stream. `image_index` is an addition: OpenAI's events do not distinguish several pictures."""
        return {
            "type": f"{self._kind}.{what}",
            "image_index": index,
            "b64_json": data,
            "created_at": event.event_time.seconds,
            "size": self._size,
            "quality": "auto",
            "background": "opaque",
            "output_format": self._parameters.format,
        }

    def _usage(self, num_inputs: int, num_images: int) -> dict[str, Any]:
        """Usage in tokens: text has those of the prompt, an image has one for each position of its latent.

        The usages of all events of a stream sum to that of a response without a stream: the input counts once.
        """
        spec, tokenizer = self._accepted.spec, self._pipeline.tokenizer
        assert tokenizer is not None  # the request would not have been accepted without one
        text = num_inputs * min(tokenizer.encode(spec.prompt).num_tokens, tokenizer.max_tokens)
        _, height, width = self._pipeline.latent_shape(spec.width_px, spec.height_px)
        given = num_inputs * height * width if spec.init_image else 0
        images = height * width * num_images
        return {
            "input_tokens": text + given,
            "input_tokens_details": {"text_tokens": text, "image_tokens": given},
            "output_tokens": images,
            "output_tokens_details": {"text_tokens": 0, "image_tokens": images},
            "total_tokens": text + given + images,
        }

    def _more(self, event: pb.GenerationEvent) -> dict[str, Any]:
        """Facts that OpenAI's response has no field for. With equal `numerics_id` equal seeds give equal pictures."""
        accepted, finished = self._accepted, event.finished
        spec, dispositions = accepted.spec, pb.CacheResult.Disposition
        more = {
            "generation": event.generation,
            "trace_id": accepted.trace_id,
            "model": spec.model.removeprefix("models/"),
            "model_revision": accepted.model_revision,
            "numerics_id": accepted.numerics_id,
            "seeds": [output.seed for output in spec.outputs],
            "num_inference_steps": spec.num_inference_steps,
            "guidance_scale": round(spec.guidance_scale, 6),
            "cache": [
                dispositions.Name(result.disposition).removeprefix("DISPOSITION_") for result in finished.cache_results
            ],
            "compute_seconds": finished.usage.compute_time.ToTimedelta().total_seconds(),
            "num_rows_skipped": finished.usage.num_rows_skipped,
            "warnings": [{"code": warning.reason, "message": warning.message} for warning in accepted.warnings],
        }
        if spec.adapters:
            more["adapters"] = {adapter.name: round(adapter.scale, 6) for adapter in spec.adapters}
        if spec.init_image:
            more["strength"] = round(spec.strength, 6)
        return more | self._cost(finished.usage)

    def _cost(self, usage: pb.Usage) -> dict[str, Any]:
        """The cost of the compute; empty if the server has no price."""
        if not usage.HasField("cost"):
            return {}
        return {"cost": {"currency": usage.cost.currency_code, "nanos": usage.cost.nanos}}


class ImageGenerations:
    """Answers requests for pictures, by the handler of GenerationService.Generate."""

    def __init__(self, rpcs: Rpcs, catalog: Catalog) -> None:
        self._handler = rpcs.find(GENERATION_SERVICE, "Generate")
        self._catalog = catalog

    async def generate(self, call: HttpCall) -> Response | None:
        """Makes the pictures of a request. Sends events, or returns the response with all pictures."""
        _check_json(call)
        parameters = parse(call.body)
        message, pipeline = generate_request(parameters, self._catalog, idempotency_key(call.request.headers))
        if pipeline.manifest.is_inpainting:
            what = f"{pipeline.name} only inpaints: send a picture and a mask to POST /v1/images/edits"
            raise InvalidRequestError([FieldViolation("model", what)])
        return await self.develop(call, parameters, message, ImageAnswer(parameters, pipeline))

    async def develop(
        self, call: HttpCall, parameters: ImageParameters, message: pb.GenerateRequest, pictures: ImageAnswer
    ) -> Response | None:
        """Makes the pictures of a GenerateRequest. Sends events, or returns the response with all pictures."""
        last = None
        try:
            async with aclosing(call.context.stream(self._handler, message)) as events:
                async for data in events:
                    event = pb.GenerateResponse.FromString(data).event
                    match event.WhichOneof("event"):
                        case "accepted":
                            pictures.accept(event.accepted)
                            if parameters.stream:
                                await call.start(EVENT_STREAM)
                        case "preview":
                            await _send(call, pictures.partial(event))
                        case "queued" | "progress":
                            if call.started and call.silent_s > SILENCE_S:
                                await call.write(COMMENT)
                        case "artifact_chunk":
                            pictures.add(event.artifact_chunk)
                        case "output_finished" if parameters.stream:
                            await _send(call, pictures.completed(event))
                        case "finished":
                            last = event
        except CallAbortError as error:
            raise CallAbortError(in_parameters(error.status, message)) from None
        if last is None:  # the call was ended from outside, which the context reports
            return None
        if not parameters.stream:
            return JSONResponse(pictures.answer(last))
        await _send(call, pictures.last(last))
        await call.finish()
        return None


async def send_error(call: HttpCall, status: status_pb2.Status) -> None:
    """Sends an error response, or ends a stream with an error event, which OpenAI's clients raise."""
    if not call.started:
        await call.respond(error_response(status))
        return
    await _send(call, {"type": ERROR} | error_body(status))
    await call.finish()


def _check_json(call: HttpCall) -> None:
    """Refuses bodies that are not JSON: browsers send JSON to another origin only after a CORS preflight."""
    kind = call.request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, "send content-type: application/json", CLOSE)


async def _send(call: HttpCall, event: Mapping[str, Any] | None) -> None:
    """Sends an event of a stream; None sends nothing. The event's name is its type."""
    if event is not None:
        data = json.dumps(event, separators=(",", ":")).encode()
        await call.write(b"event: %b\ndata: %b\n\n" % (event["type"].encode(), data))


def _base64(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode("ascii")
