"""The shipped configurations, read by Triton's own message."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import text_format
from safelight_server.model_config import read
from tritonclient.grpc import model_config_pb2

from tests.triton.support import REPOSITORY

CONFIGS = sorted(REPOSITORY.glob("*/config.pbtxt"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.parent.name)
def test_tritons_own_message_reads_what_ours_reads(file: Path) -> None:
    theirs = text_format.Parse(file.read_text(), model_config_pb2.ModelConfig())
    ours = read(file)
    assert theirs.name == file.parent.name
    assert theirs.backend == "onnxruntime"
    assert ours.max_rows == theirs.max_batch_size
    assert ours.inputs == {tensor.name: tuple(tensor.dims) for tensor in theirs.input}
    assert ours.outputs == {tensor.name: tuple(tensor.dims) for tensor in theirs.output}
