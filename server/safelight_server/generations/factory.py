"""Makes generations: of a request that has come, or of the record of one that another replica accepted."""

from __future__ import annotations

import functools
from collections.abc import Callable

from safelight_server.cluster.records import GenerationRecord
from safelight_server.domain.caller import Caller
from safelight_server.domain.errors import SafelightError
from safelight_server.domain.request import Request
from safelight_server.generations.generation import Generation
from safelight_server.prices import ComputePrice
from safelight_server.settings import Settings
from safelight_server.stream import EventLog, SendTurns
from safelight_server.telemetry import Stage
from safelight_server.telemetry.tracing import UNTRACED


class GenerationFactory:
    """Makes the generations of one server, which share the turns in which their streams send.

    Args:
        clock: monotonic seconds.
        now: Unix seconds.
        late: makes the error of a generation whose deadline has passed.
        on_end: called with each generation that has ended.
        charge: called with each amount of compute: the tenant's name, the model and seconds.
        price: the price of compute; None: nothing has a cost.
    """

    def __init__(
        self,
        settings: Settings,
        clock: Callable[[], float],
        now: Callable[[], float],
        late: Callable[[], SafelightError],
        *,
        on_end: Callable[[Generation], None],
        charge: Callable[[str, str, float], None],
        price: ComputePrice | None,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._now = now
        self._late = late
        self._on_end = on_end
        self._charge = charge
        self._price = price
        self._turns = SendTurns()

    def make(
        self, identifier: str, caller: Caller, request: Request, stage: Stage, time_left_s: float | None
    ) -> Generation:
        """Makes a generation; nothing is started.

        Args:
            time_left_s: until its deadline; None: it has none.
        """
        events = EventLog(
            f"generations/{identifier}",
            self._clock,
            chunk_bytes=self._settings.chunk_bytes,
            max_watchers=self._settings.max_watchers,
            tenant=caller.tenant,
            turns=self._turns,
        )
        return Generation(
            identifier,
            caller,
            request,
            events,
            self._clock,
            stage,
            deadline=None if time_left_s is None else self._clock() + time_left_s,
            late=self._late,
            charge=functools.partial(self._charge, caller.tenant, request.spec.model),
            price=self._price,
            on_end=self._on_end,
            now=self._now,
        )

    def revive(self, record: GenerationRecord) -> Generation:
        """Makes a generation of the record of another replica that accepted it; nothing is started."""
        left = None if record.deadline_at is None else record.deadline_at - self._now()
        generation = self.make(record.identifier, record.caller, record.request, UNTRACED, left)
        generation.owned, generation.log.begun_elsewhere = False, True
        generation.create_time = record.create_time
        generation.numerics_id = record.numerics_id
        for output, origin, starts in zip(generation.outputs, record.origins, record.starts, strict=True):
            output.origin, output.starts = origin, starts
        return generation
