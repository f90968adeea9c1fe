"""Server reflection for every tool: also those that ask for the file of a method, as ghz does.

protobuf's pool finds files by messages and services but not by methods.
Neighbour: `app`.
"""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from grpc_reflection.v1alpha import reflection

_POOL: descriptor_pool.DescriptorPool = descriptor_pool.Default()


class _Descriptors:
    """The pool of all generated messages, which also knows where a method is."""

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptor:  # noqa: N802  # protobuf's name
        try:
            return _POOL.FindFileContainingSymbol(symbol)
        except KeyError:
            return _POOL.FindMethodByName(symbol).containing_service.file

    def __getattr__(self, name: str) -> object:
        return getattr(_POOL, name)


def enable(services: Iterable[str], server: grpc.aio.Server) -> None:
    """Lets clients ask `server` for the descriptions of `services` and of reflection itself."""
    reflection.enable_server_reflection([*services, reflection.SERVICE_NAME], server, _Descriptors())
