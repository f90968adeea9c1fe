"""The project's `onnxruntime` backend inside the real tritonserver."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc.aio as triton_grpc
from safelight_server.runtime import verification
from safelight_server.runtime.onnx import _inputs, _session
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tests.conftest import eventually
from tests.triton.support import REPOSITORY, ROOT, TritonServer

MODELS = sorted(path.parent.name for path in REPOSITORY.glob("*/config.pbtxt"))
NUM_CANCELLED = 24
Feed = dict[str, np.ndarray]


def session(model: str) -> onnxruntime.InferenceSession:
    return _session(REPOSITORY / model / "1" / "model.onnx")


def example(model: str, rows: int) -> Feed:
    return verification.example(_inputs(session(model)), rows)


def inputs(feed: Feed) -> list[triton_grpc.InferInput]:
    """Converts inputs for Triton: a scalar in each row becomes a vector of one."""
    made = []
    for name, array in feed.items():
        sent = array.reshape(-1, 1) if array.ndim == 1 else array
        tensor = triton_grpc.InferInput(name, sent.shape, np_to_triton_dtype(sent.dtype))
        tensor.set_data_from_numpy(sent)
        made.append(tensor)
    return made


async def ask(client: triton_grpc.InferenceServerClient, model: str, feed: Feed) -> dict[str, np.ndarray]:
    result = await client.infer(model, inputs(feed))
    return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}


def same(got: dict[str, np.ndarray], model: str, feed: Feed) -> bool:
    """Whether all outputs of Triton are bit-equal to those of the embedded runtime's session."""
    ours = session(model)
    names = [output.name for output in ours.get_outputs()]
    expected = dict(zip(names, ours.run(names, feed), strict=True))
    return got.keys() == expected.keys() and all(np.array_equal(got[name], expected[name]) for name in names)


async def executions(client: triton_grpc.InferenceServerClient, model: str) -> int:
    statistics = await client.get_inference_statistics(model, as_json=True)
    return int(statistics["model_stats"][0].get("execution_count", 0))


async def test_the_server_and_every_model_are_ready(client: triton_grpc.InferenceServerClient) -> None:
    assert len(MODELS) == 5
    assert await client.is_server_ready()
    for model in MODELS:
        assert await client.is_model_ready(model, "1")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rows", [1, 3, 16])
async def test_a_batch_has_the_bits_of_the_embedded_runtime(
    client: triton_grpc.InferenceServerClient, model: str, rows: int
) -> None:
    feed = example(model, rows)
    assert same(await ask(client, model, feed), model, feed)


@pytest.mark.parametrize("model", MODELS)
async def test_requests_that_triton_joins_get_their_own_rows(
    client: triton_grpc.InferenceServerClient, model: str
) -> None:
    feeds = [example(model, rows) for rows in (1, 2, 3, 1, 2, 1, 3, 2)]
    for _ in range(20):  # on a busy machine requests may arrive one by one, so that none are batched
        before = await executions(client, model)
        answers = await asyncio.gather(*(ask(client, model, feed) for feed in feeds))
        assert all(same(answer, model, feed) for answer, feed in zip(answers, feeds, strict=True))
        if await executions(client, model) - before < len(feeds):
            return
    raise AssertionError("nothing was joined: the test proves nothing")


async def test_only_the_outputs_asked_for_come_back(client: triton_grpc.InferenceServerClient) -> None:
    feed = example("icons_text_encoder", 2)
    wanted = [triton_grpc.InferRequestedOutput("pooled_output")]
    both, one = await asyncio.gather(
        client.infer("icons_text_encoder", inputs(feed)),
        client.infer("icons_text_encoder", inputs(feed), outputs=wanted),
    )
    assert [output.name for output in one.get_response().outputs] == ["pooled_output"]
    assert np.array_equal(one.as_numpy("pooled_output"), both.as_numpy("pooled_output"))


async def test_a_bad_request_fails_alone(client: triton_grpc.InferenceServerClient) -> None:
    """A token outside of the vocabulary fails the session call of the whole batch."""
    model = "icons_text_encoder"
    good = [example(model, rows) for rows in (1, 2, 3, 4)]
    bad = {"input_ids": np.full((1, good[0]["input_ids"].shape[1]), 10**9)}
    feeds = [good[0], good[1], bad, good[2], bad, good[3]]
    answers = await asyncio.gather(*(ask(client, model, feed) for feed in feeds), return_exceptions=True)
    for feed, answer in zip(feeds, answers, strict=True):
        if feed is bad:
            assert isinstance(answer, InferenceServerException)
            assert answer.status() == "StatusCode.INVALID_ARGUMENT"
        else:
            assert not isinstance(answer, BaseException), answer
            assert same(answer, model, feed)


async def test_a_wrong_shape_is_refused(client: triton_grpc.InferenceServerClient) -> None:
    feed = example("icons_denoiser", 1) | {"sample": np.zeros((1, 4, 8, 8), np.float32)}
    with pytest.raises(InferenceServerException, match="unexpected shape"):
        await ask(client, "icons_denoiser", feed)


async def test_cancelled_requests_are_not_computed(
    triton: TritonServer, client: triton_grpc.InferenceServerClient
) -> None:
    """While large batches compute, waiting requests are cancelled; later ones are answered.

    Some are computed until the server hears of it, on a busy machine more of them.
    """
    model = "icons_denoiser"
    small = example(model, 1)
    assert same(await ask(client, model, small), model, small)
    succeeded, failed = outcomes(triton, model)
    large = example(model, 64)
    calls = [asyncio.ensure_future(ask(client, model, large)) for _ in range(NUM_CANCELLED)]
    await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    for call in calls:
        call.cancel()
    ended = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(end, asyncio.CancelledError) for end in ended) >= NUM_CANCELLED - 4
    assert same(await ask(client, model, small), model, small)
    await eventually(lambda: sum(outcomes(triton, model)) == succeeded + failed + NUM_CANCELLED + 1)
    assert outcomes(triton, model)[1] - failed >= 4, "cancelled requests were computed"


def outcomes(triton: TritonServer, model: str) -> tuple[int, int]:
    """Numbers of requests that were computed, and that ended without computation."""
    with InferenceServerClient(triton.grpc_url) as client:
        statistics = client.get_inference_statistics(model, as_json=True)
    stats = statistics["model_stats"][0]["inference_stats"]
    return int(stats["success"].get("count", 0)), int(stats["fail"].get("count", 0))


def shared_memory() -> list[str]:
    return [path.name for path in Path("/dev/shm").iterdir()]


def test_both_environments_have_the_same_onnxruntime() -> None:
    pins = []
    for lock in ("requirements.lock", "requirements-triton.lock"):
        lines = (ROOT / lock).read_text().splitlines()
        pins += [line.split()[0] for line in lines if line.startswith("onnxruntime==")]
    assert pins == [f"onnxruntime=={onnxruntime.__version__}"] * 2


async def test_the_tensors_of_a_call_travel_in_shared_memory(
    triton: TritonServer, client: triton_grpc.InferenceServerClient
) -> None:
    import tritonclient.utils.shared_memory as shared  # loads a library that only this test needs

    model, rows = "icons_denoiser", 5
    feed = example(model, rows)
    size = sum(array.nbytes for array in feed.values()) + feed["sample"].nbytes
    name = f"safelight-test-{triton.grpc_port}"
    region = shared.create_shared_memory_region(name, f"/{name}", size)
    try:
        await client.register_system_shared_memory(name, f"/{name}", size)
        offset, tensors = 0, inputs(feed)
        for tensor, array in zip(tensors, feed.values(), strict=True):
            shared.set_shared_memory_region(region, [array], offset=offset)
            tensor.set_shared_memory(name, array.nbytes, offset=offset)
            offset += array.nbytes
        wanted = triton_grpc.InferRequestedOutput("prediction")
        wanted.set_shared_memory(name, feed["sample"].nbytes, offset=offset)
        await client.infer(model, tensors, outputs=[wanted])
        got = shared.get_contents_as_numpy(region, np.float32, feed["sample"].shape, offset=offset)
        assert same({"prediction": got}, model, feed)
        await client.unregister_system_shared_memory(name)
    finally:
        shared.destroy_shared_memory_region(region)
    assert name not in shared_memory()
