"""The part of the demo that starts its server, tested without one."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from safelight_server.cli import demo


def says(*lines: str, ends: bool = True) -> SimpleNamespace:
    """A fake process that prints these lines."""
    stdout = asyncio.StreamReader()
    stdout.feed_data("".join(f"{line}\n" for line in lines).encode())
    if ends:
        stdout.feed_eof()
    return SimpleNamespace(stdout=stdout)


async def test_the_address_is_what_the_server_says():
    assert await demo._address(says("loading", "Safelight  listens on 127.0.0.1:5 ", ends=False)) == "127.0.0.1:5"


async def test_a_server_that_does_not_start_is_told_in_words(monkeypatch):
    with pytest.raises(demo.DemoError):
        await demo._address(says("no such model"))
    monkeypatch.setattr(demo, "START_TIMEOUT_S", 0.01)
    with pytest.raises(demo.DemoError):
        await demo._address(says("loading", ends=False))
