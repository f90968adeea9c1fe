"""The client refuses invalid arguments before it sends anything."""

from __future__ import annotations

import pytest
from safelight import Client


@pytest.mark.parametrize("key", ["a b", "clé", "a\rb", "a\nb", "\nab", "\x7f"])
async def test_a_key_that_is_no_header_value_is_refused(key):
    with pytest.raises(ValueError, match="api_key: must be visible ASCII"):
        Client("127.0.0.1:1", api_key=key)


@pytest.mark.parametrize(
    ("key", "sent"),
    [("ab\n", "Bearer ab"), ("ab \r\n", "Bearer ab"), ("~!", "Bearer ~!"), ("\n", None), ("", None), (None, None)],
)
async def test_white_space_after_a_key_is_not_of_it(key, sent):
    async with Client("127.0.0.1:1", api_key=key) as client:
        assert await client._servers.authorization() == ((("authorization", sent),) if sent else ())


@pytest.mark.parametrize("target", ["", " ", "a:1,", [], ["a:1", ""]])
async def test_a_target_that_names_no_server_is_refused(target):
    with pytest.raises(ValueError, match="target: names no server"):
        Client(target)
