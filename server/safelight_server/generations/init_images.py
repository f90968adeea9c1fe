"""Loads the pictures that generations start from, follow, or have as a prompt: from their tenant's uploads to pixels.

An output of another generation becomes an upload of its tenant first. So a picture
depends on the content that it started from and not on a generation's life, and any
replica can read that content again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor

from safelight_server.cache.images import Images
from safelight_server.catalog.manifest import ImagePromptRoom
from safelight_server.domain.caller import Caller
from safelight_server.domain.errors import (
    FailedPreconditionError,
    FieldViolation,
    InvalidRequestError,
    NotFoundError,
)
from safelight_server.domain.events import FinishReason
from safelight_server.domain.picture import EncodedPicture, Pixels, picture_file
from safelight_server.domain.request import IMAGE_PROMPT_FIELD, MediaType, Spec
from safelight_server.domain.uploads import (
    PictureFile,
    PictureFileError,
    decode_image_prompt,
    decode_mask,
    decode_picture,
)
from safelight_server.engine.jobs import ImagePrompt, InitImage
from safelight_server.engine.latents import RowControl
from safelight_server.generations.generation import Generation
from safelight_server.threads import FairTurns, OneAtATime

MOST_READ = 4
"""Files of pictures in memory at once, for generations that are about to begin."""


class InitImages:
    """Loads and decodes pictures, one at a time, as a large one takes much memory while it is decoded.

    Args:
        pool: threads for decoding.
        max_pixels: of a picture.
    """

    def __init__(self, images: Images, pool: Executor, max_pixels: int) -> None:
        self._images = images
        self._pool = pool
        self._max_pixels = max_pixels
        self._reading = FairTurns(MOST_READ)
        self._decoding = OneAtATime(pool)

    async def load(self, tenant: str, spec: Spec, *, needs_mask: bool = False) -> InitImage | None:
        """The init image of a spec with its mask; None: the spec starts from noise.

        Args:
            needs_mask: whether the spec's model only inpaints.

        Raises:
            NotFoundError: the tenant has no such picture.
            InvalidRequestError: the picture exceeds the server's bounds, which have changed since the upload, or a
                mask is needed.
            StoreError: a tier that replicas share has failed.
        """
        if needs_mask and not spec.mask:  # it was accepted by a replica with another revision
            raise InvalidRequestError([FieldViolation("spec.mask", "the model only develops a part of a picture anew")])
        if not spec.init_image:
            return None
        size = spec.width_px, spec.height_px
        pixels = await self._decoded(tenant, spec.init_image, "spec.init_image", decode_picture, *size)
        mask = None
        if spec.mask:
            mask = await self._decoded(tenant, spec.mask, "spec.mask", decode_mask, *size)
        return InitImage(spec.init_image, pixels, mask, spec.mask)

    async def load_controls(self, tenant: str, spec: Spec, offered: Sequence[str]) -> tuple[RowControl, ...]:
        """The controls of a spec with their pictures.

        Args:
            offered: the model's control networks, in their order.

        Raises:
            NotFoundError: the tenant has no such picture, or the model no such network any more.
            InvalidRequestError: as `load`.
            StoreError: a tier that replicas share has failed.
        """
        found, size = [], (spec.width_px, spec.height_px)
        for control in spec.controls:
            if control.name not in offered:  # it was accepted by a replica with another revision
                what = f"the model has no control {control.name}; ListModels shows what it has"
                raise NotFoundError(what, reason="CONTROL_NOT_FOUND")
            pixels = await self._decoded(tenant, control.image, f"spec.{control.field}", decode_picture, *size)
            steps = control.steps(spec.num_inference_steps)
            found.append(RowControl(offered.index(control.name), pixels, control.scale, steps))
        return tuple(found)

    async def load_image_prompt(self, tenant: str, spec: Spec, room: ImagePromptRoom | None) -> ImagePrompt | None:
        """The image prompt of a spec; None: it has none.

        Args:
            room: of the spec's model.

        Raises:
            NotFoundError, InvalidRequestError, StoreError: as `load`.
        """
        if not spec.image_prompt:
            return None
        if room is None:  # it was accepted by a replica with another revision
            raise InvalidRequestError([FieldViolation("spec.image_prompt", "the model takes no image prompt")])
        field = f"spec.{IMAGE_PROMPT_FIELD}"
        pixels = await self._decoded(tenant, spec.image_prompt, field, decode_image_prompt, room.edge_px)
        return ImagePrompt(spec.image_prompt, pixels, spec.image_prompt_scale)

    async def keep_outputs(self, generation: Generation, find: Callable[[Caller, str], Awaitable[Generation]]) -> None:
        """Keeps the outputs that a generation starts from as pictures of its tenant, which its request then names.

        Args:
            find: returns the generation of a tenant with an id.

        Raises:
            NotFoundError, FailedPreconditionError, InvalidRequestError, UnavailableError: an output cannot be used.
        """
        request, digests = generation.request, dict[str, str]()
        for field, name in request.spec.named_outputs.items():
            _, identifier, _, index = name.split("/")
            try:
                source = await find(generation.caller, identifier)
            except NotFoundError:
                raise output_not_found(name, f"spec.{field}") from None
            digests[field] = await self.keep_output(source, int(index), f"spec.{field}")
        if digests:
            generation.request = dataclasses.replace(request, spec=request.spec.with_images(digests))

    async def keep_output(self, source: Generation, index: int, field: str) -> str:
        """Keeps the picture of an output as if its client had uploaded it. Returns its digest.

        Args:
            field: the field of the request that names the output, for errors.

        Raises:
            InvalidRequestError: there is no such output, or its picture is a texture.
            FailedPreconditionError: it has no picture, or not yet.
            NotFoundError: the picture is not kept any more.
            UnavailableError: no store takes the picture now.
        """
        name = f"{source.name}/outputs/{index}"
        if index >= len(source.outputs):
            what = f"{source.name} has {len(source.outputs)} outputs, from 0 on"
            raise InvalidRequestError([FieldViolation(field, what)])
        output, picture = source.outputs[index], source.log.picture(index)
        if output.reason is None or (picture is None and source.owned and output.reason is FinishReason.COMPLETED):
            what = f"{name} is not finished; wait for it, then ask again"
            raise _no_picture(what, field, reason="OUTPUT_NOT_FINISHED")
        if output.reason is not FinishReason.COMPLETED:
            what = f"{name} has no picture: it ended as {output.reason.name}"
            raise _no_picture(what, field, reason="OUTPUT_HAS_NO_PICTURE")
        if picture is None:
            raise output_not_found(name, field)
        if picture.media_type is MediaType.KTX2:
            what = f"{name} is a texture, which nothing can start from; take one of another encoding, such as image/png"
            raise InvalidRequestError([FieldViolation(field, what)])
        bottom_up = source.request.encoding.bottom_up
        digest, data, facts = await asyncio.get_running_loop().run_in_executor(self._pool, _file, picture, bottom_up)
        await self._images.put(source.caller.tenant, digest, data, facts)
        return digest

    async def _decoded(self, tenant: str, digest: str, field: str, decode: Callable[..., Pixels], *size: int) -> Pixels:
        async with self._reading.turn(tenant):  # before its file is read: as many as wait would be in memory
            found = await self._images.get(tenant, digest, use=True)
            if found is None:
                raise image_not_found(digest, field)
            try:
                return await self._decoding.run(tenant, decode, found.data, self._max_pixels, *size)
            except PictureFileError as error:
                raise InvalidRequestError([FieldViolation(field, str(error))]) from None


def image_not_found(digest: str, field: str) -> NotFoundError:
    """The error for a picture that the tenant never uploaded, or that is no longer kept."""
    return _not_found(f"there is no images/{digest}; upload it, or upload it again", field)


def output_not_found(name: str, field: str) -> NotFoundError:
    """The error for an output that the tenant does not have, or no longer has."""
    return _not_found(f"there is no {name}, or it is no longer kept; upload its picture instead", field)


def _not_found(what: str, field: str) -> NotFoundError:
    return NotFoundError(what, reason="IMAGE_NOT_FOUND", violations=[FieldViolation(field, what)])


def _no_picture(what: str, field: str, *, reason: str) -> FailedPreconditionError:
    return FailedPreconditionError(what, reason=reason, violations=[FieldViolation(field, what)])


def _file(picture: EncodedPicture, bottom_up: bool) -> tuple[str, bytes, PictureFile]:
    """The digest, the bytes and the facts of a picture's file. Slow enough for a thread."""
    file = picture_file(picture, bottom_up=bottom_up)
    facts = PictureFile(file.media_type.value, file.width_px, file.height_px)
    return hashlib.sha256(file.data).hexdigest(), file.data, facts
