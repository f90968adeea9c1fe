"""The alphas of a LoRA's layers, as peft's configuration gives them: one for all, and others by patterns of names.

The patterns are regular expressions, and a configuration may come in a downloaded
file. Some expressions take years to match a name, in which nothing else of this
process runs. So only expressions that are quick to match are taken.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from safelight_server.catalog.adapter_names import plain_name

NAME_PATTERN = re.compile(r"[\w.-]+")
"""A pattern that is the name of a layer, or the end of one. Its dots match anything, as those of an expression do."""
REPEATS, CHOICES = re.compile(r"[*+?{]"), re.compile(r"\|")
"""What lets an expression match a name in many ways. Repeats in repeats and choices in repeats multiply."""
MAX_CHOICES = 8
MAX_EXPRESSIONS = 16
"""Patterns that are no names; of names there may be one for each layer."""
MAX_PATTERN_CHARS = 200


class AlphaError(Exception):
    """The alphas cannot be used; the message says why."""


class Alphas:
    """The alphas of a configuration.

    Attributes:
        use_rslora: whether an alpha is divided by the root of the rank, and not by the rank.

    Raises:
        AlphaError: an alpha is no number, a pattern is no expression or may take long, or it is not of a plain LoRA.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        if settings.get("use_dora"):
            raise AlphaError("is a DoRA, whose magnitudes this server does not know")
        self.use_rslora = bool(settings.get("use_rslora"))
        self._names: dict[str, tuple[int, float]] = {}  # place among the patterns, and alpha
        self._expressions: list[tuple[int, re.Pattern[str], float]] = []
        try:
            found = settings.get("lora_alpha")
            self._of_all = None if found is None else float(found)
            for place, (pattern, alpha) in enumerate(settings.get("alpha_pattern", {}).items()):
                self._add(place, pattern, float(alpha))
        except (TypeError, ValueError, OverflowError, AttributeError, RecursionError, re.error):
            raise AlphaError("has a configuration with a malformed alpha") from None

    def _add(self, place: int, pattern: str, alpha: float) -> None:
        if NAME_PATTERN.fullmatch(pattern):
            self._names.setdefault(plain_name(pattern), (place, alpha))
            return
        repeats, choices = len(REPEATS.findall(pattern)), len(CHOICES.findall(pattern))
        if len(pattern) > MAX_PATTERN_CHARS or repeats > 1 or choices > (0 if repeats else MAX_CHOICES):
            raise AlphaError(f"has an alpha_pattern that may take too long to match: {pattern[:MAX_PATTERN_CHARS]}")
        self._expressions.append((place, re.compile(rf"(.*\.)?({pattern})"), alpha))
        if len(self._expressions) > MAX_EXPRESSIONS:
            raise AlphaError(f"has more than {MAX_EXPRESSIONS} alpha_patterns that are no names of layers")

    def of(self, names: Sequence[str]) -> float | None:
        """The alpha of a layer: that of the first pattern that ends one of its names, else that of all; None: no alpha.

        Args:
            names: what the layer may be called; at most `adapters.MAX_KEY_CHARS` long.
        """
        ends = [end for name in names for end in _ends(name)]
        found = [self._names[end] for end in ends if end in self._names]
        found += [(place, alpha) for place, at, alpha in self._expressions if any(map(at.fullmatch, names))]
        return min(found)[1] if found else self._of_all


def _ends(name: str) -> list[str]:
    """A name, and what is behind each of its dots, as `plain_name` has them."""
    parts = name.split(".")
    return ["_".join(parts[first:]) for first in range(len(parts))]
