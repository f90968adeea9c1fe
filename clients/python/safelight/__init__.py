"""Asyncio client of a Safelight server: text to image, with previews while the picture is computed.

async with safelight.Client("127.0.0.1:8421") as client:
    async for event in client.generate("a glowing red potion", seed=7):
        ...
"""

from safelight.client import CacheMode, Client, Finished, Origin, Picture, Preview, Progress
from safelight.errors import GenerationError
from safelight.v1.cache_pb2 import GetCacheStatsResponse, PurgeCacheResponse
from safelight.v1.generation_pb2 import Branch, CachePolicy, PixelEncoding, PreviewPolicy
from safelight.v1.quotas_pb2 import TenantQuota, TokenBucket

__all__ = [
    "Branch",
    "CacheMode",
    "CachePolicy",
    "Client",
    "Finished",
    "GenerationError",
    "GetCacheStatsResponse",
    "Origin",
    "Picture",
    "PixelEncoding",
    "Preview",
    "PreviewPolicy",
    "Progress",
    "PurgeCacheResponse",
    "TenantQuota",
    "TokenBucket",
]
