"""What developed pictures look like, measured on a sample of them while the server runs: `measures`, then `probe`.

`judge` measures prompt agreement, where the operator has a CLIP.
"""

from safelight_server.quality.probe import DevelopmentSample, Judge, QualityProbe

__all__ = ["DevelopmentSample", "Judge", "QualityProbe"]
