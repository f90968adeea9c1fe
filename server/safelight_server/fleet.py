"""Generations of all replicas: written down by their owner, shown by others, taken over when the owner is gone.

    enroll, record   before Accepted: the lease of its name, its request id, its record        (owner)
    settle, let_go   it has ended; another replica wants it and nobody watches it here         (owner)
    find, attend     a generation that another replica owns, as its record and events show it  (mirror)
    adopt            the owner's lease has ended: the mirror becomes the owner                 (mirror → owner)

Ownership goes where the streams are: a generation that waits for a stream is
handed to the replica that has one. Invariants: only the holder of the lease
writes; what was promised as REPLICATED has its record in Redis before. Without
Redis there is no fleet. Neighbours: `generations` calls, `intake` plans,
`replicas` has the parts.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import random
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog
from safelight_server.cache.coordination.base import Coordinator, Event, LeaderLostError
from safelight_server.cache.coordination.leadership import Leadership
from safelight_server.cache.spaces import Spaces
from safelight_server.cache.store.base import StoreError
from safelight_server.cache.store.keyring import Keyring
from safelight_server.cache.store.sealed import CorruptError, Entry, Sealer, UnreadableError
from safelight_server.cache.store.tiers import Tiers
from safelight_server.errors import AlreadyExistsError, UnavailableError
from safelight_server.events import Durability
from safelight_server.generation import Generation
from safelight_server.intake import Intake, Plan
from safelight_server.picture import Encoded
from safelight_server.replicas.journal import Journal
from safelight_server.replicas.news import News
from safelight_server.replicas.records import Record, Told, dump, parse
from safelight_server.request import MediaType

log = structlog.get_logger(__name__)

WANT, CANCEL, PRIORITY = "want", "cancel", "priority"
CLAIM_S = 86_400.0
"""How long a request id is bound to a generation that has not ended, at most."""
LOOK_S = 0.05
PATIENCE_S = 5.0
RETRY_S = 0.5
MAX_WISHES = 4096
CLOSE_S = 2.0


class Host(Protocol):
    """What keeps generations on this replica."""

    def revive(self, record: Record) -> Generation:
        """A generation as it was accepted elsewhere; nothing happens yet."""

    def owned(self, generation: Generation) -> bool:
        """It is owned here from now on; whether it runs (else it waits for a stream)."""

    def wanted(self, identifier: str) -> None:
        """Another replica has a stream for a generation that is owned here."""

    def moved(self, generation: Generation) -> None:
        """It is owned elsewhere from now on."""


@dataclass(slots=True)
class _Own:
    """What the owner holds."""

    name: str
    leader: Leadership
    claim: tuple[str, bytes] | None = None
    journal: Journal | None = None


@dataclass(slots=True)
class _Mirror:
    """A generation that another replica owns, or nobody any more.

    Attributes:
        num_asking: calls that wait for what becomes of it.
    """

    name: str
    generation: Generation
    record: Record
    place: str
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    num_asking: int = 0
    tending: asyncio.Task[None] | None = None


class Fleet:
    """See the module; run `sweep` as a task.

    Args:
        ttl_s: of a lease.
        result_ttl_s: how long a finished generation can be watched again.
        idempotency_ttl_s: how long a request id is remembered after the end.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        sealer: Sealer,
        keyring: Keyring,
        tiers: Tiers,
        spaces: Spaces,
        news: News,
        *,
        ttl_s: float,
        result_ttl_s: float,
        idempotency_ttl_s: float,
    ) -> None:
        self._coordinator = coordinator
        self._sealer = sealer
        self._keyring = keyring
        self._tiers = tiers
        self._spaces = spaces
        self._news = news
        self._ttl_s = ttl_s
        self._result_ttl_s = result_ttl_s
        self._idempotency_ttl_s = idempotency_ttl_s
        self._me = secrets.token_hex(8)
        self._own: dict[str, _Own] = {}
        self._mirrors: dict[str, _Mirror] = {}
        self._wishes: OrderedDict[str, None] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._journals: set[Journal] = set()
        self._host: Host
        self._intake: Intake

    def join(self, host: Host, intake: Intake) -> None:
        """Begins to hear what other replicas want; called once."""
        self._host, self._intake = host, intake
        self._news.on(WANT, self._hear_want)

    def on(self, kind: str, handler: Callable[[str, Mapping[str, str]], None]) -> None:
        """Calls `handler` with the id of a generation of which another replica asks CANCEL or PRIORITY."""
        self._news.on(kind, handler)

    # --- as owner ---

    async def enroll(self, generation: Generation) -> str | None:
        """Takes the ownership and binds its request id; where the id stands for another generation, that one's id.

        Raises:
            AlreadyExistsError: it stands for another request.
            UnavailableError: it stands for one that is about to be accepted elsewhere, for too long.
        """
        own: _Own | None = None
        try:
            name = self._name(generation.identifier)
            leader = await Leadership.take(self._coordinator, name, self._ttl_s)
            if leader is None:
                return None
            own = self._own[generation.identifier] = _Own(name, leader)
            other = await self._claim(generation, own) if generation.request.request_id else None
        except StoreError:
            return None
        except BaseException:
            await self.dismiss(generation)
            raise
        if other is not None:
            await self.dismiss(generation)
        return other

    async def _claim(self, generation: Generation, own: _Own) -> str | None:
        request, tenant = generation.request, generation.caller.tenant
        name = self._keyring.digest("request", tenant, request.request_id)
        facts = {"generation": generation.identifier, "digest": request.body_digest.hex()}
        mine = self._sealer.seal(name, Entry(json.dumps(facts).encode()), time.time() + CLAIM_S)
        replaced: bytes | None = None
        until = time.monotonic() + PATIENCE_S
        while True:
            there = await self._coordinator.claim(name, mine, CLAIM_S, replaced)
            if there == mine:
                own.claim = (name, mine)
                return None
            try:
                theirs = json.loads(self._sealer.open(name, there)[0].data)
            except (CorruptError, UnreadableError):
                replaced = there
                continue
            other = str(theirs["generation"])
            if theirs["digest"] != facts["digest"]:
                raise AlreadyExistsError(
                    f"request_id {request.request_id} was used with another request; choose a new one",
                    metadata={"request_id": request.request_id, "generation": f"generations/{other}"},
                )
            held = await self._coordinator.holder(self._name(other)) is not None
            if await self._coordinator.read(self._name(other)):
                return other
            if not held:  # its replica died before it accepted anything
                replaced = there
                continue
            if time.monotonic() > until:
                raise UnavailableError("another replica is about to run it; try again", retry_after_s=1.0)
            await asyncio.sleep(LOOK_S)

    async def record(self, generation: Generation, plans: Sequence[Plan]) -> None:
        """Writes down what another replica needs to go on with it; REPLICATED where that is done."""
        own = self._own.get(generation.identifier)
        if own is None:
            return
        left = generation.left_s
        record = Record(
            generation.identifier,
            generation.caller,
            generation.request,
            generation.create_time,
            None if left is None else time.time() + left,
            tuple(plan.origin for plan in plans),
            tuple(plan.start is not None for plan in plans),
        )
        with contextlib.suppress(StoreError):
            if not await self._intake.keep_starts(generation, plans):
                return
            await self._coordinator.enlist(own.name)
            if not await own.leader.publish(dump(self._sealer, own.name, record)):
                await self._coordinator.strike(own.name)
                return
            generation.durability = Durability.REPLICATED
            generation.journal = generation.log.journal = self._journal(generation, own)

    async def dismiss(self, generation: Generation) -> None:
        """It was refused: nothing is left of it."""
        own = self._own.pop(generation.identifier, None)
        if own is None:
            return
        generation.journal = generation.log.journal = None
        await self._settle(own, 0.001, 0.0)
        await self._give_back(own)

    def settle(self, generation: Generation, *, retryable: bool) -> None:
        """It has ended here: its events stay as long as it can be watched.

        Args:
            retryable: its request id is free again.
        """
        own = self._own.pop(generation.identifier, None)
        if own is None:
            return
        kept_s = max(self._result_ttl_s, self._idempotency_ttl_s)
        settle = functools.partial(self._settle, own, kept_s, 0.0 if retryable else self._idempotency_ttl_s)
        if generation.journal is not None:
            self._end(generation.journal, settle)
        else:
            self._ending.add(self._start(self._close(own, settle)))

    def let_go(self, generation: Generation) -> None:
        """Another replica goes on with it, or whoever finds it first."""
        own = self._own.pop(generation.identifier, None)
        self._wishes.pop(generation.identifier, None)
        generation.leave()
        if own is not None and generation.journal is not None:
            self._end(generation.journal, _nothing)

    def wants(self, generation: Generation) -> bool:
        """Whether another replica has a stream for it."""
        return generation.journal is not None and generation.identifier in self._wishes

    async def _settle(self, own: _Own, kept_s: float, claimed_s: float) -> None:
        with contextlib.suppress(StoreError):
            await self._coordinator.expire(own.name, kept_s)
            if own.claim is not None:
                await self._coordinator.unclaim(*own.claim, claimed_s)
            await self._coordinator.strike(own.name)

    def _end(self, journal: Journal, settle: Callable[[], Awaitable[None]]) -> None:
        journal.end(settle)
        self._journals.add(journal)
        self._ending.add(self._start(self._ended(journal)))

    async def _ended(self, journal: Journal) -> None:
        await journal.closed()
        self._journals.discard(journal)

    @staticmethod
    async def _give_back(own: _Own) -> None:
        if own.journal is not None:
            await own.journal.abandon()
        else:
            await own.leader.close()

    @staticmethod
    async def _close(own: _Own, settle: Callable[[], Awaitable[None]]) -> None:
        await settle()
        await own.leader.close()

    def _journal(self, generation: Generation, own: _Own) -> Journal:
        async def put(index: int, picture: Encoded) -> bool:
            size = {"width": picture.width_px, "height": picture.height_px, "stride": picture.stride_bytes}
            facts = {name: str(value) for name, value in size.items()} | {"media_type": picture.media_type.value}
            key = self._artifact_key(generation, index)
            return await self._tiers.put(key, Entry(picture.data, facts), self._result_ttl_s, replicate=True)

        own.journal = Journal(
            own.leader,
            self._sealer,
            put,
            lambda: (generation.state, generation.error),
            lambda: self._lose(generation),
        )
        return own.journal

    def _lose(self, generation: Generation) -> None:
        """Another replica has taken it over, since this one was silent for too long."""
        log.warning("another replica has taken over a generation", generation=generation.name)
        if self._own.pop(generation.identifier, None) is not None:
            generation.leave()
            self._host.moved(generation)

    def _hear_want(self, identifier: str, facts: Mapping[str, str]) -> None:
        if facts["by"] != self._me and identifier in self._own:
            self._wishes[identifier] = None
            if len(self._wishes) > MAX_WISHES:
                self._wishes.popitem(last=False)
            self._host.wanted(identifier)

    # --- as mirror ---

    async def find(self, identifier: str, *, tend: bool) -> Generation | None:
        """A generation that another replica owns or has finished, as it is now; None: there is none.

        Args:
            tend: go on showing it until `drop`.

        Raises:
            UnavailableError: it cannot be looked up now.
        """
        if (mirror := self._mirrors.get(identifier)) is not None:
            return mirror.generation
        try:
            made = await self._mirror(self._name(identifier))
        except StoreError:
            what = "generations of other replicas cannot be looked up now"
            raise UnavailableError(what, retry_after_s=1.0) from None
        if made is None or made.generation.ended or not tend:
            return None if made is None else made.generation
        return self._keep(made).generation

    def _keep(self, made: _Mirror) -> _Mirror:
        """The one mirror of its generation here, which is tended."""
        mirror = self._mirrors.setdefault(made.record.identifier, made)
        if mirror is made:
            mirror.tending = self._start(self._tend(mirror))
        return mirror

    def attend(self, generation: Generation) -> None:
        """Goes on showing it, with previews; its owner lets it come here if no stream is left there."""
        mirror = self._mirrors.get(generation.identifier)
        if mirror is not None:
            self._news.say(WANT, generation.identifier, by=self._me)
            self._start(self._enter(mirror.generation, mirror.record.starts))

    def drop(self, generation: Generation) -> None:
        """No stream is left here."""
        mirror = self._mirrors.pop(generation.identifier, None)
        if mirror is not None:
            if mirror.tending is not None:
                mirror.tending.cancel()
            generation.leave()

    def tell(self, generation: Generation, kind: str, **facts: str) -> None:
        """Asks the owner for something."""
        self._news.say(kind, generation.identifier, **facts)

    async def ask(self, generation: Generation, kind: str, **facts: str) -> None:
        """Asks the owner for something and waits for a while until it has ended or is owned here."""
        self.tell(generation, kind, **facts)
        mirror = self._mirrors.get(generation.identifier)
        if mirror is None:
            return
        mirror.num_asking += 1
        try:
            async with asyncio.timeout(self._ttl_s + PATIENCE_S):
                while not generation.ended and not generation.owned:
                    mirror.changed.clear()
                    await mirror.changed.wait()
        except TimeoutError:
            log.warning("no answer of the owner of a generation", generation=generation.name)
        finally:
            mirror.num_asking -= 1

    async def _mirror(self, name: str) -> _Mirror | None:
        events = await self._coordinator.read(name)
        for number, event in enumerate(events):
            record = self._parse(name, event)
            if isinstance(record, Record):
                mirror = _Mirror(name, self._host.revive(record), record, event.place)
                for later in events[number + 1 :]:
                    await self._apply(mirror, later)
                return mirror
        return None

    async def _apply(self, mirror: _Mirror, event: Event) -> None:
        mirror.place = event.place
        told = self._parse(mirror.name, event)
        if isinstance(told, Told):
            picture = None
            if told.kind == "output" and told.sequence > mirror.generation.log.last_sequence:
                picture = await self._artifact(mirror.generation, told.output_index)
            mirror.generation.hear(told, picture)
            mirror.changed.set()

    def _parse(self, name: str, event: Event) -> Record | Told | None:
        try:
            return parse(self._sealer, name, event.data)
        except (CorruptError, UnreadableError):
            log.warning("an event of a generation cannot be read", place=event.place)
            return None

    async def _artifact(self, generation: Generation, index: int) -> Encoded | None:
        found = await self._tiers.get(self._artifact_key(generation, index))
        if found is None:
            return None
        at = found.entry.metadata
        size = int(at["width"]), int(at["height"]), int(at["stride"])
        return Encoded(MediaType(at["media_type"]), *size, found.entry.data)

    async def _tend(self, mirror: _Mirror) -> None:
        try:
            await self._follow(mirror)
        finally:
            if self._mirrors.get(mirror.record.identifier) is mirror:
                del self._mirrors[mirror.record.identifier]

    async def _follow(self, mirror: _Mirror) -> None:
        while not mirror.generation.ended:
            try:
                following = self._coordinator.follow(mirror.name, mirror.place)
                async with contextlib.aclosing(following) as events:  # type: ignore[type-var]  # is a generator
                    async for event in events:
                        await self._apply(mirror, event)
                        if mirror.generation.ended:
                            return
            except LeaderLostError:
                try:
                    if await self._adopt(mirror):
                        return
                    if not mirror.generation.log.watchers and not mirror.num_asking:
                        return
                except StoreError:
                    await asyncio.sleep(RETRY_S)

    async def _adopt(self, mirror: _Mirror) -> bool:
        """Owns it from here on, unless another replica was quicker."""
        leader = await Leadership.take(self._coordinator, mirror.name, self._ttl_s)
        if leader is None:
            return False
        generation = mirror.generation
        try:
            for event in await self._coordinator.read(mirror.name):
                if _later(event.place, mirror.place):
                    await self._apply(mirror, event)
        except BaseException:
            await leader.close()
            raise
        self._mirrors.pop(generation.identifier, None)
        own = _Own(mirror.name, leader)
        if generation.ended:
            kept_s = max(self._result_ttl_s, self._idempotency_ttl_s)
            await self._close(own, functools.partial(self._settle, own, kept_s, 0.0))
            return True
        self._own[generation.identifier] = own
        generation.adopt(self._journal(generation, own), self._intake.numerics_id(generation))
        mirror.changed.set()
        if not generation.ended and self._host.owned(generation):
            await self._enter(generation, mirror.record.starts)
        return True

    def resume(self, generation: Generation) -> None:
        """One that was adopted without a stream has one now."""
        if any(output.idle for output in generation.outputs):
            self._start(self._enter(generation, [output.starts for output in generation.outputs]))

    async def _enter(self, generation: Generation, starts: Sequence[bool]) -> None:
        plans = await self._intake.plan_again(generation, starts)
        if not generation.ended:
            self._intake.enter(generation, plans)

    async def sweep(self) -> None:
        """Takes over what nobody owns, until cancelled."""
        while True:
            await asyncio.sleep(self._ttl_s * random.uniform(0.5, 1.0))
            try:
                names = await self._coordinator.orphans()
                random.shuffle(names)
                for name in names:
                    await self._rescue(name)
            except StoreError:
                continue

    async def _rescue(self, name: str) -> None:
        mirror = await self._mirror(name)
        if mirror is None or mirror.generation.ended:
            await self._coordinator.strike(name)
        else:
            self._keep(mirror)  # who tends it finds that nobody owns it

    # --- around it ---

    def _name(self, identifier: str) -> str:
        return self._keyring.digest("generation", identifier)

    def _artifact_key(self, generation: Generation, index: int) -> str:
        prefix = self._spaces.of(generation.caller.tenant).prefix
        return f"{prefix}/artifact/{self._spaces.private(generation.name, index)}"

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._ending.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            log.error("bug", exc_info=fault)

    async def close(self) -> None:
        """Gives back what is owned, as far as that is quick, and ends all that is under way."""
        if self._ending:
            await asyncio.wait(self._ending, timeout=CLOSE_S)
        for journal in list(self._journals):
            await journal.abandon()
        for own in self._own.values():
            await self._give_back(own)
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


async def _nothing() -> None:
    pass


def _later(place: str, than: str) -> bool:
    return _order(place) > _order(than)


def _order(place: str) -> tuple[int, int]:
    milliseconds, _, number = place.partition("-")
    return int(milliseconds), int(number or 0)
