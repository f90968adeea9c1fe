"""Runs components on several Triton servers as one set of instances; implements `runtime.base.Runtime`.

The first server that passes its probe at start is the reference: batches are
verified and measured on it. Every other server, and each server that returns,
must give the same bits before it takes calls, so that a generation can continue
on any of them.

A server that causes a failure is ejected, and the failure is reported with
`FaultOrigin.INSTANCE`. A background task probes ejected servers until they pass
again.
"""

from __future__ import annotations

import asyncio
import functools
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import structlog

from safelight_server.catalog.catalog import Catalog, ManifestError
from safelight_server.catalog.config_pbtxt import ConfigError
from safelight_server.domain.component import Component
from safelight_server.domain.tensors import FloatArray
from safelight_server.runtime import verification
from safelight_server.runtime.base import CostCurve, FaultOrigin, Inputs, RuntimeFailure, RuntimeStartError
from safelight_server.runtime.triton.client import BUSY, ENDPOINT_DOWN, CallFailed, Trouble
from safelight_server.runtime.triton.endpoints import Backoff, CallTicket, Endpoints, EndpointState
from safelight_server.runtime.triton.models import ModelKey, ModelMismatch, models_of, most_rows, weight_bytes
from safelight_server.runtime.triton.server import Server, SharedMemoryUse
from safelight_server.sampler import VERSION as SAMPLER_VERSION
from safelight_server.telemetry.background import keep_running

log = structlog.get_logger(__name__)

EMBEDDED_BYTES = 256 << 20
"""Larger weights are not loaded into the gateway to compare bits; their numerics id then names the servers."""
START_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class TritonOptions:
    """Settings of the Triton runtime.

    Attributes:
        urls: HOST:PORT of each server's gRPC.
        shared_memory: whether tensors go through shared memory; "auto": to servers on this host that accept it.
        calls_each: most calls that a server is given at once.
        timeout_factor: a call is given up after so many times its measured duration.
        timeout_floor_s: no call is given up before so many seconds.
        start_s: seconds that `start` waits for the first server.
        probe_max_s: longest wait in seconds between two probes of a server that is down.
    """

    urls: tuple[str, ...]
    shared_memory: Literal["auto", "on", "off"] = "auto"
    calls_each: int = 1
    timeout_factor: float = 10.0
    timeout_floor_s: float = 2.0
    start_s: float = 60.0
    probe_max_s: float = 0.25


class TritonRuntime:
    """A `Runtime` that spreads calls over several Triton servers, and ejects and probes those that fail.

    Args:
        clock: monotonic seconds.
    """

    name = "triton"

    def __init__(self, catalog: Catalog, options: TritonOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self._catalog = catalog
        self._options = options
        self._clock = clock
        try:
            models = models_of(catalog)
        except ConfigError as error:
            raise ManifestError(str(error)) from None
        self.servers = [
            Server(
                url,
                models,
                SharedMemoryUse(options.shared_memory),
                calls_at_once=options.calls_each,
                limit_s=options.timeout_floor_s,
            )
            for url in options.urls
        ]
        self.endpoints = Endpoints(
            len(options.urls), options.calls_each, Backoff(max_s=options.probe_max_s), random.random
        )
        self.num_instances = self.endpoints.num_instances
        self._costs: dict[ModelKey, CostCurve] = {}
        self._fingerprint = ""
        self._numerics_ids: dict[str, str] = {}
        self._why_down = ["not probed yet"] * len(options.urls)
        self._changed: Callable[[], None] = lambda: None
        self._wake = asyncio.Event()
        self._probes: set[asyncio.Task[None]] = set()
        self._prober: asyncio.Task[None] | None = None

    # --- start ---

    async def start(self) -> None:
        """Waits for a server that passes its probe, verifies and measures on it, and starts the probes of the others.

        Raises:
            RuntimeStartError: no server could be used within `start_s`.
        """
        until = self._clock() + self._options.start_s
        while not self._costs:
            await asyncio.gather(*(self._probe(at) for at in self.endpoints.probe(self._clock())))
            for at, server in enumerate(self.servers):
                if not self._costs and self.endpoints.state(at) is EndpointState.UP:
                    await self._measure(at, server)
            if not self._costs:
                if self._clock() > until:
                    await self.close()
                    raise RuntimeStartError("no Triton server can be used: " + "; ".join(self._why()))
                await asyncio.sleep(START_PAUSE_S)
        self._numerics_ids = await self._name_numerics()
        numerics = sorted(set(self._numerics_ids.values()))
        log.info("triton", live=self.num_live, of=self.num_instances, numerics=", ".join(numerics))
        self._prober = asyncio.create_task(keep_running(self._keep_probing, "probes of Triton servers"))

    async def _measure(self, at: int, server: Server) -> None:
        """Verifies and measures every component on one server; ejects the server if that fails."""
        costs: dict[ModelKey, CostCurve] = {}
        limit_s = self._canary_limit_s()
        ticket = self.endpoints.begin(at * self._options.calls_each, 0.0)
        try:
            for pipeline in self._catalog.pipelines.values():
                for component in pipeline.files:
                    key = (pipeline.name, component)
                    call = functools.partial(server.run, key, limit_s=limit_s)
                    model = server.served(key)
                    at_sizes = verification.at_sizes(model.specs(), pipeline)
                    bound = most_rows(at_sizes, model.max_rows)
                    cost = await verification.warm_up_sizes(call, at_sizes, bound)
                    if cost is None:
                        raise ModelMismatch(f"{key[0]}/{component}: the same row gives other bits when it is run again")
                    costs[key] = cost
        except (CallFailed, ModelMismatch, ManifestError) as failure:
            self._why_down[at] = str(failure)
            self.endpoints.eject(ticket, self._clock())
            if not self.num_live:
                self._fingerprint = ""
        else:
            self._costs = costs
        finally:
            self.endpoints.end(ticket)

    async def _name_numerics(self) -> dict[str, str]:
        """By model the `onnx` runtime's numerics id if it computes the same bits (compared here), else the servers'."""
        precisions = {name: pipeline.precision for name, pipeline in self._catalog.pipelines.items()}
        prints = []
        for pipeline in self._catalog.pipelines.values():
            if weight_bytes(pipeline.files.values()) > EMBEDDED_BYTES:
                break
            for component in sorted(pipeline.files):
                prints.append((pipeline.name, component, pipeline.files[component]))
        else:
            from safelight_server.runtime import onnx  # loads onnxruntime, which large models never need here

            try:
                embedded = [await asyncio.to_thread(onnx.fingerprint, file) for _, _, file in sorted(prints)]
            except (ManifestError, RuntimeFailure) as error:
                log.info("embedded_runtime_cannot_compare", why=str(error))
            else:
                if "-".join(embedded) == self._fingerprint:
                    return {name: onnx.numerics_id(precision) for name, precision in precisions.items()}
        version = next(server.version for server in self.servers if server.version)
        servers = f"triton-{version}-{self._fingerprint.replace('-', '')[:16]}"
        return {
            name: f"{servers}{'' if precision == 'f32' else f'-{precision}'}-s{SAMPLER_VERSION}"
            for name, precision in precisions.items()
        }

    def _why(self) -> list[str]:
        return [f"{server.url}: {why}" for server, why in zip(self.servers, self._why_down, strict=True)]

    # --- called by the engine ---

    @property
    def num_live(self) -> int:
        """Number of instances on servers that are UP."""
        return self.endpoints.num_live

    def usable(self, free: Collection[int]) -> Sequence[int]:
        """Free instances on servers that take calls, the least loaded server first."""
        return self.endpoints.usable(free)

    def watch(self, changed: Callable[[], None]) -> None:
        """Sets the callback for changes: a server becomes usable or is ejected."""
        self._changed = changed

    def max_rows(self, model: str, component: Component) -> int:
        """Largest batch, in rows, that was verified to be bit-equal to single rows."""
        return self._costs[model, component].rows[-1]

    def cost(self, model: str, component: Component) -> CostCurve:
        """The cost curve measured on the reference server, network time included."""
        return self._costs[model, component]

    def batch_tolerance(self, model: str) -> float:
        """0: batches are bit-equal to single rows."""
        return 0.0

    def numerics_id(self, model: str) -> str:
        """The `onnx` runtime's id if the servers give the same bits, else Triton's version and a digest of the bits."""
        return self._numerics_ids[model]

    async def run(self, instance: int, model: str, component: Component, inputs: Inputs) -> Mapping[str, FloatArray]:
        """Runs one batch on the instance's server; ejects the server if the failure is the server's.

        Raises:
            RuntimeFailure: the call failed.
        """
        key = (model, component)
        seconds = self._costs[key].at(len(next(iter(inputs.values()))))
        ticket = self.endpoints.begin(instance, seconds)
        ahead = self.endpoints.num_calls(ticket.endpoint)
        limit_s = max(self._options.timeout_floor_s, self._options.timeout_factor * seconds * ahead)
        try:
            results = await self.servers[ticket.endpoint].run(key, inputs, limit_s)
        except CallFailed as failure:
            self.endpoints.end(ticket)
            url = self.servers[ticket.endpoint].url
            fault = FaultOrigin.ROWS
            if failure.trouble in ENDPOINT_DOWN:
                fault = FaultOrigin.INSTANCE
                self._ejected(ticket, failure, self.endpoints.eject(ticket, self._clock()))
            elif failure.trouble in BUSY:
                self._ejected(ticket, failure, self.endpoints.refused(ticket, self._clock()))
                fault = FaultOrigin.NOBODY
            retryable = failure.trouble is not Trouble.BAD_REQUEST
            raise RuntimeFailure(f"{url}: {failure}", retryable=retryable, fault=fault) from failure
        except BaseException:
            self.endpoints.end(ticket)
            raise
        self.endpoints.end(ticket)
        self.endpoints.succeeded(ticket)
        return results

    def _ejected(self, ticket: CallTicket, failure: CallFailed, is_new: bool) -> None:
        if is_new:
            log.warning("server_ejected", url=self.servers[ticket.endpoint].url, why=str(failure))
            self._why_down[ticket.endpoint] = str(failure)
            self._wake.set()
            self._changed()

    async def close(self) -> None:
        """Cancels the probes, gives up calls that hang and frees the shared memory."""
        self._changed = lambda: None
        tasks = [*self._probes, *([self._prober] if self._prober else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for server in self.servers:
            await server.close()

    # --- probes ---

    async def _keep_probing(self) -> None:
        """Starts probes when they are due, until cancelled."""
        while True:
            for at in self.endpoints.probe(self._clock()):
                task = asyncio.create_task(self._probe(at))
                self._probes.add(task)
                task.add_done_callback(self._probes.discard)
            due = self.endpoints.next_probe()
            try:
                await asyncio.wait_for(self._wake.wait(), None if due is None else max(0.0, due - self._clock()) + 1e-3)
            except TimeoutError:
                continue
            self._wake.clear()

    def _canary_limit_s(self) -> float:
        """Seconds that a call of a probe may take; before costs are measured, as long as the start may take."""
        options, rows = self._options, max(verification.CANARY_ROWS)
        if not self._costs:
            return max(options.timeout_floor_s, options.start_s)
        slowest_s = max(cost.at(rows) for cost in self._costs.values())
        return max(options.timeout_floor_s, options.timeout_factor * slowest_s)

    async def _probe(self, at: int) -> None:
        server, why = self.servers[at], ""
        try:
            fingerprint = await server.probe(self._canary_limit_s())
        except (CallFailed, ModelMismatch) as failure:
            why = str(failure)
        except Exception as bug:  # without this, a server whose probe failed so would never be probed again
            log.exception("bug", url=server.url)
            why = repr(bug)
        else:
            self._fingerprint = self._fingerprint or fingerprint
            if fingerprint != self._fingerprint:
                why = "its outputs differ bit for bit from those of the servers in use"
        if why and why != self._why_down[at]:
            log.warning("server_not_usable", url=server.url, why=why)
        self._why_down[at] = why
        self.endpoints.probed(at, not why, self._clock())
        self._wake.set()
        if not why:
            log.info("server_usable", url=server.url, shared_memory=server.shares_memory)
            self._changed()
