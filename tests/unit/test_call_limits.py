"""Streams that need no key are counted by their client's address."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from unittest.mock import AsyncMock, Mock

import grpc
import pytest
from safelight_server.api.call_limits import CallLimits, KeylessQuota
from safelight_server.domain.errors import QueueFullError


def subject_of_the_refusal(quota: KeylessQuota, peer: str) -> str | None:
    try:
        with quota.stream(peer):
            return None
    except QueueFullError as error:
        assert error.reason == "TOO_MANY_STREAMS"
        return error.metadata["subject"]


@pytest.mark.parametrize(
    ("first", "second", "subject"),
    [
        ("ipv4:10.0.0.1:1", "ipv4:10.0.0.1:2", "address 10.0.0.1"),
        ("ipv4:10.0.0.1:1", "ipv4:10.0.0.2:1", None),
        ("ipv6:%5B2001:db8::1%5D:1", "ipv6:%5B2001:db8::ffff:2%5D:1", "address 2001:db8::/64"),
        ("ipv6:%5B2001:db8::1%5D:1", "ipv6:%5B2001:db8:0:1::1%5D:1", None),
        ("ipv6:%5Bfe80::1%25eth0%5D:1", "ipv6:%5Bfe80::2%25eth0%5D:1", "address fe80::/64"),
        ("ipv6:%5B::ffff:10.0.0.1%5D:1", "ipv4:10.0.0.1:1", "address 10.0.0.1"),
        ("ipv6:%5B::ffff:10.0.0.1%5D:1", "ipv6:%5B::ffff:10.0.0.2%5D:1", None),
        ("unix:", "unix:", "address unix:"),
    ],
)
def test_one_client_is_one_address(first, second, subject):
    quota = KeylessQuota(max_all=9, max_each=1)
    with quota.stream(first):
        assert subject_of_the_refusal(quota, second) == subject
    assert len(quota) == 0
    assert subject_of_the_refusal(quota, second) is None


def test_all_together_are_bounded_and_an_end_makes_room():
    quota = KeylessQuota(max_all=3, max_each=2)
    with ExitStack() as streams:
        for number in range(3):
            streams.enter_context(quota.stream(f"ipv4:10.0.0.{number}:1"))
        assert len(quota) == 3
        assert subject_of_the_refusal(quota, "ipv4:10.0.0.9:1") == "this server"
    assert len(quota) == 0
    assert not quota._open


async def test_a_client_that_leaves_while_it_is_written_to_is_no_bug():
    """Otherwise clients could fill the log with the errors that gRPC's write raises then."""

    async def events(_request, _context):
        yield b"one"

    limits = CallLimits(1.0, (), KeylessQuota(1, 1), Mock())
    stream = limits.limited("service", grpc.unary_stream_rpc_method_handler(events)).stream_stream
    context = Mock(read=AsyncMock(return_value=b"request"), write=AsyncMock(side_effect=grpc.aio.InternalError()))
    with pytest.raises(asyncio.CancelledError):
        await stream(None, context)
