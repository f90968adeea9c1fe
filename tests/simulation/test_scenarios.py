"""Single situations of a simulated fleet, played step by step."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from unittest.mock import AsyncMock

import pytest
from safelight.v1 import generation_pb2 as pb
from safelight_server.coordination.base import Coordinator, Lease
from safelight_server.domain.errors import InternalError, NotFoundError, UnavailableError
from safelight_server.domain.events import GenerationState
from safelight_server.domain.request import CacheMode, CachePolicy, DisconnectPolicy, Request
from safelight_server.generations.ownership import CANCEL
from safelight_server.scheduler import Priority
from safelight_server.storage.base import StoreUnavailableError

from tests.simulation.client import Client
from tests.simulation.replica import NO_PREVIEWS, RAW, TTL_S, Replica
from tests.simulation.schedule import TENANTS, Fleet, run
from tests.support.streams import SPEC

CALLER = TENANTS[0]
STEP_S = 0.5


def request(steps: int = 4, *, detach: bool = True, seeds: tuple[int, ...] = (1,)) -> Request:
    return Request(
        replace(SPEC, width_px=128, height_px=128, num_inference_steps=steps, seeds=seeds),
        NO_PREVIEWS,
        RAW,
        Priority.STANDARD,
        DisconnectPolicy(detach, 30.0),
        CachePolicy(CacheMode.BYPASS),
        None,
        "request",
        b"",
    )


class Call:
    """A stream, and what it has been sent."""

    def __init__(self, start: Callable[[Callable[[str, object], None]], asyncio.Task[None]]) -> None:
        self.events: list[pb.GenerationEvent] = []
        self.error: object = None
        self.view: object = None
        self.over = False
        self.task = start(self._say)

    def _say(self, kind: str, what: object) -> None:
        if kind == "event":
            assert isinstance(what, bytes)
            self.events.append(pb.GenerateResponse.FromString(what).event)
        elif kind == "view":
            self.view = what
        else:
            self.over = True
            self.error = what

    @property
    def name(self) -> str:
        return self.events[0].generation

    def kinds(self) -> list[str]:
        return [str(event.WhichOneof("event")) for event in self.events if event.sequence]


def generate(replica: Replica, asked: Request, left_s: float | None = None) -> Call:
    return Call(lambda say: replica.generate(CALLER, asked, left_s, say))


def watch(replica: Replica, name: str, after: int = 0) -> Call:
    return Call(lambda say: replica.watch(CALLER, name.partition("/")[2], after, {}, say))


def cancel(replica: Replica, name: str) -> Call:
    return Call(lambda say: replica.cancel(CALLER, name.partition("/")[2], say))


def fleet_of(fleet: Fleet, count: int = 2) -> list[Replica]:
    fleet.step_s = STEP_S
    fleet.replicas += [fleet.start("abc"[n]) for n in range(count)]
    return fleet.replicas


async def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  # on the virtual clock
            await asyncio.sleep(0.01)


def played(play: Callable[[Fleet], object]) -> None:
    """Plays it on a virtual clock: no invariant is broken on the way."""
    result = run(1, trace=True, play=play)  # type: ignore[arg-type]
    assert result.wrong == [], "\n".join(result.trace)


def test_a_client_s_cancel_waits_until_the_lease_is_certainly_held() -> None:
    async def play(fleet: Fleet) -> None:
        one, _ = fleet_of(fleet)
        call = generate(one, request(200))
        await until(lambda: call.events)
        fleet.network.doubt([one.host.name], 20.0)
        fleet.network.cut.add(one.host.name)
        await asyncio.sleep(TTL_S + 0.1)
        late = cancel(one, call.name)
        await until(lambda: late.over)
        assert isinstance(late.error, UnavailableError), "another replica may have it by now"
        assert late.view is None and "finished" not in call.kinds()

    played(play)


def test_a_cancel_is_done_once_the_lease_is_held_again() -> None:
    async def play(fleet: Fleet) -> None:
        (one,) = fleet_of(fleet, 1)
        call = generate(one, request(200))
        await until(lambda: call.events)
        fleet.network.out = True
        await asyncio.sleep(TTL_S + 0.1)
        late = cancel(one, call.name)
        await asyncio.sleep(0.5)
        assert not late.over
        fleet.network.out = False
        await until(lambda: late.over)
        assert late.view is not None and late.view.state is GenerationState.CANCELLED  # type: ignore[attr-defined]

    played(play)


def test_a_client_that_cancels_is_not_told_of_an_end_that_is_void() -> None:
    """While the cancel waits for the lease the generation ends here, and then the lease turns out to be lost."""

    async def play(fleet: Fleet) -> None:
        one, _ = fleet_of(fleet)
        call = generate(one, request(200))
        await until(lambda: call.events)
        generation = one.generations._live[call.name.partition("/")[2]]
        fleet.network.doubt([one.host.name], 20.0)
        fleet.network.cut.add(one.host.name)
        await until(lambda: not generation.may_decide)
        late = cancel(one, call.name)
        await asyncio.sleep(0.1)
        assert generation.journal is not None
        generation.journal._leader.lost.set()
        one.host.context.copy().run(generation.stop, InternalError())
        await until(lambda: late.over)
        assert isinstance(late.error, UnavailableError) and late.view is None

    played(play)


def test_a_message_to_cancel_is_not_obeyed_by_who_may_not_own_it_any_more() -> None:
    async def play(fleet: Fleet) -> None:
        one, _ = fleet_of(fleet)
        call = generate(one, request(200))
        await until(lambda: call.events)
        generations = one.generations
        generation = generations._live[call.name.partition("/")[2]]
        fleet.network.cut.add(one.host.name)
        fleet.network.doubt([one.host.name], 60.0)
        await until(lambda: not generation.may_decide)
        assert generations.ownership is not None
        generations.ownership.bulletin._handlers[CANCEL](generation.identifier, {})
        assert not generation.ended

    played(play)


@pytest.mark.parametrize("skew_s", [7200.0, -7200.0])
def test_what_has_ended_is_found_however_wrong_a_clock_is(skew_s: float) -> None:
    """By the clock of its machine, what has just ended elsewhere ended hours ago."""

    async def play(fleet: Fleet) -> None:
        right, wrong = (
            Replica(name, fleet.loop, fleet.network, fleet.service, STEP_S, ahead_s)
            for name, ahead_s in (("right", 0.0), ("wrong", skew_s))
        )
        for one, other in ((right, wrong), (wrong, right)):
            asked = replace(request(), request_id=one.host.name)
            call = generate(one, asked)
            await until(lambda call=call: call.over)  # type: ignore[misc]
            watching = watch(other, call.name)
            await until(lambda watching=watching: watching.over)  # type: ignore[misc]
            assert watching.kinds() == ["accepted", "output_finished", "finished"]

    played(play)


def test_a_deadline_holds_after_a_takeover() -> None:
    async def play(fleet: Fleet) -> None:
        one, other = fleet_of(fleet)
        call = generate(one, request(800), left_s=20.0)
        await until(lambda: call.events)
        one.kill()
        watching = watch(other, call.name, 1)
        began = fleet.loop.time()
        await until(lambda: watching.over)
        assert 19.0 < fleet.loop.time() - began < 21.0
        finished = watching.events[-1].finished
        assert finished.status.code == 4, "DEADLINE_EXCEEDED"

    played(play)


def test_a_drained_replica_hands_over_what_runs() -> None:
    async def play(fleet: Fleet) -> None:
        one, other = fleet_of(fleet)
        client = Client(
            CALLER, request(40, detach=False, seeds=(1, 2, 3)), None, fleet.replicas, fleet.ledger, random.Random(1)
        )
        running = asyncio.ensure_future(client.call(one, 30.0))
        await until(lambda: client.name)
        await one.stop(1.0)
        await running
        name = client.name
        assert not client.ended and one.host.dead and not other.host.dead
        await client.call(other, 60.0)
        assert client.ended and client.name == name, "the same generation, with all of its pictures"

    played(play)


STORY = ["accepted", "output_finished", "output_finished", "finished"]


@pytest.mark.parametrize("moved_before", [True, False])
@pytest.mark.parametrize("forgets_after_s", [0.3, 3.0, 10.2])
def test_what_runs_is_written_again_by_its_owner_after_the_service_has_lost_its_memory(
    forgets_after_s: float, *, moved_before: bool
) -> None:
    """It is watched at another replica meanwhile, which must not take it over from its owner."""

    async def play(fleet: Fleet) -> None:
        one, other, third = fleet_of(fleet, 3)
        calls = [generate(one, request(20, seeds=(1, 2)))]
        await until(lambda: calls[0].events)
        if moved_before:
            one.kill()
            await until(lambda: other.generations._live or third.generations._live)
        owner, mirror = (third, other) if third.generations._live else (other, third)
        calls += [watch(mirror, calls[0].name), watch(owner, calls[0].name)]
        await asyncio.sleep(forgets_after_s)
        fleet.service.lose_memory()
        for call in calls[moved_before:]:
            await until(lambda call=call: call.over)  # type: ignore[misc]
            assert call.kinds() == STORY and call.error is None
        for replica in (owner, mirror, fleet.start("d")):
            again = generate(replica, request(20, seeds=(1, 2)))
            await until(lambda again=again: again.over)  # type: ignore[misc]
            assert again.name == calls[0].name and again.kinds() == STORY

    played(play)


def test_what_its_dead_owner_cannot_write_again_is_given_up_after_a_lease() -> None:
    async def play(fleet: Fleet) -> None:
        one, other = fleet_of(fleet)
        call = generate(one, request(200))
        await until(lambda: call.events)
        watching = watch(other, call.name)
        await asyncio.sleep(1.0)
        one.kill()
        fleet.service.lose_memory()
        await until(lambda: watching.over)
        assert isinstance(watching.error, UnavailableError) and watching.error.reason == "MOVED"
        gone = watch(other, call.name)
        await until(lambda: gone.over)
        assert isinstance(gone.error, NotFoundError)

    played(play)


def test_a_replica_does_not_take_over_from_itself() -> None:
    """Its own lease has run out and nobody else took it: it is renewed, and not adopted a second time beside itself."""

    async def play(fleet: Fleet) -> None:
        (one,) = fleet_of(fleet, 1)
        call = generate(one, request(60))
        await until(lambda: call.events)
        identifier = call.name.partition("/")[2]
        ownership = one.generations.ownership
        assert ownership is not None
        own = ownership.owners._own[identifier]
        fleet.service._execution(own.name).ends = 0.0
        await fleet.loop.create_task(ownership.mirrors._rescue(own.name), context=one.host.context.copy())
        assert len(ownership.mirrors) == 0
        await until(lambda: call.over)
        assert call.kinds() == ["accepted", "output_finished", "finished"] and ownership.owners._own == {}

    played(play)


def test_a_request_whose_generation_was_never_written_may_be_sent_again() -> None:
    """It was found by its request id, and has been refused since without a trace."""

    async def play(fleet: Fleet) -> None:
        (one,) = fleet_of(fleet, 1)
        ownership = one.generations.ownership
        assert ownership is not None
        ownership.owners.enroll = AsyncMock(return_value="0" * 32)  # type: ignore[method-assign]
        call = generate(one, request())
        await until(lambda: call.over)
        assert isinstance(call.error, UnavailableError), call.error

    played(play)


def coordinator_of(replica: Replica) -> Coordinator:
    ownership = replica.generations.ownership
    assert ownership is not None
    return ownership.owners._context.coordinator


def test_a_record_that_comes_seconds_late_brings_no_second_end() -> None:
    """Its write was given up, and is done when the generation has ended and the service has not heard of the release."""

    async def play(fleet: Fleet) -> None:
        one, other = fleet_of(fleet)
        coordinator = coordinator_of(one)
        publish, release = coordinator.publish, coordinator.release
        late: list[tuple[Lease, bytes]] = []

        async def not_now(lease: Lease, data: bytes) -> str:
            coordinator.publish = publish  # type: ignore[method-assign]
            late.append((lease, data))
            raise StoreUnavailableError("no answer in time")

        async def never(lease: Lease) -> bool:
            if lease == late[0][0]:
                raise StoreUnavailableError("no answer in time")
            return await release(lease)

        coordinator.publish, coordinator.release = not_now, never  # type: ignore[method-assign]
        asked = replace(request(), cache=CachePolicy(CacheMode.DEFAULT))
        client = Client(CALLER, asked, None, fleet.replicas, fleet.ledger, random.Random(1))
        await client.call(one, 30.0)
        assert client.ended and not client.durable
        name = client.name
        await asyncio.sleep(2 * TTL_S)
        await fleet.service.publish(*late[0])
        for replica in (other, one):
            await client.ask_again(replica, 30.0)
            assert client.ended and client.name == name

    played(play)


def test_who_slept_before_its_record_was_answered_shows_no_end_of_its_own() -> None:
    """Another replica has adopted the generation meanwhile, and ended it."""

    async def play(fleet: Fleet) -> None:
        one, other = fleet_of(fleet)
        coordinator = coordinator_of(one)
        publish = coordinator.publish

        async def deaf(lease: Lease, data: bytes) -> str:
            await publish(lease, data)
            raise StoreUnavailableError("no answer in time")

        coordinator.publish = deaf  # type: ignore[method-assign]
        client = Client(CALLER, request(20), None, fleet.replicas, fleet.ledger, random.Random(1))
        running = asyncio.ensure_future(client.call(one, 30.0))
        await until(lambda: client.name)
        assert not client.durable
        fleet.loop.freeze(one.host)
        running.cancel()
        coordinator.publish = publish  # type: ignore[method-assign]
        await client.ask_again(other, 30.0)
        assert client.ended
        fleet.loop.thaw(one.host)
        await asyncio.sleep(TTL_S)
        await client.ask_again(one, 30.0)
        assert client.ended

    played(play)


def test_who_slept_during_a_write_shows_nothing_before_the_next_one() -> None:
    """The write failed when it woke, which says nothing of the service: another replica has ended the generation."""

    async def play(fleet: Fleet) -> None:
        fleet.step_s = 0.05
        one, other = fleet.start("a"), fleet.start("b")
        fleet.replicas += [one, other]
        asked = request(20, detach=False)
        call = generate(one, asked)
        await until(lambda: len(call.events) > 18)
        fleet.network.cut.add(one.host.name)
        call.task.cancel()
        await asyncio.sleep(0.1)
        watching = watch(one, call.name, 1)
        coordinator, writing = coordinator_of(one), asyncio.Event()
        publish = coordinator.publish

        async def seen(lease: Lease, data: bytes) -> str:
            writing.set()
            return await publish(lease, data)

        coordinator.publish = seen  # type: ignore[method-assign]
        await writing.wait()
        fleet.loop.freeze(one.host)
        await asyncio.sleep(2 * TTL_S)
        fleet.network.cut.clear()
        ended = watch(other, call.name)
        await until(lambda: ended.over)
        assert ended.kinds() == ["accepted", "output_finished", "finished"]
        fleet.loop.thaw(one.host)
        await until(lambda: watching.over)
        assert watching.kinds() == []
        assert isinstance(watching.error, UnavailableError) and watching.error.reason == "MOVED"

    played(play)


def test_a_drained_replica_hands_over_nothing_that_others_may_not_find() -> None:
    """The write of its record is not answered; its client gets all that it needs to ask another."""

    async def play(fleet: Fleet) -> None:
        one, _ = fleet_of(fleet)
        coordinator_of(one).publish = AsyncMock(side_effect=StoreUnavailableError("out"))  # type: ignore[method-assign]
        call = generate(one, request(200))
        await until(lambda: call.events)
        await one.stop(1.0)
        assert isinstance(call.error, UnavailableError) and call.error.reason == "DRAINING"
        assert call.error.metadata["seeds"] == "1"

    played(play)


def test_what_has_no_record_yet_is_left_to_its_owner_that_is_away() -> None:
    """It is registered, and its owner is cut off for longer than its lease: nobody else could do anything with it."""

    async def play(fleet: Fleet) -> None:
        one, _ = fleet_of(fleet)

        async def cut_off(_lease: Lease, _data: bytes) -> str:
            coordinator.publish = publish  # type: ignore[method-assign]
            fleet.network.cut.add(one.host.name)
            raise StoreUnavailableError("no answer in time")

        coordinator = coordinator_of(one)
        publish = coordinator.publish
        coordinator.publish = cut_off  # type: ignore[method-assign]
        call = generate(one, request(20))
        await until(lambda: call.events)
        await asyncio.sleep(2.5 * TTL_S)
        fleet.network.cut.clear()
        await until(lambda: call.over)
        assert call.kinds() == ["accepted", "output_finished", "finished"] and call.error is None

    played(play)
