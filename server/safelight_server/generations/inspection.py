"""Counts of what a server holds at one moment, for tests and debugging."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Inspection:
    """How many of each kind there are now. A server without work has zeros everywhere but in `finished`.

    Attributes:
        starting: requests that are looked up in the cache and have no outputs yet.
        live: generations that have not ended, suspended ones too.
        suspended: generations whose last stream was lost, in their grace.
        finished: ended generations that can still be watched.
        streams: streams of events that generations serve.
        outputs: outputs in the scheduler; of these
        waiting: have not started,
        running: have a slot and take steps,
        parked: keep their latents while others have their slots.
        latents: slots of latents in use, also of ended outputs whose last batch is not back.
        executions: executions that an identical output could join.
        keeping: executions and entries of the cache whose pictures are being encoded or stored.
    """

    starting: int
    live: int
    suspended: int
    finished: int
    streams: int
    outputs: int
    waiting: int
    running: int
    parked: int
    latents: int
    executions: int
    keeping: int
