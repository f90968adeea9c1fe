"""One Triton server: probes whether it can be used, and runs batches on it over shared memory or gRPC.

Invariants:
- A call is waited for no longer than its limit.
- A call over shared memory is not cancelled when its limit passes, so that its
  answer, however late, frees its region.
- A server that has restarted, and so forgotten our regions, is given new ones.
- What a model with open shapes returns at a size is known once it was run at it; its first call there goes over gRPC.
"""

from __future__ import annotations

import asyncio
import enum
import functools
from collections.abc import Mapping, Sequence

import numpy as np
import structlog
import tritonclient.grpc.aio as triton
from opentelemetry import trace

from safelight_server.domain.tensors import Array, FloatArray
from safelight_server.runtime import verification
from safelight_server.runtime.base import Inputs, StableRows
from safelight_server.runtime.triton.client import CallFailed, Client, Trouble
from safelight_server.runtime.triton.models import Model, ModelKey, ServedModel, served
from safelight_server.runtime.triton.shared_memory import Region, RegionKey, RegionPool, layout
from safelight_server.telemetry import tracing

log = structlog.get_logger(__name__)

SPARE_REGIONS = 8
"""Regions that may be in quarantine, on top of one for each call that the server is given at once."""


CANNOT_SHARE = frozenset({Trouble.REGION_UNKNOWN, Trouble.FAILED, Trouble.BAD_REQUEST})
"""Answers of a server on another host, or of one in a container that does not see our /dev/shm."""


class SharedMemoryUse(enum.StrEnum):
    """Whether tensors go through shared memory. AUTO: if the server is on this host and accepts the regions."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class Server:
    """The client side of one Triton server: probes it, and runs batches on it.

    Args:
        url: HOST:PORT of the server's gRPC.
        models: the models that it has to serve.
        calls_at_once: most calls of `run` at a time.
        limit_s: timeout in seconds of every call but inference, which has its own.
    """

    def __init__(
        self, url: str, models: Sequence[Model], use: SharedMemoryUse, *, calls_at_once: int, limit_s: float
    ) -> None:
        self.url = url
        self.version = ""
        self._models = {model.key: model for model in models}
        self._served: dict[ModelKey, ServedModel] = {}
        self._sized: dict[RegionKey, ServedModel] = {}
        self._client = Client(url)
        self._limit_s = limit_s
        self._must_share = use is SharedMemoryUse.ON
        self._given_up: set[asyncio.Task[triton.InferResult]] = set()
        self._pool: RegionPool | None = None
        if use is SharedMemoryUse.ON or (use is SharedMemoryUse.AUTO and _is_this_host(url)):
            self._pool = RegionPool(self._client, max_quarantined=calls_at_once + SPARE_REGIONS, timeout_s=limit_s)

    @property
    def shares_memory(self) -> bool:
        """Whether tensors go through shared memory."""
        return self._pool is not None

    @property
    def regions(self) -> RegionPool | None:
        """The server's shared-memory regions; None if tensors go over gRPC."""
        return self._pool

    def served(self, key: ModelKey) -> ServedModel:
        """A model as this server describes it; only after a successful probe."""
        return self._served[key]

    async def probe(self, work_limit_s: float) -> str:
        """Checks that the server can be used: readiness, models, and an example call of each model.

        Args:
            work_limit_s: timeout in seconds of each call of a model.

        Returns:
            A fingerprint of the outputs: equal for servers that compute the same bits.

        Raises:
            CallFailed: the server cannot be used now.
            ModelMismatch: the server has other models than our repository.
        """
        names = [(model.name, model.version) for model in self._models.values()]
        if missing := await self._client.ready(names, self._limit_s):
            raise CallFailed(Trouble.MODEL_GONE, ", ".join(missing))
        self.version = await self._client.version(self._limit_s)
        self._sized.clear()
        for key, model in self._models.items():
            self._served[key] = served(model, await self._client.config(model.name, model.version, self._limit_s))
        if self._pool is not None:
            self._pool.known(await self._client.regions(self._limit_s))
        prints = []
        for key in sorted(self._models):
            call = functools.partial(self._run_over_grpc, key, limit_s=work_limit_s)
            prints.append(await verification.fingerprint(call, self._served[key].specs()))
        if self._pool is not None:
            await self._prove_shared_memory(min(self._models), prints[0], work_limit_s)
        return "-".join(prints)

    async def run(self, key: ModelKey, inputs: Inputs, limit_s: float) -> dict[str, FloatArray]:
        """Runs one batch through a model, over shared memory if there is a region for it, else over gRPC.

        Raises:
            CallFailed: the call failed, or was given up after `limit_s` seconds.
        """
        tracing.current().note({"server.address": self.url})
        for last in (False, True):
            region = await self._region(key, inputs)
            if region is None:
                return await self._run_over_grpc(key, inputs, limit_s=limit_s)
            try:
                return await self._run_in(region, key, inputs, limit_s)
            except CallFailed as failure:
                if failure.trouble is not Trouble.REGION_UNKNOWN or last:
                    raise
                assert self._pool is not None
                self._pool.known(await self._client.regions(self._limit_s))  # the server restarted unnoticed
        raise AssertionError("unreachable")

    async def close(self) -> None:
        """Cancels the calls that were given up, frees the shared memory and closes the channel."""
        for call in self._given_up:
            call.cancel()
        if self._given_up:
            await asyncio.wait(self._given_up)
        if self._pool is not None:
            await self._pool.close()
        await self._client.close()

    # --- shared memory ---

    async def _prove_shared_memory(self, key: ModelKey, expected: str, limit_s: float) -> None:
        """Runs a model over shared memory and compares the outputs with those over gRPC (`expected`)."""
        try:
            call = functools.partial(self.run, key, limit_s=limit_s)
            if await verification.fingerprint(call, self._served[key].specs()) == expected:
                return
            failure = CallFailed(Trouble.REGION_UNKNOWN, "the server reads other bytes there than were written")
        except CallFailed as error:
            if error.trouble not in CANNOT_SHARE or self._must_share:
                raise
            failure = error
        if self._must_share:
            raise failure
        assert self._pool is not None
        log.info("no_shared_memory_with", url=self.url, why=str(failure))
        await self._pool.close()
        self._pool = None

    async def _region(self, key: ModelKey, inputs: Inputs) -> Region | None:
        at = self._served[key]
        use = key, at.shapes(inputs)
        tensors = layout(self._sized.get(use, at))
        if self._pool is None or tensors is None:
            return None
        return await self._pool.take(use, tensors, at.max_rows)

    async def _run_in(self, region: Region, key: ModelKey, inputs: Inputs, limit_s: float) -> dict[str, FloatArray]:
        assert self._pool is not None
        model, at = self._models[key], self._sized.get(region.use, self._served[key])
        with tracing.current().within("prepare"):
            places = region.write(inputs)
            rows = len(places)
            asked = []
            for name in inputs:
                tensor = at.inputs[name]
                asked.append(triton.InferInput(name, [rows, *tensor.dims], tensor.datatype))
                asked[-1].set_shared_memory(region.name, rows * tensor.row_bytes, region.places[name].offset)
            wanted = [triton.InferRequestedOutput(name) for name in at.outputs]
            for output, tensor in zip(wanted, at.outputs.values(), strict=True):
                output.set_shared_memory(region.name, rows * tensor.row_bytes, region.places[tensor.name].offset)
            call = asyncio.create_task(
                self._client.infer(model.name, model.version, asked, wanted, queue_s=limit_s, headers=_trace_headers())
            )
        try:
            with tracing.current().within("await"):
                await asyncio.wait({call}, timeout=limit_s)
        finally:
            self._settle(region, call)
        if not call.done():
            raise CallFailed(Trouble.HUNG, f"{model.name}, {rows} rows, given up after {limit_s:.2f} s")
        result = call.result()  # raises CallFailed if the call failed
        try:
            with tracing.current().within("collect"):
                for name in at.outputs:
                    check_rows(result, name, rows, model)
                return {name: region.read(name, places) for name in at.outputs}
        finally:
            self._pool.give_back(region)

    def _settle(self, region: Region, call: asyncio.Task[triton.InferResult]) -> None:
        """Decides about a call's region: reused if the server answered with a failure, else quarantined."""
        pool = self._pool
        assert pool is not None
        if not call.done():
            pool.quarantine(region)
            self._given_up.add(call)
            call.add_done_callback(functools.partial(self._answered_late, region))
        elif isinstance(failure := call.exception(), CallFailed) and failure.answered:
            pool.give_back(region)
        elif failure is not None:
            pool.quarantine(region)

    def _answered_late(self, region: Region, call: asyncio.Task[triton.InferResult]) -> None:
        self._given_up.discard(call)
        if call.cancelled() or self._pool is None:
            return
        failure = call.exception()
        if failure is None or (isinstance(failure, CallFailed) and failure.answered):
            log.info("answered_late", url=self.url)
            self._pool.give_back(region)

    # --- gRPC ---

    async def _run_over_grpc(self, key: ModelKey, inputs: Inputs, *, limit_s: float) -> dict[str, FloatArray]:
        model, at = self._models[key], self._served[key]
        with tracing.current().within("prepare"):
            asked = []
            for name, given in inputs.items():
                rows: Array = given.array() if isinstance(given, StableRows) else given
                tensor = at.inputs[name]
                dims = tensor.dims if tensor.is_static else rows.shape[1:]
                asked.append(triton.InferInput(name, [len(rows), *dims], tensor.datatype))
                asked[-1].set_data_from_numpy(rows.reshape(len(rows), *dims))
            wanted = [triton.InferRequestedOutput(name) for name in at.outputs]
        with tracing.current().within("await"):
            result = await self._client.infer(
                model.name,
                model.version,
                asked,
                wanted,
                queue_s=limit_s,
                timeout_s=limit_s,
                headers=_trace_headers(),
            )
        with tracing.current().within("collect"):
            for name in at.outputs:
                check_rows(result, name, len(rows), model)
            results = {name: np.asarray(result.as_numpy(name), np.float32) for name in at.outputs}
            if shapes := at.shapes(inputs):
                self._sized.setdefault((key, shapes), at.sized(inputs, results))
            return results


def check_rows(result: triton.InferResult, name: str, rows: int, model: Model) -> None:
    """Checks that an output has as many rows as the call; if not, the answer belongs to another call.

    Raises:
        CallFailed: the output is missing or has another number of rows.
    """
    output = result.get_output(name)
    if output is None:
        raise CallFailed(Trouble.FAILED, f"{model.name} left out {name}")
    if output.shape[0] != rows:
        raise CallFailed(Trouble.OUT_OF_STEP, f"{model.name}: {output.shape[0]} rows of {name} for {rows}")


def _is_this_host(url: str) -> bool:
    host = url.rsplit(":", 1)[0].strip("[]")
    return url.startswith("unix:") or host == "localhost" or host == "::1" or host.startswith("127.")


def _trace_headers() -> Mapping[str, str] | None:
    """W3C traceparent header of the current span; None if it is not sampled, since Triton ignores the sampled flag."""
    at = trace.get_current_span().get_span_context()
    if not at.is_valid or not at.trace_flags.sampled:
        return None
    return {"traceparent": f"00-{trace.format_trace_id(at.trace_id)}-{trace.format_span_id(at.span_id)}-01"}
