"""What the server tells its operators: logs, metrics, traces."""

from safelight_server.telemetry.log import configure_logging
from safelight_server.telemetry.metrics import Metrics
from safelight_server.telemetry.tracing import Tracing

__all__ = ["Metrics", "Tracing", "configure_logging"]
