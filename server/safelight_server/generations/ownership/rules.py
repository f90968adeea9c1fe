"""Decides what a replica does about the ownership of a generation. Pure: no clock, no lease, no Redis.

`owners.py` and `mirrors.py` look things up, ask here, and do what they are told:

    OwnerState, OWNER_TRANSITIONS   the owner's side, from the lease to the end
    decide_claim                    whose request a request id stands for
    decide_unowned                  a mirror whose owner's lease has ended
    decide_leased                   the same, once this replica has the lease
    decide_listed                   a registered generation that nobody owns

Invariants: nothing that is recorded is overwritten or removed without its lease; who has lost the lease never becomes
the owner again in this table, only by adopting what is recorded then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

PATIENCE_S = 5.0
"""How long a request waits for another replica that is about to accept the same request."""
ABSENT_LEASES = 3
"""For so many leases an owner that has not written its record yet may be away; nobody takes its lease meanwhile."""
OTHERS_FIRST_LEASES = 3
"""For so many leases a generation without an owner is left to replicas with the numerics that it was accepted with."""


class OwnerState(Enum):
    """What this replica is to a generation that it has accepted or adopted."""

    CLAIMED = "it holds the lease, and nothing is recorded for others"
    OWNED = "its record and its events are written to the journal"
    SETTLING = "the generation has ended here, and its last lines are written"
    RELEASED = "another replica may take it over"
    LOST = "another replica has taken it over"
    FORGOTTEN = "it was refused, and no trace is left"


class OwnerInput(Enum):
    """What happens to it."""

    RECORDED = "its record is written"
    UNANSWERED = "the write of its record is not answered"
    REFUSED = "the request is refused"
    ENDED = "it ends"
    LET_GO = "another replica has a stream for it"
    REPLACED = "the lease is lost"


class OwnerAction(Enum):
    """What is done about it."""

    OPEN_JOURNAL = "write its events to the journal"
    REWRITE_RECORD = "write its record again and then its events, to the journal"
    FORGET = "remove what was written, release the lease"
    SETTLE = "limit the life of what may be written, release the lease"
    SETTLE_AFTER_JOURNAL = "write what is left, then settle"
    RELEASE = "release the lease"
    RELEASE_AFTER_JOURNAL = "write what is left, then release the lease"
    MOVE_STREAMS = "end its streams with MOVED, and drop an end that is not written"


_S, _I, _A = OwnerState, OwnerInput, OwnerAction
OWNER_TRANSITIONS: Mapping[tuple[OwnerState, OwnerInput], tuple[OwnerState, OwnerAction]] = {
    (_S.CLAIMED, _I.RECORDED): (_S.OWNED, _A.OPEN_JOURNAL),
    (_S.CLAIMED, _I.UNANSWERED): (_S.OWNED, _A.REWRITE_RECORD),  # it may be there, now or later: others may adopt it
    (_S.CLAIMED, _I.REFUSED): (_S.FORGOTTEN, _A.FORGET),
    (_S.CLAIMED, _I.ENDED): (_S.SETTLING, _A.SETTLE),
    (_S.CLAIMED, _I.LET_GO): (_S.RELEASED, _A.RELEASE),
    (_S.OWNED, _I.REFUSED): (_S.FORGOTTEN, _A.FORGET),
    (_S.OWNED, _I.ENDED): (_S.SETTLING, _A.SETTLE_AFTER_JOURNAL),
    (_S.OWNED, _I.LET_GO): (_S.RELEASED, _A.RELEASE_AFTER_JOURNAL),
    (_S.OWNED, _I.REPLACED): (_S.LOST, _A.MOVE_STREAMS),
    (_S.SETTLING, _I.REPLACED): (_S.LOST, _A.MOVE_STREAMS),
    (_S.RELEASED, _I.REPLACED): (_S.LOST, _A.MOVE_STREAMS),
    (_S.FORGOTTEN, _I.REPLACED): (_S.LOST, _A.MOVE_STREAMS),
}
"""The next state and what is done, by state and input. Inputs that a state has not are faults of the caller."""


class ClaimAction(Enum):
    """What a request with a request id does next."""

    KEEP = "it is bound to this generation"
    REPLACE = "bind it to this generation in place of what is there"
    REFUSE = "it stands for another request"
    ATTACH = "it stands for that generation"
    READ = "look whether that generation has a record"
    CONTEST = "try to take that generation's lease"
    WAIT = "look again later"
    GIVE_UP = "another replica has been about to accept it for too long"


@dataclass(frozen=True, slots=True)
class ClaimSeen:
    """What is known of a request id that was to be bound to a generation of this replica.

    Attributes:
        mine: it is bound to that generation.
        readable: what it is bound to can be read with this replica's keys.
        same_request: the other generation is of an equal request.
        recorded: the other generation has a record; None: not looked up yet.
        leased: this replica has taken the other's lease, under which `recorded` was read again; None: not tried yet.
        waited_s: since the request first looked.
    """

    mine: bool = False
    readable: bool = True
    same_request: bool = True
    recorded: bool | None = None
    leased: bool | None = None
    waited_s: float = 0.0


def decide_claim(seen: ClaimSeen) -> ClaimAction:
    """Says what is done about a request id.

    A generation without a record whose lease is free was never accepted: its replica died or sleeps, and with the lease
    taken from it, it never can be. Only then is a readable binding replaced.
    """
    if seen.mine:
        return ClaimAction.KEEP
    if not seen.readable:
        return ClaimAction.REPLACE
    if not seen.same_request:
        return ClaimAction.REFUSE
    if seen.recorded is None:
        return ClaimAction.READ
    if seen.recorded:
        return ClaimAction.ATTACH
    if seen.leased is None:
        return ClaimAction.CONTEST
    if seen.leased:
        return ClaimAction.REPLACE
    return ClaimAction.GIVE_UP if seen.waited_s > PATIENCE_S else ClaimAction.WAIT


class MirrorAction(Enum):
    """What a mirror does next."""

    FOLLOW = "follow its events, or look again"
    TAKE_LEASE = "try to become its owner"
    ADOPT = "become its owner"
    GIVE_UP = "end its streams here: nobody has it any more"


def decide_unowned(*, can_develop: bool, recorded: bool, gone_s: float, lease_s: float) -> MirrorAction:
    """Says what a mirror does whose owner's lease has ended.

    Args:
        can_develop: this replica serves the model that the generation was accepted with.
        gone_s: since its record was first found to be gone.
        lease_s: for so long an owner may still write its record again, after Redis has lost its memory; its lease
            must be free for it meanwhile.
    """
    if not can_develop:
        return MirrorAction.FOLLOW
    if recorded:
        return MirrorAction.TAKE_LEASE
    return MirrorAction.FOLLOW if gone_s < lease_s else MirrorAction.GIVE_UP


def decide_leased(*, recorded: bool, gone_s: float, lease_s: float) -> MirrorAction:
    """Says what a mirror does once it has the lease: its record may have gone since it was looked up."""
    if recorded:
        return MirrorAction.ADOPT
    return MirrorAction.FOLLOW if gone_s < lease_s else MirrorAction.GIVE_UP


class ListedAction(Enum):
    """What is done about a registered generation that nobody owns."""

    PASS_OVER = "nothing"
    FOLLOW = "mirror it, and so take it over"
    UNREGISTER = "remove it from the registry, under its lease"


@dataclass(frozen=True, slots=True)
class ListedSeen:
    """What is known of a registered generation that nobody owns.

    Attributes:
        owned_here: this replica owns it, and its lease has run out here: it is renewed, unless another takes it.
        stored: there is anything of it in Redis.
        readable: its record can be read here; else another replica may be able to, with other keys or another version.
        ended: its events say that it has ended.
        can_develop: this replica serves its model.
        same_numerics: pictures developed here would be the same, bit for bit.
        unowned_s: for how long it has been seen without an owner.
    """

    owned_here: bool = False
    stored: bool = True
    readable: bool = True
    ended: bool = False
    can_develop: bool = True
    same_numerics: bool = True
    unowned_s: float = 0.0


def decide_listed(seen: ListedSeen, lease_s: float) -> ListedAction:
    """Says what is done about a registered generation that nobody owns."""
    if seen.owned_here:
        return ListedAction.PASS_OVER
    if seen.ended:
        return ListedAction.UNREGISTER
    if not seen.stored:
        return ListedAction.UNREGISTER if seen.unowned_s >= ABSENT_LEASES * lease_s else ListedAction.PASS_OVER
    if not seen.readable:
        return ListedAction.PASS_OVER
    others_first = not seen.same_numerics and seen.unowned_s < OTHERS_FIRST_LEASES * lease_s
    return ListedAction.FOLLOW if seen.can_develop and not others_first else ListedAction.PASS_OVER
