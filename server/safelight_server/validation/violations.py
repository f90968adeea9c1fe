"""Collects the faults of one request, so that its sender sees all of them at once.

Invariant: the collected faults fit into the trailing metadata of a call (8 KiB
by default), however much the client sent.
"""

from __future__ import annotations

from collections.abc import Iterable

from safelight_server.domain.errors import FieldViolation, InvalidRequestError, NotFoundError

MAX_FAULTS = 16
MAX_SHOWN_BYTES = 72
NAME = r"[A-Za-z0-9._-]{1,64}"
"""The form of the names of tenants, models, revisions and generations."""


class Violations:
    """The violations found so far; those beyond `MAX_FAULTS` are only counted."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []
        self._num_more = 0
        self._missing: list[str] = []

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, field: str, description: str) -> None:
        """Adds a fault. `field` is its path in the proto, `description` says what to change."""
        if len(self._found) < MAX_FAULTS:
            self._found.append(FieldViolation(field, description))
        else:
            self._num_more += 1

    def add_missing(self, field: str, description: str, reason: str) -> None:
        """Adds a fault: what the field names is not there, or not for this caller. `reason` is that of the error."""
        self._missing.append(reason)
        self.add(field, description)

    def check(self, good: bool, field: str, description: str) -> bool:
        """Adds a fault unless `good`. Returns `good`."""
        if not good:
            self.add(field, description)
        return good

    def done(self) -> None:
        """Ends the checks of a request.

        Raises:
            NotFoundError: all that is wrong is that things are not there; the error lists them.
            InvalidRequestError: there are other faults; the error lists all.
        """
        if self._found and len(self._missing) == len(self._found) + self._num_more:
            raise NotFoundError(self._found[0].description, reason=self._missing[0], violations=self._found)
        if self._num_more:
            last = self._found[-1]
            self._found[-1] = FieldViolation(last.field, f"{last.description} (and {self._num_more} faults more)")
        if self._found:
            raise InvalidRequestError(self._found)


def shown(text: str) -> str:
    """Text from a client, quoted and cut to a length that fits into an error message."""
    quoted = repr(text[:MAX_SHOWN_BYTES]).encode()
    if len(text) <= MAX_SHOWN_BYTES and len(quoted) <= MAX_SHOWN_BYTES:
        return quoted.decode()
    return quoted[:MAX_SHOWN_BYTES].decode(errors="ignore") + "…"


def listed(names: Iterable[str], most: int = 12) -> str:
    """Names for an error message, separated by commas; an ellipsis stands for those beyond `most`."""
    every = list(names)
    return ", ".join(every[:most]) + (", …" if len(every) > most else "")
