"""Triton's spans join the trace of the caller."""

from __future__ import annotations

import secrets

import tritonclient.grpc.aio as triton_grpc

from tests.conftest import eventually
from tests.support.jaeger import jaeger
from tests.triton.support import triton_server
from tests.triton.test_backend import example, inputs


async def test_spans_join_the_callers_trace_and_only_there() -> None:
    trace_id, parent = secrets.token_hex(16), secrets.token_hex(8)
    tensors = inputs(example("icons_decoder", 1))
    with jaeger() as traces, triton_server("--otlp", traces.otlp_http) as triton:
        async with triton_grpc.InferenceServerClient(triton.grpc_url) as client:
            await client.infer("icons_decoder", tensors)
            await client.infer("icons_decoder", tensors, headers={"traceparent": f"00-{trace_id}-{parent}-01"})
        wanted = {"InferRequest", "icons_decoder", "compute"}  # Triton may send them one by one
        await eventually(lambda: wanted <= {span["operationName"] for span in traces.spans(trace_id)})
        spans = {span["operationName"]: span for span in traces.spans(trace_id)}
        assert spans["InferRequest"]["references"][0]["spanID"] == parent
        assert spans["compute"]["references"][0]["spanID"] == spans["icons_decoder"]["spanID"]
        assert traces.services() == ["triton"]
        assert traces.count("triton") == 1, "a call without a traceparent was traced"
