"""One schedule: what is asked of a fleet, what goes wrong meanwhile, and what must hold; all drawn from one seed."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import structlog
from safelight_server.cluster.bills import BILL
from safelight_server.domain.caller import Caller
from safelight_server.domain.request import CacheMode, CachePolicy, DisconnectPolicy, Request
from safelight_server.scheduler import Priority

from tests.simulation.client import Client, Ledger, find_as_stranger
from tests.simulation.clock import HOST, SERVICE, VirtualLoop, virtual_time
from tests.simulation.replica import NO_PREVIEWS, RAW, SEALER, TTL_S, Replica
from tests.simulation.service import DOUBT_S, LATE_S, Network, Service
from tests.support.streams import SPEC

QUIET_S = 60.0
"""Time in which, with nothing going wrong any more, every request must come to its end."""
FAULTS = ("freeze", "freeze", "kill", "drain", "out", "pause", "cut", "rain")
SKEWS_S = (0.0, 0.0, 0.0, 2.0, 600.0, -600.0, 7200.0)
"""How far the clock of a replica's machine may be ahead."""
TENANTS = (Caller("ann", "studio"), Caller("bob", "agency"))


@dataclass(frozen=True, slots=True)
class Scope:
    """How much happens in one schedule. Most faults need little to show, and little is quickly run.

    Attributes:
        p_over: the chance that the weather ends before its next fault where nothing runs any more.
        all_asked: when everything has ended, all replicas are asked for it at once; else one, and all after the tail.
        tail_s: from then until all replicas are asked again.
    """

    num_replicas: int
    num_clients: int
    num_faults: int
    p_over: float
    all_asked: bool
    tail_s: float


def draw_scope(chance: random.Random) -> Scope:
    """One schedule of four is large."""
    if chance.random() < 0.25:
        return Scope(chance.choice((2, 2, 3)), chance.randint(1, 3), chance.randint(1, 4), 0.0, True, 4 * TTL_S + 3.0)
    return Scope(2, chance.choice((1, 1, 2)), chance.choice((1, 2, 2, 3)), 0.5, False, 2 * TTL_S)


@dataclass(slots=True)
class Result:
    """What became of a schedule: `wrong` is empty where every invariant held."""

    seed: int
    wrong: list[str]
    trace: list[str]


@dataclass(slots=True)
class Fleet:
    """All that one schedule is made of."""

    loop: VirtualLoop
    chance: random.Random
    ledger: Ledger
    service: Service
    network: Network
    replicas: list[Replica]
    step_s: float
    skews: random.Random
    trace: list[str] = field(default_factory=list)
    requests: dict[str, tuple[Request, float | None]] = field(default_factory=dict)
    graveyard: list[Replica] = field(default_factory=list)
    num_started: int = 0

    def note(self, what: str) -> None:
        """Takes a line of the trace."""
        self.trace.append(f"{self.loop.time():8.3f} s  {what}")

    def start(self, name: str) -> Replica:
        """A new process of a replica."""
        self.num_started += 1
        host = f"{name}{self.num_started}"
        return Replica(host, self.loop, self.network, self.service, self.step_s, self.skews.choice(SKEWS_S))


Play = Callable[["Fleet"], Coroutine[Any, Any, None]]


def run(seed: int, *, trace: bool = False, play: Play | None = None) -> Result:
    """Runs one schedule, or what `play` does with a fleet that has no replica yet."""
    loop = VirtualLoop()
    ledger = Ledger()
    lines: list[str] = []

    def listen(_logger: Any, method: str, entry: dict[str, Any]) -> dict[str, Any]:
        host = _host()
        if entry.get("event") == "bug":
            ledger.fault(f"a bug at {host}: {sys.exc_info()[1] or entry.get('exc_info')!r}")
        if trace:
            facts = {key: value for key, value in entry.items() if key != "event"}
            lines.append(f"{loop.time():8.3f} s  {host}: {entry['event']} {facts}")
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[listen], cache_logger_on_first_use=False)
    loop.set_exception_handler(
        lambda _, context: ledger.fault(f"{context.get('message')} {context.get('exception')!r}")
    )
    try:
        with virtual_time(loop, seed):
            chance, skews = random.Random(seed), random.Random(f"skews {seed}")
            service = Service(loop, ledger.published)
            network = Network(loop, service, chance)
            step_s = chance.choice((0.05, 0.2, 0.6))
            fleet = Fleet(loop, chance, ledger, service, network, [], step_s, skews, lines)
            loop.run_until_complete(loop.create_task((play or _schedule)(fleet), context=SERVICE.copy()))
    finally:
        loop.set_exception_handler(lambda *_: None)
        structlog.configure(**before)
        asyncio.set_event_loop(None)
        loop.forget_all()
    return Result(seed, ledger.wrong, lines)


def collect() -> None:
    """Frees dropped schedules; what their coroutines say and log of that is of no interest."""
    sys.unraisablehook, before = lambda _: None, sys.unraisablehook
    logged = structlog.get_config()
    structlog.configure(processors=[_drop], cache_logger_on_first_use=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            gc.collect()
    finally:
        sys.unraisablehook = before
        structlog.configure(**logged)


def _drop(_logger: Any, _method: str, _entry: Any) -> Any:
    raise structlog.DropEvent


def _host() -> str:
    host = HOST.get()
    return "-" if host is None else host.name


async def _schedule(fleet: Fleet) -> None:
    chance, ledger = fleet.chance, fleet.ledger
    scope = draw_scope(chance)
    fleet.replicas += [fleet.start("abc"[n]) for n in range(scope.num_replicas)]
    clients = [_client(fleet, n) for n in range(scope.num_clients)]
    works = [asyncio.ensure_future(_behave(fleet, client)) for client in clients]
    await _weather(fleet, scope, works)
    fleet.note("calm")
    try:
        async with asyncio.timeout(QUIET_S):
            await asyncio.gather(*works)
    except TimeoutError:
        for work in works:
            work.cancel()
        ledger.fault(
            f"not ended {QUIET_S:.0f} s after the last fault: {[c.name or c.request.request_id for c in clients if not c.ended]}"
        )
        return
    for client in clients:
        for replica in fleet.replicas if scope.all_asked else [chance.choice(fleet.replicas)]:
            await _ask_again(fleet, client, replica)
    await asyncio.sleep(scope.tail_s)
    for client in clients:
        for replica in fleet.replicas:
            await _ask_again(fleet, client, replica)
        await find_as_stranger(client, chance.choice(fleet.replicas), ledger)
    _check_bills(fleet, clients)


def _client(fleet: Fleet, number: int) -> Client:
    """One that asks for something of its own, or for the same as the first of its tenant."""
    known, caller = fleet.requests, TENANTS[number % 2]
    if fleet.chance.random() < 0.2 and caller.tenant in known:
        asked = known[caller.tenant]
    else:
        asked = known[caller.tenant] = _request(fleet.chance, f"request-{number // 2}")
    return Client(caller, *asked, fleet.replicas, fleet.ledger, random.Random(fleet.chance.random()))


def _request(chance: random.Random, request_id: str) -> tuple[Request, float | None]:
    """A request and the seconds to its deadline."""
    seeds, steps = tuple(chance.choices((1, 2, 3), k=chance.choice((1, 1, 2, 3)))), chance.randint(2, 8)
    left_s = chance.uniform(0.5, 15.0) if chance.random() < 0.2 else None
    return Request(
        replace(SPEC, width_px=128, height_px=128, num_inference_steps=steps, seeds=seeds),
        NO_PREVIEWS,
        RAW,
        Priority.STANDARD,
        DisconnectPolicy(chance.random() < 0.2, chance.choice((1.0, 3.0, 30.0))),
        CachePolicy(chance.choice((CacheMode.BYPASS, CacheMode.DEFAULT))),
        None,
        request_id,
        f"{seeds} {steps}".encode(),
    ), left_s


async def _behave(fleet: Fleet, client: Client) -> None:
    chance = random.Random(fleet.chance.random())
    await asyncio.sleep(chance.uniform(0.0, 2.0))
    draw = chance.random()
    if draw < 0.2:
        fleet.note("a client leaves and returns")
        await client.leave_and_return(chance.uniform(0.05, 3.0), chance.uniform(0.1, 5.0))
    elif draw < 0.35:
        work = asyncio.ensure_future(client.run())
        await asyncio.sleep(chance.uniform(0.05, 3.0))
        fleet.note(f"cancel of {client.name}")
        await client.cancel(chance.choice(fleet.replicas), 8.0)
        await work
    else:
        await client.run()


async def _weather(fleet: Fleet, scope: Scope, works: Sequence[asyncio.Future[None]]) -> None:
    """Goes wrong a few times, and returns when all of that is over."""
    chance = fleet.chance
    faults = FAULTS if chance.random() < 0.85 else (*FAULTS, "forget", "forget")
    over_at = 0.0
    await asyncio.sleep(0.3)
    for number in range(scope.num_faults):
        await asyncio.sleep(chance.uniform(0.0, 2.0))
        if number and chance.random() < scope.p_over and all(work.done() for work in works):
            break
        fault = chance.choice(faults)
        place = chance.randrange(len(fleet.replicas))
        replica = fleet.replicas[place]
        fleet.note(f"{fault} {replica.host.name if fault in ('freeze', 'kill', 'drain', 'cut') else ''}")
        for_s = chance.choice((chance.uniform(0.1, TTL_S), chance.uniform(TTL_S, 4 * TTL_S)))
        if fault not in ("freeze", "kill", "drain", "forget"):
            names = [replica.host.name] if fault == "cut" else [one.host.name for one in fleet.replicas]
            over_at = max(over_at, fleet.network.doubt(names, for_s))
        match fault:
            case "freeze":
                fleet.loop.freeze(replica.host)
                # A replica that ended something in an outage and slept since needs a moment to find that this is void.
                over_at = max(over_at, fleet.loop.time() + for_s + DOUBT_S)
                fleet.loop.call_later(for_s, _thaw, fleet, replica)
            case "kill":
                replica.kill()
                await _start_again(fleet, place)
            case "drain":
                draining = asyncio.ensure_future(replica.stop(chance.uniform(0.0, 3.0)))
                await asyncio.wait({draining}, timeout=10.0)
                if not draining.done():  # it is frozen meanwhile
                    replica.kill()
                await _start_again(fleet, place)
            case "forget":
                fleet.service.lose_memory()
                fleet.ledger.forget(fleet.loop.time())
            case "out":
                fleet.network.out = True
                await asyncio.sleep(for_s)
                fleet.network.out = False
            case "pause":
                fleet.network.paused = True
                await asyncio.sleep(for_s)
                fleet.network.go_on()
            case "cut":
                fleet.network.cut.add(replica.host.name)
                fleet.loop.call_later(for_s, fleet.network.cut.discard, replica.host.name)
            case "rain":
                fleet.network.p_lost, fleet.network.p_deaf, fleet.network.p_late = 0.15, 0.15, 0.1
                await asyncio.sleep(for_s)
                fleet.network.p_lost = fleet.network.p_deaf = fleet.network.p_late = 0.0
                over_at = max(over_at, fleet.loop.time() + LATE_S[1])
    await asyncio.sleep(max(0.0, over_at - fleet.loop.time()))


async def _start_again(fleet: Fleet, place: int) -> None:
    dead = fleet.replicas[place]
    fleet.graveyard.append(dead)
    await asyncio.sleep(fleet.chance.uniform(0.0, 2.0))
    fleet.replicas[place] = fleet.start(dead.host.name[0])
    fleet.note(f"start {fleet.replicas[place].host.name}")


def _thaw(fleet: Fleet, replica: Replica) -> None:
    if not replica.host.dead and replica.host.held is not None:
        fleet.note(f"thaw {replica.host.name}")
        fleet.loop.thaw(replica.host)


async def _ask_again(fleet: Fleet, client: Client, replica: Replica) -> None:
    fleet.note(f"{client.request.request_id} asked again at {replica.host.name}")
    name, promised = client.name, client.durable
    await client.ask_again(replica, 20.0)
    if promised and not client.ended:  # a LOCAL one may keep its request id where it runs
        fleet.ledger.fault(f"{name or client.request.request_id} does not answer again at {replica.host.name}")


def _check_bills(fleet: Fleet, clients: list[Client]) -> None:
    for name, count in fleet.service.bills_of.items():
        if count > 1 and fleet.ledger.forgot_at < 0:  # else a commit may have come after its picture was gone
            fleet.ledger.fault(f"the execution {name} was billed {count} times")
    billed = Counter(json.loads(SEALER.open(BILL, bill.data)[0].data)["generation"] for bill in fleet.service._bills)
    outputs = {client.name: len(client.request.spec.seeds) for client in clients}
    for generation, count in billed.items():
        if count > outputs.get(generation, count):
            fleet.ledger.fault(f"{generation} was billed {count} times for {outputs[generation]} outputs")


def run_many(first: int, count: int, *, frees: bool = True) -> list[Result]:
    """Runs schedules of consecutive seeds; those that fail.

    Args:
        frees: free the memory of dropped schedules now and then: 0.7 MB of each.
    """
    failed = []
    gc.disable()
    gc.freeze()  # modules and pipelines, which every collection would look through
    for seed in range(first, first + count):
        result = run(seed)
        if result.wrong:
            failed.append(result)
        if frees and seed % 20 == 0:
            collect()
    if frees:
        collect()
        gc.enable()
    return failed
