"""Observability: structured logs, Prometheus metrics, OpenTelemetry traces, and background tasks that log their end."""

from safelight_server.telemetry.log import configure_logging
from safelight_server.telemetry.metrics import Metrics
from safelight_server.telemetry.tracing import UNTRACED, Stage, Tracing
from safelight_server.telemetry.trail import Trail

__all__ = ["UNTRACED", "Metrics", "Stage", "Tracing", "Trail", "configure_logging"]
