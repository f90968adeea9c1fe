"""Keeps the lease, the request id, the record and the end of every generation that this replica owns."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import structlog

from safelight_server.cluster.journal import Journal, Write
from safelight_server.cluster.journal_rules import GIVE_UP_S, RETRY_S
from safelight_server.cluster.records import GenerationRecord, dump
from safelight_server.coordination.leadership import Leadership
from safelight_server.domain.errors import AlreadyExistsError, UnavailableError
from safelight_server.domain.events import Durability
from safelight_server.domain.picture import EncodedPicture
from safelight_server.generations.generation import Generation
from safelight_server.generations.ownership.context import ClusterContext, GenerationHost
from safelight_server.generations.ownership.rules import (
    OWNER_TRANSITIONS,
    ClaimAction,
    ClaimSeen,
    OwnerAction,
    OwnerInput,
    OwnerState,
    decide_claim,
)
from safelight_server.generations.planner import OutputPlan, Planner
from safelight_server.storage.base import StoreError
from safelight_server.storage.sealed import CorruptError, Entry, UnreadableError

log = structlog.get_logger(__name__)

CLAIM_S = 86_400.0
"""How long a request id is bound to a generation that has not ended, at most."""
LOOK_S = 0.05
"""Seconds between two looks whether another replica has accepted the request of an id."""
MAX_WANTED = 4096
"""Generations for which the wish of another replica is remembered, at most."""
CLOSE_S = 2.0
"""How long `close` waits for the writing of ends."""
FORGET_S = 0.001
"""Time to live of what is to be deleted: Redis takes no 0."""


@dataclass(slots=True)
class OwnedGeneration:
    """What the owner of a generation holds: its lease, its claim on the request id, its journal.

    Attributes:
        starts: keys of the latents that its outputs begin from.
    """

    name: str
    leader: Leadership
    claim: tuple[str, bytes] | None = None
    journal: Journal | None = None
    starts: Sequence[str] = ()
    state: OwnerState = OwnerState.CLAIMED

    def decide(self, what: OwnerInput) -> OwnerAction:
        """Changes the state by `OWNER_TRANSITIONS`. Returns what is to be done."""
        self.state, action = OWNER_TRANSITIONS[self.state, what]
        return action


class Owners:
    """The generations that this replica owns.

    Args:
        replica_id: the name of this replica in messages on the bulletin.
    """

    def __init__(self, context: ClusterContext, host: GenerationHost, planner: Planner, replica_id: str) -> None:
        self._context = context
        self._host = host
        self._planner = planner
        self._replica_id = replica_id
        self._own: dict[str, OwnedGeneration] = {}
        self._wanted_elsewhere: OrderedDict[str, None] = OrderedDict()
        self._ending: set[asyncio.Task[None]] = set()
        self._journals: set[Journal] = set()

    async def enroll(self, generation: Generation) -> str | None:
        """Takes the lease and binds the request id. Returns another generation's id if the request id is bound to it.

        Raises:
            AlreadyExistsError: the request id was used with another request.
            UnavailableError: another replica has been about to accept that request for too long.
        """
        own: OwnedGeneration | None = None
        try:
            name = self._context.name(generation.identifier)
            leader = await Leadership.take(self._context.coordinator, name, self._context.ttl_s)
            if leader is None:
                return None
            own = self._own[generation.identifier] = OwnedGeneration(name, leader)
            other = await self._claim(generation, own) if generation.request.request_id else None
        except StoreError:  # other replicas must not find a generation whose request id is not bound
            own = self._own.pop(generation.identifier, None)
            if own is not None:
                self._context.start(self._give_back(own))
            return None
        except BaseException:
            await self.dismiss(generation)
            raise
        if other is not None:
            await self.dismiss(generation)
        return other

    def _claim_of(self, generation: Generation) -> tuple[str, bytes]:
        """Returns the name of the request id in Redis, and the sealed value that binds it to this generation."""
        request, tenant = generation.request, generation.caller.tenant
        name = self._context.keyring.digest("request", tenant, request.request_id)
        facts = {"generation": generation.identifier, "digest": request.body_digest.hex()}
        sealer = self._context.sealer
        return name, sealer.seal(name, Entry(json.dumps(facts).encode()), sealer.now() + CLAIM_S)

    async def claimed(self, generation: Generation) -> tuple[str, bytes] | None:
        """The binding of the request id that an earlier owner made: its name and value in Redis. None: there is none.

        Raises:
            StoreError: it cannot be looked up.
        """
        if not generation.request.request_id:
            return None
        name, mine = self._claim_of(generation)
        there = await self._context.coordinator.claim(name, mine, CLAIM_S)
        with contextlib.suppress(CorruptError, UnreadableError):
            facts = json.loads(self._context.sealer.open(name, there)[0].data)
            if facts["generation"] == generation.identifier:
                return name, there
        return None

    async def _claim(self, generation: Generation, own: OwnedGeneration) -> str | None:
        name, mine = self._claim_of(generation)
        began = time.monotonic()
        there = await self._context.coordinator.claim(name, mine, CLAIM_S)
        while True:
            other, seen = self._read_claim(generation, name, mine, there)
            action = decide_claim(seen)
            leader: Leadership | None = None
            try:
                if action is ClaimAction.READ:
                    seen = replace(seen, recorded=await self._is_recorded(other))
                    action = decide_claim(seen)
                if action is ClaimAction.CONTEST:
                    leader = await self._take(other)
                    recorded = leader is not None and await self._is_recorded(other)  # it may have been written since
                    waited_s = time.monotonic() - began
                    seen = replace(seen, recorded=recorded, leased=leader is not None, waited_s=waited_s)
                    action = decide_claim(seen)
                if action is ClaimAction.REPLACE:  # under the other's lease, if it was taken
                    there = await self._context.coordinator.claim(name, mine, CLAIM_S, there)
            finally:
                if leader is not None:
                    await leader.close()
            match action:
                case ClaimAction.KEEP:
                    own.claim = (name, mine)
                    return None
                case ClaimAction.ATTACH:
                    return other
                case ClaimAction.REFUSE:
                    request_id = generation.request.request_id
                    raise AlreadyExistsError(
                        f"request_id {request_id} was used with another request; choose a new one",
                        metadata={"request_id": request_id, "generation": f"generations/{other}"},
                    )
                case ClaimAction.GIVE_UP:
                    raise UnavailableError("another replica is about to run it; try again", retry_after_s=1.0)
                case ClaimAction.WAIT:
                    await asyncio.sleep(LOOK_S)
                    there = await self._context.coordinator.claim(name, mine, CLAIM_S)

    def _read_claim(self, generation: Generation, name: str, mine: bytes, there: bytes) -> tuple[str, ClaimSeen]:
        """The generation that a request id is bound to, and what is known of that without asking Redis again."""
        try:
            facts = json.loads(self._context.sealer.open(name, there)[0].data)
        except (CorruptError, UnreadableError):
            return "", ClaimSeen(readable=False)
        same_request = facts["digest"] == generation.request.body_digest.hex()
        return str(facts["generation"]), ClaimSeen(mine=there == mine, same_request=same_request)

    async def _is_recorded(self, identifier: str) -> bool:
        return bool(await self._context.coordinator.read(self._context.name(identifier)))

    async def _take(self, identifier: str) -> Leadership | None:
        return await Leadership.take(self._context.coordinator, self._context.name(identifier), self._context.ttl_s)

    async def record(self, generation: Generation, plans: Sequence[OutputPlan]) -> None:
        """Writes the record from which another replica can continue. The generation is then REPLICATED.

        Where the write is not answered, the record may be in Redis all the same, or come there seconds later, and then
        others may adopt the generation. It is accepted as LOCAL, and its record is written again until it is there.

        Raises:
            UnavailableError: another replica has taken its request id.
        """
        own = self._own.get(generation.identifier)
        if own is None:
            return
        left, starts = generation.left_s, tuple(plan.start is not None for plan in plans)
        own.starts = self._planner.start_keys(generation, starts)
        record = GenerationRecord(
            generation.identifier,
            generation.caller,
            generation.request,
            generation.create_time,
            None if left is None else self._context.sealer.now() + left,
            tuple(plan.origin for plan in plans),
            starts,
            self._planner.numerics_id(generation),
            self._planner.digest(generation),
        )
        with contextlib.suppress(StoreError):
            if not await self._planner.keep_starts(generation, plans):
                return
            await self._context.coordinator.register(own.name)
            write = self._recording(generation, own, dump(self._context.sealer, own.name, record))
            began = time.monotonic()
            written = not own.leader.lost.is_set() and await write()
            if not written and own.leader.lost.is_set():  # another replica runs this request by now
                raise UnavailableError("another replica has taken its request; try again", retry_after_s=0.1)
            action = own.decide(OwnerInput.RECORDED if written else OwnerInput.UNANSWERED)
            generation.journal = generation.log.journal = self.journal(generation, own, [write] if written else [])
            if action is OwnerAction.REWRITE_RECORD:
                generation.journal.rewrite(write, began)

    @staticmethod
    def _recording(generation: Generation, own: OwnedGeneration, data: bytes) -> Write:
        async def write() -> bool:
            if not await own.leader.publish(data):
                return False
            generation.durability = Durability.REPLICATED
            return True

        return write

    async def dismiss(self, generation: Generation) -> None:
        """Removes everything that was written for a generation that is refused."""
        own = self._own.pop(generation.identifier, None)
        if own is None:
            return
        own.decide(OwnerInput.REFUSED)
        generation.journal = generation.log.journal = None
        settle = functools.partial(self.settle_record, own, FORGET_S, 0.0)
        try:
            if own.journal is not None:
                await own.journal.stop()
            await settle()
        except BaseException as error:  # while anything of it is left, another replica may find it and run it
            self._watch_end(self._context.start(self._close(own, settle)))
            if not isinstance(error, StoreError):  # the call was cancelled
                raise
        else:
            await own.leader.close()

    def settle(self, generation: Generation, *, retryable: bool) -> None:
        """Settles a generation that has ended here. Its events stay as long as it can be watched.

        Args:
            retryable: whether the request id becomes free again.
        """
        own = self._own.pop(generation.identifier, None)
        if own is None:
            return
        if own.decide(OwnerInput.ENDED) is OwnerAction.SETTLE_AFTER_JOURNAL and own.journal is not None:
            self._end_journal(own.journal, self._settling(own, self._context.kept_s, retryable=retryable))
        else:
            settle = self._settling(own, FORGET_S, retryable=retryable)
            self._watch_end(self._context.start(self._close_unwritten(generation, own, settle)))

    async def _close_unwritten(
        self, generation: Generation, own: OwnedGeneration, settle: Callable[[], Awaitable[None]]
    ) -> None:
        """Settles a generation without a record.

        Another replica may have taken its lease, and its request id for a generation of its own, which then counts.
        """
        await self._close(own, settle)
        if own.leader.lost.is_set():
            self._lose(generation, own)

    def _settling(self, own: OwnedGeneration, kept_s: float, *, retryable: bool) -> Callable[[], Awaitable[None]]:
        claimed_s = 0.0 if retryable else self._context.idempotency_ttl_s
        return functools.partial(self.settle_record, own, kept_s, claimed_s)

    def let_go(self, generation: Generation) -> None:
        """Releases a generation, so that the replica with a stream for it, or any other, can take it over."""
        own = self._own.pop(generation.identifier, None)
        self._wanted_elsewhere.pop(generation.identifier, None)
        generation.leave()
        if own is None:
            return
        if own.decide(OwnerInput.LET_GO) is OwnerAction.RELEASE_AFTER_JOURNAL and own.journal is not None:
            self._end_journal(own.journal, _no_op)
        else:
            self._watch_end(self._context.start(self._give_back(own)))

    def owns(self, generation: Generation) -> bool:
        """Whether this replica owns the generation, as far as it knows."""
        return generation.identifier in self._own

    async def has_record(self, identifier: str) -> bool:
        """Whether Redis has a record of a generation; true if Redis does not answer."""
        try:
            return await self._is_recorded(identifier)
        except StoreError:
            return True

    def leads(self, name: str) -> bool:
        """Whether this replica owns the generation of a name in Redis, as far as it knows."""
        return any(own.name == name for own in self._own.values())

    def wants(self, generation: Generation) -> bool:
        """Whether another replica has a stream for the generation."""
        return generation.journal is not None and generation.identifier in self._wanted_elsewhere

    async def settle_record(self, own: OwnedGeneration, kept_s: float, claimed_s: float) -> None:
        """Limits the life of the events and of the request id, and deletes the latents that its outputs began from.

        Raises:
            StoreError: Redis does not answer.
        """
        if not await own.leader.confirm():
            return  # another replica owns the generation, or did: what Redis keeps of it belongs to that replica
        for key in own.starts:
            await self._context.tiers.delete(key)
        await self._context.coordinator.expire(own.name, kept_s)
        if own.claim is not None:
            await self._context.coordinator.unclaim(*own.claim, claimed_s)
        await self._context.coordinator.unregister(own.name)

    def _end_journal(self, journal: Journal, settle: Callable[[], Awaitable[None]]) -> None:
        journal.end(settle)
        self._journals.add(journal)
        self._watch_end(self._context.start(self._ended(journal)))

    async def _ended(self, journal: Journal) -> None:
        await journal.closed()
        self._journals.discard(journal)

    @staticmethod
    async def _give_back(own: OwnedGeneration) -> None:
        if own.journal is not None:
            await own.journal.abandon()
        else:
            await own.leader.close()

    @staticmethod
    async def _close(own: OwnedGeneration, settle: Callable[[], Awaitable[None]]) -> None:
        until = time.monotonic() + GIVE_UP_S
        while time.monotonic() < until:  # nobody else may adopt it meanwhile
            try:
                await settle()
                break
            except StoreError:
                await asyncio.sleep(RETRY_S)
        await own.leader.close()

    def journal(self, generation: Generation, own: OwnedGeneration, written: Sequence[Write]) -> Journal:
        """Returns the journal that the generation is written to from now on.

        Args:
            written: the writes of its record and its events that are in Redis.
        """

        async def enrolled() -> bool:
            await self._context.coordinator.register(own.name)
            if own.claim is not None:
                await self._context.coordinator.claim(*own.claim, CLAIM_S)
            return True

        async def put(index: int, picture: EncodedPicture) -> bool:
            size = {"width": picture.width_px, "height": picture.height_px, "stride": picture.stride_bytes}
            facts = {name: str(value) for name, value in size.items()} | {"media_type": picture.media_type.value}
            key, owner = self._context.artifact_key(generation, index), self._context.owner(generation)
            entry = Entry(picture.data, facts, owner.revision, owner.generation)
            return await self._context.tiers.put(key, entry, self._context.artifact_s, replicate=True)

        own.journal = Journal(
            own.leader,
            self._context.sealer,
            put,
            lambda: (generation.state, generation.error),
            lambda: self._lose(generation, own),
            [enrolled, *written],
        )
        return own.journal

    def _lose(self, generation: Generation, own: OwnedGeneration) -> None:
        """Gives up a generation that another replica has taken over. An outcome that was only decided here is void."""
        log.warning("another replica has taken over a generation", generation=generation.name)
        own.decide(OwnerInput.REPLACED)
        if self._own.get(generation.identifier) is own:  # otherwise it has ended here, or was adopted again since
            del self._own[generation.identifier]
            generation.leave()
        self._host.moved(generation)

    def hear_want(self, identifier: str, facts: Mapping[str, str]) -> None:
        """Notes that another replica has a stream for a generation that is owned here."""
        if facts["by"] != self._replica_id and identifier in self._own:
            self._wanted_elsewhere[identifier] = None
            if len(self._wanted_elsewhere) > MAX_WANTED:
                self._wanted_elsewhere.popitem(last=False)
            self._host.wanted(identifier)

    async def adopt(self, generation: Generation, own: OwnedGeneration, written: Sequence[bytes]) -> None:
        """Makes this replica the owner. A generation that has ended is only settled.

        Args:
            written: its record and its events so far, as they are in Redis.
        """
        own.starts = self._planner.start_keys(generation, [output.starts for output in generation.outputs])
        if generation.ended:
            own.decide(OwnerInput.ENDED)
            lost = isinstance(generation.error, UnavailableError)
            await self._close(own, self._settling(own, self._context.kept_s, retryable=lost))
            return
        own.decide(OwnerInput.RECORDED)
        self._own[generation.identifier] = own
        writes = [functools.partial(own.leader.publish, data) for data in written]
        journal, planner = self.journal(generation, own, writes), self._planner
        generation.adopt(journal, planner.numerics_id(generation), planner.batch_tolerance(generation))

    def _watch_end(self, task: asyncio.Task[None]) -> None:
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def close(self) -> None:
        """Releases all owned generations. Waits `CLOSE_S` for ends that are being written."""
        if self._ending:
            await asyncio.wait(self._ending, timeout=CLOSE_S)
        for journal in list(self._journals):
            await journal.abandon()
        for own in list(self._own.values()):  # a copy: a lease that is lost meanwhile removes its entry
            await self._give_back(own)


async def _no_op() -> None:
    pass
