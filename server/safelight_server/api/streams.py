"""A streaming call, whatever protocol brought it: its span, its time limit, and how it is ended from outside."""

from __future__ import annotations

from abc import ABC, abstractmethod

from safelight_server.domain.errors import SafelightError
from safelight_server.generations.generation import Generation
from safelight_server.stream import Watcher
from safelight_server.telemetry import Stage


class CallStream(ABC):
    """The state of a streaming call. Its protocol says how it is ended.

    Attributes:
        stage: the span of the call.
        time_left_s: seconds until the deadline of the call, from its beginning; None: there is no deadline.
        failure: why the call was ended from outside.
        watcher: its stream of the generation; None before there is one, and then the call was refused.
    """

    def __init__(self, stage: Stage, time_left_s: float | None) -> None:
        self.stage = stage
        self.time_left_s = time_left_s
        self.failure: SafelightError | None = None
        self.watcher: Watcher | None = None

    def watches(self, generation: Generation) -> None:
        """Describes the generation in the span of this call, and links the span of the call that started it."""
        spec = generation.request.spec
        self.stage.note(
            {
                "safelight.generation": generation.name,
                "safelight.model": spec.model,
                "safelight.steps": spec.num_inference_steps,
                "safelight.outputs": len(generation.outputs),
                "safelight.priority": generation.priority.name.lower(),
            }
        )
        if generation.stage is not self.stage:
            self.stage.link(generation.stage)

    @abstractmethod
    def end(self, error: SafelightError) -> None:
        """Ends the call with an error, from outside of its handler."""
