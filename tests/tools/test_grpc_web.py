"""Connect's client for browsers streams over gRPC-Web, without a proxy."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path

from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FileDescriptor
from safelight.v1 import generation_pb2, models_pb2

from tests.conftest import eventually
from tests.support.http import http_server

PROGRAM = Path(__file__).parent / "connect_web.mjs"
SUCCEEDED = generation_pb2.Generation.STATE_SUCCEEDED


def descriptor_set() -> bytes:
    """The API's descriptor set with all imports; each file comes after those that it imports."""
    files: dict[str, FileDescriptor] = {}

    def add(file: FileDescriptor) -> None:
        for imported in file.dependencies:
            add(imported)
        files.setdefault(file.name, file)

    for module in (generation_pb2, models_pb2):
        add(module.DESCRIPTOR)
    found = descriptor_pb2.FileDescriptorSet()
    for file in files.values():
        file.CopyToProto(found.file.add())
    return found.SerializeToString()


async def test_a_page_watches_a_picture_is_refused_is_late_and_leaves(tmp_path: Path) -> None:
    contract = tmp_path / "contract"
    contract.write_bytes(descriptor_set())
    async with http_server() as running:
        command = ("node", str(PROGRAM), running.http_address, str(contract))
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, said = await process.communicate()
        assert process.returncode == 0, said.decode()
        await eventually(lambda: not running.generations._live)
    found = json.loads(out)
    assert (found["kinds"][0], found["kinds"][-1]) == ("accepted", "finished")
    assert "preview" in found["kinds"]
    assert b"".join(map(base64.b64decode, found["picture"])).startswith(b"\x89PNG")
    assert found["state"] == SUCCEEDED
    assert found["refused"]["code"] == "NotFound"
    assert "models/simulated" in found["refused"]["message"]
    assert (found["late"], found["left"]) == ("DeadlineExceeded", "Canceled")
