"""Client of a Safelight server: text to image, with previews while the picture is computed.

async with safelight.Client("127.0.0.1:8421") as client:
    async for event in client.generate("a glowing red potion", seed=7):
        ...

`SyncClient` is the same for programs without asyncio.
"""

from safelight.blocking import SyncClient, SyncStream
from safelight.client import Client
from safelight.errors import GenerationError
from safelight.events import Accepted, Degradation, Event, Finished, Origin, Picture, Preview, Progress
from safelight.images import ImageFile, ImageSource
from safelight.request import CacheMode, Control, GenerateOptions, PreviewOptions
from safelight.stream import GenerationStream
from safelight.v1.cache_pb2 import GetCacheStatsResponse, PurgeCacheResponse
from safelight.v1.generation_pb2 import Branch, CachePolicy, PixelEncoding, PreviewPolicy, QualityFloor
from safelight.v1.images_pb2 import Image
from safelight.v1.models_pb2 import Model, StepTime, Task
from safelight.v1.quotas_pb2 import TenantQuota, TokenBucket

__all__ = [
    "Accepted",
    "Branch",
    "CacheMode",
    "CachePolicy",
    "Client",
    "Control",
    "Degradation",
    "Event",
    "Finished",
    "GenerateOptions",
    "GenerationError",
    "GenerationStream",
    "GetCacheStatsResponse",
    "Image",
    "ImageFile",
    "ImageSource",
    "Model",
    "Origin",
    "Picture",
    "PixelEncoding",
    "Preview",
    "PreviewOptions",
    "PreviewPolicy",
    "Progress",
    "PurgeCacheResponse",
    "QualityFloor",
    "StepTime",
    "SyncClient",
    "SyncStream",
    "Task",
    "TenantQuota",
    "TokenBucket",
]
