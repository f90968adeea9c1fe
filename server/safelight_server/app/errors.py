"""The error that ends the start of a process of the server."""

from __future__ import annotations


class StartError(Exception):
    """The server cannot start; the message says why."""
