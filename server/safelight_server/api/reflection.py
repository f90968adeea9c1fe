"""gRPC server reflection, which tools such as grpcurl and ghz use to learn the services: v1, and v1alpha for old tools.

Compared with grpc_reflection it adds v1, the JSON names of fields as protoc gives them, and the look-up of a file by
the name of a method, which ghz uses and protobuf's descriptor pool does not support.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from google.protobuf.descriptor import FileDescriptor
from grpc_reflection.v1alpha import reflection, reflection_pb2

from safelight_server.api.call_limits import Handler

V1ALPHA: str = reflection.SERVICE_NAME
V1 = V1ALPHA.replace(".v1alpha.", ".v1.")
REFLECTION_SERVICES = (V1, V1ALPHA)


def _v1_pool() -> descriptor_pool.DescriptorPool:
    """A pool with the file of v1, which is that of v1alpha with the other package."""
    file = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    text = str(file).replace("grpc.reflection.v1alpha", "grpc.reflection.v1").replace("/v1alpha/", "/v1/")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(text, descriptor_pb2.FileDescriptorProto()))
    return pool


_POOL: descriptor_pool.DescriptorPool = descriptor_pool.Default()
_V1_POOL = _v1_pool()


class _Descriptors:
    """The descriptor pool of all generated messages, which also has reflection v1 and finds the file of a method."""

    def FindFileByName(self, name: str) -> FileDescriptor:  # noqa: N802  # protobuf's name
        try:
            return _POOL.FindFileByName(name)
        except KeyError:
            return _V1_POOL.FindFileByName(name)

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptor:  # noqa: N802  # protobuf's name
        for pool in (_POOL, _V1_POOL):
            with contextlib.suppress(KeyError):
                return pool.FindFileContainingSymbol(symbol)
            with contextlib.suppress(KeyError):
                return pool.FindMethodByName(symbol).containing_service.file
        raise KeyError(symbol)

    def __getattr__(self, name: str) -> object:
        return getattr(_POOL, name)


class Reflection(reflection.aio.ReflectionServicer):  # type: ignore[misc]  # grpc_reflection has no types
    """Lists the services of the server and returns their descriptors.

    Args:
        services: full names of the services, without those of reflection.
    """

    def __init__(self, services: Iterable[str]) -> None:
        super().__init__([*services, *REFLECTION_SERVICES], _Descriptors())

    def handlers(self) -> dict[str, dict[str, Handler]]:
        """The handlers of v1 and v1alpha, by full name of the service. Their messages are the same on the wire."""
        handler = grpc.stream_stream_rpc_method_handler(
            self.ServerReflectionInfo,
            reflection_pb2.ServerReflectionRequest.FromString,
            reflection_pb2.ServerReflectionResponse.SerializeToString,
        )
        return {name: {"ServerReflectionInfo": handler} for name in REFLECTION_SERVICES}

    async def ServerReflectionInfo(  # noqa: N802  # the contract's name
        self, requests: AsyncIterator[reflection_pb2.ServerReflectionRequest], context: object
    ) -> AsyncGenerator[reflection_pb2.ServerReflectionResponse, None]:
        """Returns one response for each request."""
        async with aclosing(super().ServerReflectionInfo(requests, context)) as responses:
            async for response in responses:
                if response.HasField("file_descriptor_response"):
                    files = response.file_descriptor_response.file_descriptor_proto
                    files[:] = [_with_json_names(file) for file in files]
                yield response


@functools.lru_cache(maxsize=64)
def _with_json_names(serialized: bytes) -> bytes:
    """A FileDescriptorProto in which fields have their JSON names, which protoc leaves out of Python's modules."""
    file = descriptor_pb2.FileDescriptorProto.FromString(serialized)
    fields, messages = list(file.extension), list(file.message_type)
    while messages:
        message = messages.pop()
        messages += message.nested_type
        fields += [*message.field, *message.extension]
    for field in fields:
        if not field.HasField("json_name"):
            field.json_name = re.sub(r"_+(.?)", lambda match: match[1].upper(), field.name)
    return file.SerializeToString()
