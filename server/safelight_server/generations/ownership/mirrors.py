"""Shows generations that other replicas own, and takes over those that nobody owns any more."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import structlog

from safelight_server.cluster.records import EventRecord, GenerationRecord, parse
from safelight_server.coordination.base import LeaderLostError, StreamEvent, place_order
from safelight_server.coordination.leadership import Leadership
from safelight_server.domain.errors import NotFoundError, UnavailableError
from safelight_server.domain.events import FinishReason, GenerationState
from safelight_server.domain.picture import EncodedPicture
from safelight_server.domain.request import MediaType
from safelight_server.generations.generation import Generation
from safelight_server.generations.ownership.context import WANT, ClusterContext, GenerationHost
from safelight_server.generations.ownership.owners import OwnedGeneration, Owners
from safelight_server.generations.ownership.rules import (
    ListedAction,
    ListedSeen,
    MirrorAction,
    decide_leased,
    decide_listed,
    decide_unowned,
)
from safelight_server.generations.planner import OutputPlan, Planner
from safelight_server.storage.base import MalformedValueError, StoreError
from safelight_server.storage.sealed import CorruptError, UnreadableError

log = structlog.get_logger(__name__)

ANSWER_S = 5.0
"""How long an owner may take to answer, after its lease would have ended if it were dead."""
RETRY_S = 0.5


class PictureGoneError(Exception):
    """A finished picture is no longer in any shared tier."""


@dataclass(slots=True)
class Mirror:
    """The copy of a generation that another replica owns, or that nobody owns any more.

    Attributes:
        num_asking: calls that wait for an answer from the owner.
        gone_since: when its record was found to be gone, on the monotonic clock.
    """

    name: str
    generation: Generation
    record: GenerationRecord
    place: str
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    num_asking: int = 0
    gone_since: float | None = None
    task: asyncio.Task[None] | None = None


class Mirrors:
    """Shows generations that other replicas own, and takes over those without an owner. Run `sweep` as a task."""

    def __init__(
        self, context: ClusterContext, host: GenerationHost, planner: Planner, owners: Owners, replica_id: str
    ) -> None:
        self._context = context
        self._host = host
        self._planner = planner
        self._owners = owners
        self._replica_id = replica_id
        self._mirrors: dict[str, Mirror] = {}
        self._unowned_since: dict[str, float] = {}
        self._passed_over: set[str] = set()
        self._retired = False

    def __len__(self) -> int:
        return len(self._mirrors)

    async def find(self, identifier: str, *, tend: bool) -> Generation | None:
        """A generation that another replica owns or has finished, in its present state; None: there is none.

        Args:
            tend: follow its events until `drop`. A generation whose pictures are gone is then not returned.

        Raises:
            UnavailableError: it cannot be looked up now.
        """
        if (mirror := self._mirrors.get(identifier)) is not None:
            return mirror.generation
        try:
            made = await self._mirror(self._context.name(identifier))
        except StoreError:
            what = "generations of other replicas cannot be looked up now"
            raise UnavailableError(what, retry_after_s=1.0) from None
        if made is None or (tend and not made.generation.whole):
            return None
        if made.generation.ended or not tend:
            return made.generation
        return self._keep(made).generation

    def _keep(self, made: Mirror) -> Mirror:
        """Registers the one mirror of a generation here and starts to follow its events."""
        mirror = self._mirrors.setdefault(made.record.identifier, made)
        if mirror is made:
            mirror.task = self._context.start(self._tend(mirror))
        return mirror

    def check(self, generation: Generation) -> None:
        """Refuses a generation that this replica could not continue.

        Raises:
            UnavailableError: this replica serves another model.
        """
        mirror = self._mirrors.get(generation.identifier)
        if mirror is not None and not self._has_model(mirror):
            self.drop(generation)
            what = "this replica does not have the model that it was accepted with; WatchGeneration at another goes on"
            raise UnavailableError(what, reason="OTHER_MODEL", retry_after_s=0.1)

    def _has_model(self, mirror: Mirror) -> bool:
        """Whether this replica serves the same model, so that it could continue the generation."""
        try:
            return mirror.record.pipeline in ("", self._planner.digest(mirror.generation))
        except NotFoundError:
            return False

    def _same_bits(self, mirror: Mirror) -> bool:
        """Whether pictures developed here would be the same, bit for bit."""
        return mirror.record.numerics_id in ("", self._planner.numerics_id(mirror.generation))

    def attend(self, generation: Generation) -> None:
        """Prepares for a stream here: previews if the numerics are the same, and a message to its owner."""
        mirror = self._mirrors.get(generation.identifier)
        if mirror is not None:
            self._context.bulletin.publish(WANT, generation.identifier, by=self._replica_id)
            if self._same_bits(mirror):
                self._context.start(self._enter(mirror.generation, mirror.record.starts))

    def drop(self, generation: Generation) -> None:
        """Stops following if no stream and no call here needs the generation any more."""
        mirror = self._mirrors.get(generation.identifier)
        if mirror is None or mirror.num_asking:
            return
        del self._mirrors[generation.identifier]
        if mirror.task is not None:
            mirror.task.cancel()
        generation.leave()

    def tell(self, generation: Generation, kind: str, **facts: str) -> None:
        """Sends the owner a message and does not wait."""
        self._context.bulletin.publish(kind, generation.identifier, **facts)

    async def ask(self, generation: Generation, kind: str, **facts: str) -> None:
        """Sends the owner a message and waits until the generation has ended or is owned here.

        Raises:
            UnavailableError: no answer came in time.
        """
        self.tell(generation, kind, **facts)
        mirror = self._mirrors.get(generation.identifier)
        if mirror is None:
            return
        mirror.num_asking += 1
        try:
            async with asyncio.timeout(self._context.ttl_s + ANSWER_S):
                while not generation.ended and not generation.owned:
                    mirror.changed.clear()
                    await mirror.changed.wait()
        except TimeoutError:
            log.warning("no answer of the owner of a generation", generation=generation.name)
            what = "the replica that has it does not answer; try again"
            raise UnavailableError(what, retry_after_s=1.0) from None
        finally:
            mirror.num_asking -= 1
            if not generation.log.watchers:
                self.drop(generation)

    async def _mirror(self, name: str) -> Mirror | None:
        events = await self._context.coordinator.read(name)
        for number, event in enumerate(events):
            record = self._parse(name, event)
            if isinstance(record, GenerationRecord):
                mirror = Mirror(name, self._host.revive(record), record, event.place)
                for later in events[number + 1 :]:
                    await self._apply(mirror, later)
                return mirror
        return None

    async def _apply(self, mirror: Mirror, event: StreamEvent) -> None:
        """Applies one event to the mirror. If it raises `StoreError`, the event can be applied again."""
        record = self._parse(mirror.name, event)
        if isinstance(record, EventRecord):
            picture = None
            if record.kind == "output" and record.sequence > mirror.generation.log.last_sequence:
                picture = await self._artifact(mirror.generation, record.output_index)
                gone = picture is None and record.reason is FinishReason.COMPLETED
                if gone and mirror.generation.log.watchers:
                    raise PictureGoneError
            mirror.generation.hear(record, picture)
            mirror.changed.set()
            if record.state is GenerationState.SUSPENDED and mirror.generation.log.watchers:
                # the owner may be a new one, which does not know yet that there is a stream here
                self._context.bulletin.publish(WANT, mirror.generation.identifier, by=self._replica_id)
        mirror.place = event.place

    def _parse(self, name: str, event: StreamEvent) -> GenerationRecord | EventRecord | None:
        try:
            return parse(self._context.sealer, name, event.data)
        except (CorruptError, UnreadableError):
            log.warning("an event of a generation cannot be read", place=event.place)
            return None

    async def _artifact(self, generation: Generation, index: int) -> EncodedPicture | None:
        found = await self._context.tiers.get(self._context.artifact_key(generation, index), sure=True)
        if found is None:
            return None
        at = found.entry.metadata
        size = int(at["width"]), int(at["height"]), int(at["stride"])
        return EncodedPicture(MediaType(at["media_type"]), *size, found.entry.data)

    async def _tend(self, mirror: Mirror) -> None:
        try:
            await self._follow(mirror)
        except PictureGoneError:  # a client that comes back gets the error that the picture is not kept
            log.warning("a finished picture is gone", generation=mirror.generation.name)
            self._give_up(mirror)
        except Exception:
            log.exception("bug", generation=mirror.generation.name)
            self._give_up(mirror)
        finally:
            if self._mirrors.get(mirror.record.identifier) is mirror:
                del self._mirrors[mirror.record.identifier]

    def _give_up(self, mirror: Mirror) -> None:
        """Ends its streams here. A client that comes back gets another mirror, or the error why there is none."""
        mirror.generation.leave()
        self._host.moved(mirror.generation)

    async def _follow(self, mirror: Mirror) -> None:
        while not mirror.generation.ended:
            try:
                following = self._context.coordinator.follow(mirror.name, mirror.place)
                async with contextlib.aclosing(following) as events:  # type: ignore[type-var]  # is a generator
                    async for event in events:
                        await self._apply(mirror, event)
                        if mirror.generation.ended:
                            return
            except StoreError:
                await asyncio.sleep(RETRY_S)
            except LeaderLostError:
                try:
                    if await self._adopt(mirror):
                        return
                    if not mirror.generation.log.watchers and not mirror.num_asking:
                        return
                except StoreError:
                    await asyncio.sleep(RETRY_S)

    async def _adopt(self, mirror: Mirror) -> bool:
        """Takes over the lease of a mirrored generation. True if this replica need not mirror it any more.

        False if another replica holds the lease or this replica cannot develop the generation.
        """
        has_model = self._has_model(mirror)
        recorded = has_model and bool(await self._context.coordinator.read(mirror.name))
        gone_s = self._gone_s(mirror, recorded=recorded) if has_model else 0.0
        action = decide_unowned(can_develop=has_model, recorded=recorded, gone_s=gone_s, lease_s=self._context.ttl_s)
        if action is not MirrorAction.TAKE_LEASE:
            return self._gives_up(mirror, action)
        leader = await Leadership.take(self._context.coordinator, mirror.name, self._context.ttl_s)
        if leader is None:
            return False
        generation = mirror.generation
        try:
            events = await self._context.coordinator.read(mirror.name)
            gone_s = self._gone_s(mirror, recorded=bool(events))
            action = decide_leased(recorded=bool(events), gone_s=gone_s, lease_s=self._context.ttl_s)
            if action is not MirrorAction.ADOPT:
                await leader.close()
                return self._gives_up(mirror, action)
            mirror.gone_since = None
            for event in events:
                if place_order(event.place) > place_order(mirror.place):
                    await self._apply(mirror, event)
            own = OwnedGeneration(mirror.name, leader, await self._owners.claimed(generation))
        except BaseException:
            await leader.close()
            raise
        self._mirrors.pop(generation.identifier, None)
        await self._owners.adopt(generation, own, [event.data for event in events])
        mirror.changed.set()
        if not generation.ended and self._host.owned(generation):
            await self._enter(generation, mirror.record.starts)
        return True

    @staticmethod
    def _gone_s(mirror: Mirror, *, recorded: bool) -> float:
        """For how long the record of a generation has been gone from Redis, as far as this replica has looked.

        Either its request was refused after its record had been written: then no replica needs it. Or Redis has lost
        its memory: then the owner writes the record again when it renews its lease, which must be free for that.
        """
        if recorded:
            return 0.0
        now = time.monotonic()
        mirror.gone_since = now if mirror.gone_since is None else mirror.gone_since
        return now - mirror.gone_since

    def _gives_up(self, mirror: Mirror, action: MirrorAction) -> bool:
        """Gives the generation up if that was decided. Returns whether it was."""
        if action is MirrorAction.GIVE_UP:
            self._give_up(mirror)
        return action is MirrorAction.GIVE_UP

    def resume(self, generation: Generation) -> None:
        """Starts an adopted generation that had no stream until now."""
        if any(output.idle for output in generation.outputs):
            self._context.start(self._enter(generation, [output.starts for output in generation.outputs]))

    async def _enter(self, generation: Generation, starts: Sequence[bool]) -> None:
        try:
            plans = await self._plan(generation, starts)
            if self._is_wanted(generation):
                self._planner.enter(generation, plans)
        except BaseException:  # whatever the error is, other replicas may succeed
            if self._owners.owns(generation):
                self._owners.let_go(generation)
                self._host.moved(generation)
            raise

    async def _plan(self, generation: Generation, starts: Sequence[bool]) -> list[OutputPlan]:
        while self._is_wanted(generation):  # otherwise its stream was lost meanwhile
            with contextlib.suppress(StoreError):
                return await self._planner.plan_again(generation, starts)
            await asyncio.sleep(RETRY_S)
        return []

    def _is_wanted(self, generation: Generation) -> bool:
        """Whether the generation should be developed here."""
        if generation.ended or generation.owned:
            return self._owners.owns(generation) and generation.state is not GenerationState.SUSPENDED
        mirror = self._mirrors.get(generation.identifier)
        return mirror is not None and mirror.generation is generation and bool(generation.log.watchers)

    async def sweep(self) -> None:
        """Takes over registered generations that nobody owns. Runs until `retire`."""
        while True:
            await asyncio.sleep(self._context.ttl_s * random.uniform(0.5, 1.0))
            if self._retired:
                return
            try:
                names = await self._context.coordinator.unowned()
                self._unowned_since = {name: since for name, since in self._unowned_since.items() if name in names}
                self._passed_over.intersection_update(names)
                random.shuffle(names)
                for name in names:
                    await self._look_after(name)
            except MalformedValueError as error:
                log.warning("the registry of generations cannot be read", why=str(error))
            except StoreError:
                continue

    async def _look_after(self, name: str) -> None:
        """Takes over one generation, if that is possible. A fault in it does not stop the sweep over the others.

        Raises:
            StoreError: Redis does not answer, so that the sweep must end.
        """
        try:
            await self._rescue(name)
        except MalformedValueError as error:
            if name not in self._passed_over:
                log.warning("a registered generation cannot be read and is passed over", name=name, why=str(error))
            self._passed_over.add(name)
        except StoreError:
            raise
        except Exception:
            if name not in self._passed_over:
                log.exception("bug", name=name)
            self._passed_over.add(name)

    def retire(self) -> None:
        """Stops taking over generations that nobody watches here: this replica is drained."""
        self._retired = True

    async def _rescue(self, name: str) -> None:
        owned_here = self._owners.leads(name)
        mirror = None if owned_here else await self._mirror(name)
        stored = owned_here or mirror is not None or bool(await self._context.coordinator.read(name))
        unowned_s = self._unowned_s(name)
        seen = ListedSeen(owned_here=owned_here, stored=stored, readable=mirror is not None, unowned_s=unowned_s)
        if mirror is not None:
            has_model = self._has_model(mirror)
            seen = replace(
                seen,
                ended=mirror.generation.ended,
                can_develop=has_model,
                same_numerics=has_model and self._same_bits(mirror),
            )
        match decide_listed(seen, self._context.ttl_s):
            case ListedAction.FOLLOW if mirror is not None:
                self._keep(mirror)  # its task finds that nobody owns it
            case ListedAction.UNREGISTER:
                await self._unregister(name)

    def _unowned_s(self, name: str) -> float:
        """For how long this replica has seen a registered generation without an owner."""
        now = time.monotonic()
        return now - self._unowned_since.setdefault(name, now)

    async def _unregister(self, name: str) -> None:
        """Unregisters a generation that has ended or never began. Takes its lease first: it may be about to begin."""
        leader = await Leadership.take(self._context.coordinator, name, self._context.ttl_s)
        if leader is not None:
            try:
                await self._context.coordinator.unregister(name)
            finally:
                await leader.close()
