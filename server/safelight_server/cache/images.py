"""Keeps the pictures that clients upload, each under the SHA-256 of its file, for the tenant that sent it.

They are stored in the tiers of the cache, sealed like all entries, under the tenant's own prefix and never in a pool.
If replicas share a tier, an upload succeeds only when that tier has it, so that every replica finds it. A picture is
dropped when its time is over, when newer pictures of its tenant need the room, or when a tier evicts it; a client that
still needs it uploads it again.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from dataclasses import dataclass

from safelight_server.cache.namespaces import MAX_SPACES, Namespaces
from safelight_server.domain.errors import UnavailableError
from safelight_server.domain.uploads import PictureFile
from safelight_server.storage.keyring import Keyring
from safelight_server.storage.sealed import Entry
from safelight_server.storage.tiers import TierHit, Tiers

ENTRY_BYTES = 1024
"""Added to the size of each picture's file, so that the number of small pictures is bounded too."""


@dataclass(frozen=True, slots=True)
class UploadedImage:
    """An uploaded picture.

    Attributes:
        digest: SHA-256 of its file in hexadecimal.
        data: the file.
        expires_at: Unix seconds.
    """

    digest: str
    facts: PictureFile
    data: bytes
    expires_at: float


class Images:
    """The uploaded pictures of all tenants.

    Args:
        ttl_s: how long a picture is kept after it was sent or used.
        max_tenant_bytes: bound on the pictures that this replica has received from a tenant.
        shared: whether other replicas must find what is uploaded here.
    """

    def __init__(
        self,
        tiers: Tiers,
        keyring: Keyring,
        namespaces: Namespaces,
        *,
        ttl_s: float,
        max_tenant_bytes: int,
        shared: bool = False,
    ) -> None:
        self._tiers = tiers
        self._keyring = keyring
        self._namespaces = namespaces
        self._ttl_s = ttl_s
        self._max_tenant_bytes = max_tenant_bytes
        self._shared = shared
        self._sizes_by_tenant: dict[
            str, OrderedDict[str, int]
        ] = {}  # sizes by digest, of each tenant; the oldest first

    async def put(self, tenant: str, digest: str, data: bytes, facts: PictureFile) -> UploadedImage:
        """Keeps a picture.

        Raises:
            UnavailableError: no tier has stored it, or the tier that all replicas read has not.
        """
        image = UploadedImage(digest, facts, data, self._tiers.now() + self._ttl_s)
        await self._write(tenant, image)
        taken = self._sizes_by_tenant.setdefault(tenant, OrderedDict())
        taken[digest] = len(data) + ENTRY_BYTES
        taken.move_to_end(digest)
        while sum(taken.values()) > self._max_tenant_bytes and len(taken) > 1:
            oldest, _ = taken.popitem(last=False)
            await self._tiers.delete(self._key(tenant, oldest))
        if len(self._sizes_by_tenant) > MAX_SPACES:
            del self._sizes_by_tenant[next(iter(self._sizes_by_tenant))]
        return image

    async def get(self, tenant: str, digest: str, *, use: bool = False) -> UploadedImage | None:
        """Returns a picture of a tenant, or None where it has none of this digest.

        Args:
            use: whether this counts as a use, which extends its time.

        Raises:
            StoreError: a tier that all replicas share failed, and may have the picture.
        """
        deletions = self._tiers.num_deletions
        found = await self._tiers.get(self._key(tenant, digest), sure=True)
        if found is None:
            return None
        image = _image(digest, found)
        if use:
            if (taken := self._sizes_by_tenant.get(tenant)) is not None and digest in taken:
                taken.move_to_end(digest)
            old = image.expires_at - self._tiers.now() < self._ttl_s / 2
            if old and self._tiers.undisturbed(deletions):  # else what a purge has just deleted would be written again
                image = UploadedImage(digest, image.facts, image.data, self._tiers.now() + self._ttl_s)
                with contextlib.suppress(UnavailableError):  # then its time is not extended, but it is there now
                    await self._write(tenant, image)
        return image

    async def _write(self, tenant: str, image: UploadedImage) -> None:
        key, at = self._key(tenant, image.digest), image.facts
        facts = {"type": at.media_type, "width": str(at.width_px), "height": str(at.height_px)}
        replicated = await self._tiers.put(key, Entry(image.data, facts), self._ttl_s, replicate=self._shared)
        if not replicated and (self._shared or await self._tiers.gone(key)):
            what = "the storage that replicas share" if self._shared else "the server's storage"
            raise UnavailableError(
                f"{what} has not taken the picture; try again", reason="IMAGE_NOT_STORED", retry_after_s=1.0
            )

    def _key(self, tenant: str, digest: str) -> str:
        return f"{self._namespaces.own_prefix(tenant)}/image/{self._keyring.digest('image', digest)}"


def _image(digest: str, found: TierHit) -> UploadedImage:
    at = found.entry.metadata
    facts = PictureFile(at["type"], int(at["width"]), int(at["height"]))
    return UploadedImage(digest, facts, found.entry.data, found.expires_at)
