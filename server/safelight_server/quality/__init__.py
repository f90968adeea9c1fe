"""What developed pictures look like, measured on a sample of them while the server runs: `measures`, then `probe`."""

from safelight_server.quality.probe import DevelopmentSample, QualityProbe

__all__ = ["DevelopmentSample", "QualityProbe"]
