"""What a prompt of a request is for: `spec.prompts[].role`."""

from __future__ import annotations

import enum


class Role(enum.Enum):
    """What a prompt is for."""

    POSITIVE = "positive"
    NEGATIVE = "negative"
