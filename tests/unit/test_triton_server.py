"""Answers of a Triton server that are not those of the call."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from safelight_server.runtime.triton.client import ENDPOINT_DOWN, CallFailed, Trouble
from safelight_server.runtime.triton.server import check_rows
from tritonclient.grpc import InferResult, service_pb2

MODEL = SimpleNamespace(name="icons_denoiser")


def answer(rows: int) -> InferResult:
    output = service_pb2.ModelInferResponse.InferOutputTensor(name="prediction", shape=[rows, 32, 8, 8])
    return InferResult(service_pb2.ModelInferResponse(outputs=[output]))


def test_an_answer_of_another_size_is_another_calls():
    check_rows(answer(2), "prediction", 2, MODEL)
    with pytest.raises(CallFailed, match="3 rows of prediction for 2") as caught:
        check_rows(answer(3), "prediction", 2, MODEL)
    assert caught.value.trouble in ENDPOINT_DOWN


def test_a_missing_output_is_a_failure_of_the_model():
    with pytest.raises(CallFailed, match="left out image") as caught:
        check_rows(answer(2), "image", 2, MODEL)
    assert caught.value.trouble is Trouble.FAILED
