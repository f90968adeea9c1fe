"""Callers of the fleet, and what they have all been shown: once shown, it must stay true."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc
from safelight.v1 import generation_pb2 as pb
from safelight_server.catalog.pixels import to_pixels
from safelight_server.cluster.records import EventRecord, parse
from safelight_server.domain.caller import Caller
from safelight_server.domain.errors import FailedPreconditionError, InvalidRequestError, NotFoundError, SafelightError
from safelight_server.domain.events import GenerationView
from safelight_server.domain.request import Request
from safelight_server.storage.sealed import CorruptError, UnreadableError

from tests.simulation.replica import SEALER, Replica, image

RETRYABLE = grpc.StatusCode.UNAVAILABLE


class WrongError(Exception):
    """An invariant does not hold; the message says which."""


@dataclass(slots=True)
class Ledger:
    """All that was ever shown or committed, compared with each later showing.

    What is REPLICATED has one end, that of its stream in the service. A replica that has not reached the service for
    longer than its lease shows what it has made all the same: such an end is provisional, and compared with nothing.

    Attributes:
        asked_at: when a request was first sent, by tenant and request id.
        known: all generations that anyone was told of.
        forgotten: those that were asked for before the service lost its memory. They may end twice, or not be found.
        forgot_at: when it last did.
    """

    ends: dict[str, bytes] = field(default_factory=dict)
    committed: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    ids: dict[tuple[str, str], str] = field(default_factory=dict)
    asked_at: dict[tuple[str, str], float] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)
    forgotten: set[str] = field(default_factory=set)
    forgot_at: float = -1.0
    wrong: list[str] = field(default_factory=list)

    def fault(self, what: str) -> None:
        """Takes a violation."""
        self.wrong.append(what)

    def forget(self, now: float) -> None:
        """The service has lost its memory, and nothing is promised of what was in it."""
        self.forgotten |= self.known
        self.forgot_at = now
        self.committed.clear()

    def published(self, name: str, data: bytes) -> None:
        """An event was written to a stream of the service: nothing new may follow a generation's end."""
        try:
            event = parse(SEALER, name, data)
        except (CorruptError, UnreadableError):
            return  # of an execution, not of a generation
        if not isinstance(event, EventRecord):
            return
        last, _ = self.committed.get(name, (event.sequence, b""))
        if event.sequence > last:  # one that is there already was written twice, as its first answer was lost
            self.fault(f"{event.kind} {event.sequence} was written after the end, {last}")
        if event.kind == "finished":
            told = pb.GenerateResponse.FromString(event.data).event
            if told.generation in self.forgotten:
                return
            end = told.finished.SerializeToString(deterministic=True)
            _, before = self.committed.setdefault(name, (event.sequence, end))
            shown = self.ends.get(told.generation, end)
            if before != end or shown != end:
                was = pb.Finished.FromString(before if before != end else shown)
                self.fault(f"{told.generation} ended as {_text(was)} and is committed as {_text(told.finished)}")
            self.ends[told.generation] = before

    def shown(self, event: pb.GenerationEvent, where: str, *, provisional: bool) -> None:
        """Someone was shown the end of a generation."""
        end = event.finished.SerializeToString(deterministic=True)
        if provisional or event.generation in self.forgotten:
            return
        before = self.ends.setdefault(event.generation, end)
        if before != end:
            was = pb.Finished.FromString(before)
            self.fault(f"{event.generation} ended as {_text(was)} and later, {where}, as {_text(event.finished)}")

    def stands_for(self, caller: Caller, request_id: str, generation: str, where: str) -> None:
        """A request id was answered by a generation, which has an end that counts."""
        if generation in self.forgotten:
            return
        before = self.ids.setdefault((caller.tenant, request_id), generation)
        if before in self.forgotten:
            self.ids[caller.tenant, request_id] = generation
        elif before != generation:
            self.fault(f"request {request_id} was {before} and is, {where}, {generation}")

    def seen(self, generation: str, view: GenerationView, where: str) -> None:
        """Someone was told how a generation is."""
        if view.finish_time is None or generation not in self.ends or generation in self.forgotten:
            return
        end = pb.Finished.FromString(self.ends[generation])
        code = 0 if view.error is None else view.error.status.value[0]
        if end.status.code != code:
            self.fault(f"{generation} ended as {_text(end)} and is, {where}, {view.state.name}")


def _text(end: pb.Finished) -> str:
    what = f"code {end.status.code} {end.status.message!r}" if end.status.code else "SUCCEEDED"
    return f"{what} after {end.usage.num_steps} steps and {end.usage.num_rows} rows"


class Client:
    """One request, sent to any replica and resumed at any, until it has its end.

    Args:
        left_s: to the deadline of each call of Generate; None: it has none.
        replicas: those that are there now; dead ones too.
    """

    def __init__(
        self,
        caller: Caller,
        request: Request,
        left_s: float | None,
        replicas: Sequence[Replica],
        ledger: Ledger,
        chance: random.Random,
    ) -> None:
        self.caller = caller
        self.request = request
        self.left_s = left_s
        self.name = ""
        self.ended = False
        self.cancelled = False
        self._replicas = replicas
        self._ledger = ledger
        self._chance = chance
        self.durable = False
        self._sequence = 0
        self._called_at = 0.0
        self._data: dict[int, bytes] = {}
        self._provisional = False

    async def run(self) -> None:
        """Until the end; the retryable ones begin anew."""
        while not self.ended:
            replica = self._chance.choice(self._replicas)
            if not replica.host.dead:
                await self.call(replica, self._chance.uniform(0.5, 6.0))
            if not self.ended:
                await asyncio.sleep(self._chance.uniform(0.05, 0.3))

    async def leave_and_return(self, after_s: float, away_s: float) -> None:
        """Goes away amid the generation and comes back."""
        task = asyncio.ensure_future(self.run())
        try:
            await asyncio.wait({task}, timeout=after_s)
        finally:
            task.cancel()
        await asyncio.wait({task})
        await asyncio.sleep(away_s)
        await self.run()

    async def call(self, replica: Replica, patience_s: float) -> None:
        """One stream of a replica, given up where it is silent for too long."""
        again = bool(self.name and self.durable)
        inbox: asyncio.Queue[tuple[str, object]] = asyncio.Queue()

        def say(kind: str, what: object) -> None:
            inbox.put_nowait((kind, what))

        if again:
            offsets = {index: len(data) for index, data in self._data.items()}
            identifier = self.name.partition("/")[2]
            task = replica.watch(self.caller, identifier, self._sequence, offsets, say)
        else:
            self.name, self._sequence, self._data = "", 0, {}
            self._called_at = asyncio.get_running_loop().time()
            self._ledger.asked_at.setdefault((self.caller.tenant, self.request.request_id), self._called_at)
            task = replica.generate(self.caller, self.request, self.left_s, say)
        where = f"at {replica.host.name}"
        try:
            while True:
                async with asyncio.timeout(patience_s):
                    kind, what = await inbox.get()
                if kind == "event":
                    assert isinstance(what, bytes)
                    self._take(pb.GenerateResponse.FromString(what).event, replica)
                elif kind == "error":
                    assert isinstance(what, SafelightError)
                    self._fail(what, where, again=again)
                    return
                else:
                    return
        except TimeoutError:
            return
        finally:
            task.cancel()
            replica.streams.pop(task, None)

    def _take(self, event: pb.GenerationEvent, replica: Replica) -> None:
        where = f"at {replica.host.name}"
        if self.name and event.generation != self.name:
            self._ledger.fault(f"a stream of {self.name} has, {where}, an event of {event.generation}")
        self.name = event.generation
        self._ledger.known.add(self.name)
        if event.sequence or event.HasField("artifact_chunk"):
            self._provisional |= replica.network.doubtful(replica.host.name)
        if self._called_at <= self._ledger.forgot_at:
            self._ledger.forgotten.add(self.name)
        if event.sequence:
            if event.sequence != self._sequence + 1:
                self._ledger.fault(f"{self.name}: event {event.sequence} came, {where}, after {self._sequence}")
            self._sequence = event.sequence
        match event.WhichOneof("event"):
            case "accepted":
                self.durable = event.accepted.durability == pb.Accepted.DURABILITY_REPLICATED
            case "artifact_chunk":
                chunk = event.artifact_chunk
                self._data[chunk.output_index] = self._data.get(chunk.output_index, b"") + chunk.data
            case "output_finished":
                if event.output_finished.finish_reason == pb.OutputFinished.FINISH_REASON_COMPLETED:
                    self._compare(event.output_finished.output_index, where)
            case "finished":
                self._finish(event, where, provisional=replica.network.doubtful(replica.host.name))

    def _finish(self, event: pb.GenerationEvent, where: str, *, provisional: bool) -> None:
        code = event.finished.status.code
        self._ledger.shown(event, where, provisional=provisional)
        if code == RETRYABLE.value[0]:
            self.name = ""  # its request id is free again
            return
        self.ended = True
        if self.durable:
            self._ledger.stands_for(self.caller, self.request.request_id, self.name, where)
        if code == 0 and len(self._data) != len(self.request.spec.seeds):
            self._ledger.fault(f"{self.name} has, {where}, {len(self._data)} of its pictures")
        if code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]:
            self._check_deadline(where)

    def _compare(self, index: int, where: str) -> None:
        want, data = _picture(self.request.spec.seeds[index]), self._data.get(index, b"")
        if data != want:
            self._ledger.fault(f"{self.name} has, {where}, other pixels in {index}: {data[:4]!r}, not {want[:4]!r}")

    def _check_deadline(self, where: str) -> None:
        asked_at = self._ledger.asked_at[self.caller.tenant, self.request.request_id]
        after_s = asyncio.get_running_loop().time() - asked_at
        if self.left_s is None or after_s < self.left_s - 0.05:
            self._ledger.fault(f"the deadline of {self.name} has passed, {where}, after {after_s} s")

    def _fail(self, error: SafelightError, where: str, *, again: bool) -> None:
        if self.ended or error.status is RETRYABLE:
            return
        if isinstance(error, InvalidRequestError) and self._provisional:
            self._sequence, self._data = 0, {}  # it has what another replica showed and could not write
            return
        if self.name in self._ledger.forgotten and isinstance(error, NotFoundError | InvalidRequestError):
            self.name = ""  # asked for anew
            return
        expired = isinstance(error, FailedPreconditionError) and error.reason == "OUTCOME_EXPIRED"
        if expired and self._ledger.forgotten:
            self.ended = True
            return
        if again and isinstance(error, NotFoundError):
            self._ledger.fault(f"{self.name} was accepted as REPLICATED and is not there, {where}")
        else:
            self._ledger.fault(f"{self.name or self.request.request_id} fails, {where}, with {error!r}")
        self.ended = True

    async def ask_again(self, replica: Replica, patience_s: float) -> None:
        """The whole story anew, by the request id: the same generation with the same end."""
        self.ended, self.durable = False, False
        await self.call(replica, patience_s)
        if not self.ended:  # what it stood for is forgotten, or has moved without this replica's knowing it until now
            await self.call(replica, patience_s)

    async def cancel(self, replica: Replica, patience_s: float) -> None:
        """Cancels it, if it has a name; what it is told it is must stay true."""
        if not self.name or replica.host.dead:
            return
        self.cancelled = True
        name = self.name
        inbox: asyncio.Queue[tuple[str, object]] = asyncio.Queue()
        say: Callable[[str, object], None] = lambda kind, what: inbox.put_nowait((kind, what))  # noqa: E731
        task = replica.cancel(self.caller, name.partition("/")[2], say)
        try:
            async with asyncio.timeout(patience_s):
                kind, what = await inbox.get()
        except TimeoutError:
            return
        finally:
            task.cancel()
            replica.streams.pop(task, None)
        if kind == "view" and not replica.network.doubtful(replica.host.name):
            assert isinstance(what, GenerationView)
            self._ledger.seen(name, what, f"at {replica.host.name}")


async def find_as_stranger(client: Client, replica: Replica, ledger: Ledger) -> None:
    """Another tenant looks for its generation by name and finds nothing."""
    inbox: asyncio.Queue[tuple[str, object]] = asyncio.Queue()
    stranger = Caller("eve", "eve")
    name = client.name
    task = replica.watch(stranger, name.partition("/")[2], 0, {}, lambda kind, what: inbox.put_nowait((kind, what)))
    try:
        async with asyncio.timeout(5.0):
            kind, _ = await inbox.get()
    except TimeoutError:
        return
    finally:
        task.cancel()
        replica.streams.pop(task, None)
    if kind == "event":
        ledger.fault(f"{name} is shown to another tenant at {replica.host.name}")


@functools.cache
def _picture(seed: int) -> bytes:
    pixels = to_pixels(image(seed))
    rows = [b"".join(bytes(pixel) + b"\xff" for pixel in row) for row in pixels]
    return b"".join(rows)
