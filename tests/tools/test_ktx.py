"""Another program, ktx-parse in Node, can read the textures."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path

import pytest
from safelight import Client
from safelight.v1 import generation_pb2 as pb

from tests.conftest import serving_here

ROOT = Path(__file__).parent.parent.parent
READ = """
import { read } from "ktx-parse";
const file = read(new Uint8Array(Buffer.from(process.argv[1], "base64")));
const { vkFormat, pixelWidth, pixelHeight, pixelDepth, layerCount, faceCount, supercompressionScheme, levels } = file;
const [dfd] = file.dataFormatDescriptor;
console.log(JSON.stringify({
    vkFormat, pixelWidth, pixelHeight, pixelDepth, layerCount, faceCount, supercompressionScheme,
    levels: levels.map(one => one.levelData.length), keyValue: file.keyValue,
    model: dfd.colorModel, transfer: dfd.transferFunction, primaries: dfd.colorPrimaries,
    block: Array.from(dfd.texelBlockDimension), plane: dfd.bytesPlane[0], samples: dfd.samples.length, bits: dfd.samples[0].bitLength,
}));
"""


def read(data: bytes) -> dict[str, object]:
    """Parses a file with ktx-parse."""
    command = ["node", "--input-type=module", "--eval", READ, base64.b64encode(data).decode()]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found: dict[str, object] = json.loads(printed)
    return found


@pytest.mark.parametrize(
    ("texture_format", "vk_format", "model", "block_bytes"), [("BC1", 132, 128, 8), ("BC7", 146, 134, 16)]
)
async def test_previews_and_pictures_come_as_textures(texture_format, vk_format, model, block_bytes):
    number = pb.PixelEncoding.TextureFormat.Value(f"TEXTURE_FORMAT_{texture_format}")
    encoding = pb.PixelEncoding(media_type="image/ktx2", texture_format=number)
    preview = pb.PreviewPolicy(accept=[pb.PixelEncoding(media_type="image/ktx2")], max_edge_px=33)
    async with serving_here() as running, Client(running.address) as client:
        stream = client.generate("a red potion", steps=4, seed=7, encoding=encoding, preview=preview)
        events = [event async for event in stream]
    previews = [event for event in events if type(event).__name__ == "Preview"]
    (picture,) = [event for event in events if type(event).__name__ == "Picture"]
    assert {event.media_type for event in [*previews, picture]} == {"image/ktx2"}
    found = read(picture.data)
    assert found == {
        "vkFormat": vk_format, "pixelWidth": 128, "pixelHeight": 128, "pixelDepth": 0, "layerCount": 0, "faceCount": 1,
        "supercompressionScheme": 0, "levels": [32 * 32 * block_bytes],
        "keyValue": {"KTXorientation": "rd", "KTXwriter": "Safelight"}, "model": model, "transfer": 2, "primaries": 1,
        "block": [3, 3, 0, 0], "plane": block_bytes, "samples": 1, "bits": block_bytes * 8 - 1,
    }  # fmt: skip
    small = read(previews[0].data)
    assert (small["pixelWidth"], small["levels"]) == (33, [9 * 9 * 8])
