"""Tests of the shipped configurations, parsed with Triton's own message type."""

from __future__ import annotations

from pathlib import Path

import pytest
import tritonclient.grpc.aio as triton_grpc
from google.protobuf import text_format
from safelight_server.catalog.config_pbtxt import read
from safelight_server.catalog.export import Target, write
from tritonclient.grpc import model_config_pb2

from tests.triton.support import REPOSITORY, triton_server
from tests.triton.test_backend import MODELS, ask, example, same

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


async def test_a_rewritten_repository_is_served_and_warmed(tmp_path: Path) -> None:
    """Tests the code that writes GPU repositories on the CPU target, which runs without a GPU."""
    write(REPOSITORY, tmp_path / "cpu", Target.CPU)
    with triton_server("--repository", tmp_path / "cpu", "--", "--log-verbose=1") as triton:
        assert "'rows_64'" in triton.log()
        async with triton_grpc.InferenceServerClient(triton.grpc_url) as client:
            for model in MODELS:
                feed = example(model, 3)
                assert same(await ask(client, model, feed), model, feed)
