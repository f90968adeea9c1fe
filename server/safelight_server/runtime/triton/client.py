"""gRPC client of one Triton server: readiness, model configs, shared-memory registration and inference.

Invariant: every failed call raises `CallFailed`, which says what the failure
means for the server and whether the server has answered. Only a server that
has answered is known to be done with the shared memory of the call.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Mapping, Sequence
from typing import TypeVar

import tritonclient.grpc.aio as triton
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import InferenceServerException

T = TypeVar("T")

CHANNEL_ARGS = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
]
"""Short reconnect backoff, so that a server that returns is seen soon; each call's own timeout detects a hang."""


class Trouble(enum.Enum):
    """What a failed call means; the value is the text that is shown."""

    DEAD = "the server cannot be reached or has gone"
    HUNG = "the server has not answered in time"
    MODEL_GONE = "the model is not loaded"
    BACKEND_DOWN = "the process that runs the model has gone"
    OUT_OF_STEP = "the answer is another call's"
    QUEUE_FULL = "the model's queue is full"
    QUEUE_TIMEOUT = "the request has waited too long in the model's queue"
    REGION_UNKNOWN = "the server does not know the shared memory"
    BAD_REQUEST = "the request is wrong"
    FAILED = "the model failed"


UNANSWERED = frozenset({Trouble.DEAD, Trouble.HUNG})
ENDPOINT_DOWN = frozenset({Trouble.DEAD, Trouble.HUNG, Trouble.MODEL_GONE, Trouble.BACKEND_DOWN, Trouble.OUT_OF_STEP})
BUSY = frozenset({Trouble.QUEUE_FULL, Trouble.QUEUE_TIMEOUT})

_BY_MESSAGE = (
    ("exceeds maximum queue size", Trouble.QUEUE_FULL),
    ("request timeout expired", Trouble.QUEUE_TIMEOUT),
    ("unable to find system shared memory region", Trouble.REGION_UNKNOWN),
    ("unable to find shared memory region", Trouble.REGION_UNKNOWN),
    ("request for unknown model", Trouble.MODEL_GONE),
    ("is not at ready state", Trouble.MODEL_GONE),
    ("has no available versions", Trouble.MODEL_GONE),
    ("stub process", Trouble.BACKEND_DOWN),
    ("rst_stream", Trouble.DEAD),
)
"""Triton answers UNAVAILABLE for a full queue, an unloaded model and its own shutdown: only the message differs."""

_BY_STATUS = {
    "StatusCode.DEADLINE_EXCEEDED": Trouble.HUNG,
    "StatusCode.INVALID_ARGUMENT": Trouble.BAD_REQUEST,
    "StatusCode.NOT_FOUND": Trouble.BAD_REQUEST,
    "StatusCode.UNIMPLEMENTED": Trouble.BAD_REQUEST,
    "StatusCode.UNAVAILABLE": Trouble.DEAD,
    "StatusCode.UNKNOWN": Trouble.DEAD,
    "StatusCode.CANCELLED": Trouble.DEAD,
}


class CallFailed(Exception):
    """A call to a server failed; `trouble` says what the failure means."""

    def __init__(self, trouble: Trouble, message: str) -> None:
        super().__init__(f"{trouble.value}: {message}")
        self.trouble = trouble

    @property
    def answered(self) -> bool:
        """Whether the failure was the server's own answer, so that it is done with the call's shared memory."""
        return self.trouble not in UNANSWERED


def classify(status: str, message: str) -> Trouble:
    """What a failure means, from its status (such as "StatusCode.UNAVAILABLE") and Triton's message."""
    lower = message.lower()
    if status == "StatusCode.DEADLINE_EXCEEDED":  # the client's own deadline, whatever the message
        return Trouble.HUNG
    for words, trouble in _BY_MESSAGE:
        if words in lower:
            return trouble
    return _BY_STATUS.get(status, Trouble.FAILED)


class Client:
    """Calls to one server. Every method raises `CallFailed`; cancelling its task gives the call up."""

    def __init__(self, url: str) -> None:
        self._client = triton.InferenceServerClient(url, channel_args=CHANNEL_ARGS)

    async def ready(self, models: Sequence[tuple[str, str]], timeout_s: float) -> list[str]:
        """Asks whether the server and the given (model, version) pairs are ready.

        Returns:
            Name and version of each model that is not ready.
        """
        if not await _checked(self._client.is_server_ready(client_timeout=timeout_s)):
            raise CallFailed(Trouble.DEAD, "not ready")
        return [
            f"{model} version {version}"
            for model, version in models
            if not await _checked(self._client.is_model_ready(model, version, client_timeout=timeout_s))
        ]

    async def version(self, timeout_s: float) -> str:
        """The server's Triton version."""
        metadata = await _checked(self._client.get_server_metadata(client_timeout=timeout_s))
        return str(metadata.version)

    async def config(self, model: str, version: str, timeout_s: float) -> model_config_pb2.ModelConfig:
        """The server's configuration of a model."""
        return (await _checked(self._client.get_model_config(model, version, client_timeout=timeout_s))).config

    async def infer(
        self,
        model: str,
        version: str,
        inputs: Sequence[triton.InferInput],
        outputs: Sequence[triton.InferRequestedOutput],
        *,
        queue_s: float,
        timeout_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> triton.InferResult:
        """Runs one batch through a model.

        Args:
            queue_s: a server with a queue policy drops the call after so many seconds in its queue; others ignore this.
            timeout_s: seconds after which the client cancels the call, also on the server; None: never.
        """
        call = self._client.infer(
            model,
            inputs,
            version,
            outputs,
            timeout=max(1, round(queue_s * 1e6)),  # microseconds; 0 would mean no timeout
            client_timeout=timeout_s,
            headers=dict(headers) if headers else None,
        )
        return await _checked(call)

    async def regions(self, timeout_s: float) -> set[str]:
        """Names of the shared-memory regions that the server knows."""
        status: service_pb2.SystemSharedMemoryStatusResponse = await _checked(
            self._client.get_system_shared_memory_status(client_timeout=timeout_s)
        )
        return set(status.regions)

    async def register(self, name: str, key: str, num_bytes: int, timeout_s: float) -> None:
        """Registers a shared-memory region with the server, so that calls can refer to it."""
        await _checked(self._client.register_system_shared_memory(name, key, num_bytes, client_timeout=timeout_s))

    async def unregister(self, name: str, timeout_s: float) -> None:
        """Unregisters a shared-memory region from the server."""
        await _checked(self._client.unregister_system_shared_memory(name, client_timeout=timeout_s))

    async def close(self) -> None:
        """Closes the channel, which ends all its calls."""
        await self._client.close()


async def _checked(call: Awaitable[T]) -> T:
    try:
        return await call
    except InferenceServerException as error:
        message = error.message() or ""
        raise CallFailed(classify(error.status() or "", message), message) from None
