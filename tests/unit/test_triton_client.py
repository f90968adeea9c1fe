"""Failures are distinguished by status and message, as a real tritonserver 2.51 sends them."""

from __future__ import annotations

import pytest
from safelight_server.runtime.triton.client import CallFailed, Trouble, classify

SEEN = [
    ("UNAVAILABLE", "[request id: <id_unknown>] Exceeds maximum queue size", Trouble.QUEUE_FULL),
    ("UNAVAILABLE", "Request timeout expired", Trouble.QUEUE_TIMEOUT),
    ("NOT_FOUND", "Unable to find shared memory region: 'nope'", Trouble.REGION_UNKNOWN),
    ("NOT_FOUND", "Request for unknown model: 'icons_denoiser' version 7 is not found", Trouble.MODEL_GONE),
    ("UNAVAILABLE", "Request for unknown model: 'x' version 1 is not at ready state", Trouble.MODEL_GONE),
    ("INTERNAL", "Stub process 'icons_denoiser_0_0' is not healthy.", Trouble.BACKEND_DOWN),
    ("INTERNAL", "Unable to open shared memory region: '/zzz'", Trouble.FAILED),
    ("INTERNAL", "Received RST_STREAM with error code 2", Trouble.DEAD),
    ("INVALID_ARGUMENT", "inference request batch-size must be <= 64 for 'icons_denoiser'", Trouble.BAD_REQUEST),
    ("DEADLINE_EXCEEDED", "Deadline Exceeded", Trouble.HUNG),
    ("UNAVAILABLE", "failed to connect to all addresses; last error: UNKNOWN: Connection refused", Trouble.DEAD),
    ("UNAVAILABLE", "Socket closed", Trouble.DEAD),
    ("UNAVAILABLE", "recvmsg:Connection reset by peer", Trouble.DEAD),
    ("UNKNOWN", "Stream removed", Trouble.DEAD),
]


@pytest.mark.parametrize(("status", "message", "trouble"), SEEN)
def test_each_failure_is_told_apart(status, message, trouble):
    assert classify(f"StatusCode.{status}", message) is trouble


def test_only_a_server_that_spoke_has_answered():
    unanswered = {trouble for trouble in Trouble if not CallFailed(trouble, "").answered}
    assert unanswered == {Trouble.DEAD, Trouble.HUNG}
