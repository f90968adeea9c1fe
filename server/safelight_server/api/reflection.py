"""gRPC server reflection, which tools such as grpcurl and ghz use to learn the services.

Also answers tools that ask for the file of a method, as ghz does: protobuf's
descriptor pool finds files by messages and services only.
"""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from grpc_reflection.v1alpha import reflection

_POOL: descriptor_pool.DescriptorPool = descriptor_pool.Default()


class _Descriptors:
    """The descriptor pool of all generated messages, which also finds the file of a method."""

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptor:  # noqa: N802  # protobuf's name
        try:
            return _POOL.FindFileContainingSymbol(symbol)
        except KeyError:
            return _POOL.FindMethodByName(symbol).containing_service.file

    def __getattr__(self, name: str) -> object:
        return getattr(_POOL, name)


def enable(services: Iterable[str], server: grpc.aio.Server) -> None:
    """Adds reflection (v1alpha) to `server`, for `services` and for reflection itself."""
    reflection.enable_server_reflection([*services, reflection.SERVICE_NAME], server, _Descriptors())
