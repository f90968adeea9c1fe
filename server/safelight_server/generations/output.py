"""One picture of a generation: a member of the execution that develops it.

An output reports to its generation while this replica owns the generation; otherwise
it holds back its outcome (`held`) until the owner has decided. Invariants: an output
that has ended is a member of no execution and reports nothing; it has no reference to
a generation that has ended, so that the pictures are freed at once, not by the next
full garbage collection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from safelight_server.domain.errors import SafelightError
from safelight_server.domain.events import Disposition, FinishReason, Origin
from safelight_server.domain.picture import EncodedPicture, FinishedPicture
from safelight_server.generations.execution import Execution, Member
from safelight_server.scheduler import Priority
from safelight_server.telemetry import Stage, Trail

if TYPE_CHECKING:
    from safelight_server.generations.generation import Generation


@dataclass(slots=True)
class ComputedWork:
    """What was computed for a generation."""

    compute_s: float = 0.0
    num_rows: int = 0
    num_steps: int = 0
    num_rows_skipped: int = 0


class Output(Member):
    """One picture of a generation; a member of the execution that develops it.

    Attributes:
        index: its number in the request's spec.
        step: steps made.
        reason: why the output has ended; None: it has not ended.
        origin: where its picture comes from.
        total_bytes: size of its finished picture, which only the log keeps.
        starts: whether it begins from a latent instead of noise.
        held: its outcome, while another replica owns the generation.
    """

    def __init__(self, generation: Generation, index: int, seed: int, clock: Callable[[], float]) -> None:
        self._generation = generation
        self._execution: Execution | None = None
        self._away = False
        self._clock = clock
        self._began = (clock(), 0)
        self.index = index
        self.seed = seed
        self.step = 0
        self.reason: FinishReason | None = None
        self.origin = Origin()
        self._counted = 0
        self._compute_s = 0.0
        self._others_s = 0.0
        self.total_bytes = 0
        self.held: FinishedPicture | SafelightError | None = None
        self.encoding = False
        self.starts = False
        self._trail: Trail | None = None

    @property
    def priority(self) -> Priority:
        """That of its generation."""
        return self._generation.priority

    @property
    def deadline(self) -> float | None:
        """That of its generation."""
        return self._generation.deadline

    @property
    def trail(self) -> Trail | None:
        """Its part of the trace of its generation; None before it is accepted, or where no trace is recorded."""
        return self._trail

    @property
    def idle(self) -> bool:
        """Whether it has not ended and no execution develops it."""
        return self.reason is None and self._execution is None and self.held is None and not self.encoding

    @property
    def output_id(self) -> int:
        """The id of its execution in the scheduler; 0: it has no execution."""
        return self._execution.job.output_id if self._execution is not None else 0

    @property
    def seconds_per_step(self) -> float:
        """Seconds per step since it started, joined a running execution, or was resumed."""
        at, step = self._began
        return (self._clock() - at) / max(1, self.step - step)

    def final_origin(self) -> Origin | None:
        """Where its picture came from; None: it has no picture."""
        if self.reason is not FinishReason.COMPLETED:
            return None
        match self.origin.disposition:
            case Disposition.MISS if not self._counted:  # another replica has developed it
                return Origin(Disposition.COALESCED, num_steps_skipped=self._all_steps)
            case Disposition.COALESCED:
                skipped = self._all_steps - self._counted
                return replace(self.origin, num_steps_skipped=skipped, compute_s_saved=self._others_s)
            case Disposition.LATENT | Disposition.BRANCHED:
                seconds_per_step = self._compute_s / max(1, self._counted)
                return replace(self.origin, compute_s_saved=seconds_per_step * self.origin.num_steps_skipped)
        return self.origin

    @property
    def _all_steps(self) -> int:
        """Steps that were computed for its picture, for this or another member."""
        return self.step - self._generation.request.spec.first_step

    # --- joining and leaving executions ---

    def begin_trail(self, stage: Stage) -> None:
        """Begins its part of the trace of its generation's `stage`, if that is recorded."""
        if stage.recorded:
            disposition = {"safelight.disposition": self.origin.disposition.value}
            self._trail = Trail(
                stage, {"safelight.output": self.index, "safelight.seed": str(self.seed), **disposition}
            )

    def enter(self, execution: Execution) -> None:
        """Becomes a member of an execution; its generation's streams get the previews."""
        self._execution = execution
        execution.join(self)
        self._show_previews()

    def _show_previews(self) -> None:
        if self._execution is not None:  # otherwise it has ended at once
            self._generation.log.add_feed(self.index, self._execution.feed)

    def recall(self, picture: EncodedPicture) -> None:
        """Completes it with a picture from the cache."""
        self._generation.on_encoded(self, picture)

    def pause(self) -> None:
        """Leaves its execution, which keeps the state after the last step for `resume`."""
        if self._execution is not None and not self._away:
            self._away = True
            if self._trail is not None:
                self._trail.suspend()
            self._generation.log.remove_feed(self.index)
            self._execution.leave(self, back=True)

    def resume(self) -> None:
        """Joins its execution again after `pause`."""
        if self._execution is not None and self._away:
            self._away = False
            if self._trail is not None:
                self._trail.resume()
            self._execution.join(self, again=True)
            self._show_previews()

    def leave(self) -> None:
        """Leaves its execution for good."""
        execution, self._execution = self._execution, None
        if execution is not None:
            self._generation.log.remove_feed(self.index)
            if self._away:
                execution.give_up()
            else:
                execution.leave(self)

    def part(self) -> None:
        """Drops the reference to its generation, which has ended."""
        self.leave()
        self.held = None
        del self._generation

    def end_trail(self, outcome: str, error: str = "") -> None:
        """Ends its part of the trace: the output has ended, or continues at another replica."""
        if self._trail is not None:
            self._trail.end({"safelight.finish_reason": outcome, "safelight.steps": self.step}, error)
            self._trail = None

    def reschedule(self) -> None:
        """Takes over the changed priority of its generation."""
        if self._execution is not None and not self._away:
            self._execution.reschedule()

    # --- as a member of its execution ---

    def started(self) -> None:
        """Starts the clock of its steps, and reports the start to the generation."""
        self._began = (self._clock(), self.step)
        self._generation.on_started()

    def joined(self, step: int) -> None:
        """Counts its own steps from those that were made before it joined."""
        self.step = step
        self._began = (self._clock(), step)

    def used(self, seconds: float, rows: int, steps: int, rows_skipped: int) -> None:
        """Adds the compute to its generation's and its own, and charges its tenant."""
        work = self._generation.work
        self._generation.charge(seconds)
        work.compute_s += seconds
        work.num_rows += rows
        work.num_steps += steps
        work.num_rows_skipped += rows_skipped
        self._counted += steps
        self._compute_s += seconds

    def stepped(self, step: int, batch_size: int) -> None:
        """Reports a step to the generation."""
        self.step = step
        self._generation.on_stepped(self, batch_size)

    def developed(self, picture: FinishedPicture) -> None:
        """Gives the picture to the generation, or holds it while another replica owns the generation."""
        execution, self._execution = self._execution, None
        self._others_s = 0.0 if execution is None else max(0.0, execution.compute_s - self._compute_s)
        if self._trail is not None:
            self._trail.developed()
        if self._generation.owned:
            self._generation.on_developed(self, picture)
        else:
            self.held = picture

    def failed(self, error: SafelightError) -> None:
        """Reports the error to the generation, or holds it while another replica owns the generation."""
        if self._execution is None:
            return  # the report to another member made this one leave
        self._execution = None
        if self._generation.owned:
            self._generation.on_output_ended(self, FinishReason.FAILED, error)
        else:
            self.held = error

    def expired(self) -> None:
        """Reports to the generation that its deadline has passed."""
        if self._execution is None:
            return  # the report to another member made this one leave
        self._execution = None
        if self._generation.owned:
            self._generation.expire()
