"""A gRPC and gRPC-Web server that sends previews of a fixed size, as fast as its client reads them or at a fixed rate.

It computes nothing and skips no preview, so that the client is what is measured. A request gives the number of previews
(`num_inference_steps`), their edge (`preview.max_edge_px`, square, raw RGBA8) and their interval
(`preview.min_interval`). All previews of a stream have the same bytes; a small picture follows them.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection

import grpc
from safelight.v1 import generation_pb2 as pb
from safelight_server.api.service import GENERATION_SERVICE, Handler
from safelight_server.app.grpc_server import OPTIONS
from safelight_server.app.process import settle
from safelight_server.http.calls import HttpCall
from safelight_server.http.grpc_web import GrpcWebMethod
from safelight_server.http.server import HttpLimits, HttpServer, bind
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from load_tests.bench import processes
from load_tests.bench.requests import RAW

PICTURE_PX = 16


class PreviewSource:
    """Answers Generate, and notes when it has handed the previews of the newest stream to gRPC."""

    def __init__(self) -> None:
        self._written_us: list[int] = []
        self._cpu_s = time.process_time()

    async def generate(self, data: bytes, _: object) -> AsyncIterator[bytes]:
        """Yields Accepted, the previews, the picture and Finished, as serialized responses."""
        request = pb.GenerateRequest.FromString(data)
        written_us = self._written_us = list[int]()
        preview = _response(preview=_preview(request.preview.max_edge_px))
        interval_s = request.preview.min_interval.ToNanoseconds() / 1e9
        yield _response(1, accepted=pb.Accepted(spec=request.spec, encoding=RAW))
        due = time.monotonic()
        for _ in range(request.spec.num_inference_steps):
            if interval_s:
                due += interval_s
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            written_us.append(time.time_ns() // 1000)
            yield preview
        yield _response(artifact_chunk=_picture())
        yield _response(2, output_finished=pb.OutputFinished(finish_reason=pb.OutputFinished.FINISH_REASON_COMPLETED))
        yield _response(3, finished=pb.Finished(usage=pb.Usage(num_steps=request.spec.num_inference_steps)))

    async def told(self) -> tuple[list[int], float]:
        """Returns the measurements of the newest stream.

        Returns:
            When each preview was sent, in microseconds since 1970 by this machine's clock; and the CPU seconds of this
            process since the previous call.
        """
        before, self._cpu_s = self._cpu_s, time.process_time()
        return self._written_us, self._cpu_s - before


async def serve(pipe: Connection) -> None:
    """Sends the addresses for gRPC and gRPC-Web, then answers each question with the result of `told`."""
    source = PreviewSource()
    handler: Handler = grpc.unary_stream_rpc_method_handler(source.generate)
    server = grpc.aio.server(options=OPTIONS)
    server.add_registered_method_handlers(GENERATION_SERVICE, {"Generate": handler})
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    web = await HttpServer.start(
        _web(handler), bind("127.0.0.1", 0), HttpLimits(max_connections=16, stall_s=60.0), None
    )
    settle()
    pipe.send((f"127.0.0.1:{port}", web.address))
    await processes.answer(pipe, source.told)


def _web(handler: Handler) -> ASGIApp:
    """An ASGI app that answers every request by a handler, as the server's HTTP port does, but without identities."""
    method = GrpcWebMethod(handler)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        call = HttpCall(Request(scope, receive), send)
        call.body = await call.request.body()
        async with call.context.calling():
            await method(call)

    return app


def _response(sequence: int = 0, **event: object) -> bytes:
    happened = pb.GenerationEvent(sequence=sequence, generation="generations/measured", **event)  # type: ignore[arg-type]
    happened.event_time.GetCurrentTime()
    return pb.GenerateResponse(event=happened).SerializeToString()


def _preview(edge_px: int) -> pb.Preview:
    return pb.Preview(
        step=1,
        media_type=RAW.media_type,
        width_px=edge_px,
        height_px=edge_px,
        stride_bytes=4 * edge_px,
        method=pb.PREVIEW_METHOD_TINY_DECODER,
        data=bytes(range(256)) * (edge_px * edge_px // 64),
    )


def _picture() -> pb.ArtifactChunk:
    data = bytes(4 * PICTURE_PX * PICTURE_PX)
    return pb.ArtifactChunk(
        media_type=RAW.media_type,
        width_px=PICTURE_PX,
        height_px=PICTURE_PX,
        stride_bytes=4 * PICTURE_PX,
        total_bytes=len(data),
        data=data,
        sha256=hashlib.sha256(data).digest(),
    )
