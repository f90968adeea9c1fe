"""KEDA's ExternalScaler: one metric, `replicas`, with a target of 1 per replica."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn

import grpc
import structlog

from safelight_server.scaler import externalscaler_pb2 as pb
from safelight_server.scaler.demand import Need
from safelight_server.scaler.fleets import Fleets
from safelight_server.scaler.prometheus import PrometheusError
from safelight_server.scaler.trigger import TriggerError, trigger

log = structlog.get_logger(__name__)
METRIC = "replicas"
PUSH_PERIOD_S = 5.0
"""How often a stream checks whether its fleet must be started or may be stopped."""
Context = grpc.aio.ServicerContext[Any, Any]


class ExternalScaler:
    """Serves KEDA's contract."""

    def __init__(self, fleets: Fleets, push_period_s: float = PUSH_PERIOD_S) -> None:
        self._fleets = fleets
        self._push_period_s = push_period_s

    def handler(self) -> grpc.GenericRpcHandler:
        """The handler of the whole service."""
        unary: list[tuple[str, Callable[..., Any], Any, Any]] = [
            ("IsActive", self.is_active, pb.ScaledObjectRef, pb.IsActiveResponse),
            ("GetMetricSpec", self.get_metric_spec, pb.ScaledObjectRef, pb.GetMetricSpecResponse),
            ("GetMetrics", self.get_metrics, pb.GetMetricsRequest, pb.GetMetricsResponse),
        ]
        methods = {
            name: grpc.unary_unary_rpc_method_handler(method, request.FromString, response.SerializeToString)
            for name, method, request, response in unary
        }
        methods["StreamIsActive"] = grpc.unary_stream_rpc_method_handler(
            self.stream_is_active, pb.ScaledObjectRef.FromString, pb.IsActiveResponse.SerializeToString
        )
        return grpc.method_handlers_generic_handler("externalscaler.ExternalScaler", methods)

    async def is_active(self, request: pb.ScaledObjectRef, context: Context) -> pb.IsActiveResponse:
        """Whether a fleet needs any replica."""
        return pb.IsActiveResponse(result=(await self._need(request, context)).replicas > 0)

    async def stream_is_active(
        self, request: pb.ScaledObjectRef, context: Context
    ) -> AsyncIterator[pb.IsActiveResponse]:
        """Whether a fleet needs any replica: at once, and then whenever that changes."""
        last = None
        while True:
            active = (await self._need(request, context)).replicas > 0
            if active != last:
                yield pb.IsActiveResponse(result=active)
                last = active
            await asyncio.sleep(self._push_period_s)

    async def get_metric_spec(self, request: pb.ScaledObjectRef, context: Context) -> pb.GetMetricSpecResponse:
        """The metric, with a target of 1 per replica. KEDA calls this first, so wrong metadata is refused here."""
        try:
            trigger(request.scalerMetadata)
        except TriggerError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        spec = pb.MetricSpec(metricName=METRIC, targetSize=1, targetSizeFloat=1.0)
        return pb.GetMetricSpecResponse(metricSpecs=[spec])

    async def get_metrics(self, request: pb.GetMetricsRequest, context: Context) -> pb.GetMetricsResponse:
        """The replicas that a fleet needs now."""
        need = await self._need(request.scaledObjectRef, context)
        value = pb.MetricValue(metricName=METRIC, metricValue=need.replicas, metricValueFloat=float(need.replicas))
        return pb.GetMetricsResponse(metricValues=[value])

    async def _need(self, ref: pb.ScaledObjectRef, context: Context) -> Need:
        """The need of a fleet. If its load is unknown the call fails, and KEDA leaves the fleet as it is."""
        try:
            need = await self._fleets.need(trigger(ref.scalerMetadata))
        except TriggerError as error:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, error)
        except PrometheusError as error:
            log.warning("demand_unknown", scaled_object=f"{ref.namespace}/{ref.name}", error=str(error))
            await _abort(context, grpc.StatusCode.UNAVAILABLE, error)
        by = {name: round(replicas, 3) for name, replicas in need.by.items()}
        log.debug(
            "need", scaled_object=f"{ref.namespace}/{ref.name}", replicas=need.replicas, because=need.because, **by
        )
        return need


async def _abort(context: Context, code: grpc.StatusCode, error: Exception) -> NoReturn:
    await context.abort(code, str(error))
    raise AssertionError("abort has raised")
