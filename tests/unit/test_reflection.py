"""Reflection finds files by messages, services and methods."""

from __future__ import annotations

import pytest
from safelight.v1 import generation_pb2
from safelight_server.api.reflection import _Descriptors

FILE = generation_pb2.DESCRIPTOR.name


@pytest.mark.parametrize(
    "symbol",
    [
        "safelight.v1.GenerateRequest",
        "safelight.v1.GenerationService",
        "safelight.v1.GenerationService.Generate",
    ],
)
def test_the_file_of_a_symbol(symbol):
    assert _Descriptors().FindFileContainingSymbol(symbol).name == FILE


def test_a_symbol_that_is_not_there():
    with pytest.raises(KeyError):
        _Descriptors().FindFileContainingSymbol("safelight.v1.GenerationService.Nothing")


def test_the_rest_is_the_pools_own():
    assert _Descriptors().FindFileByName(FILE).name == FILE
