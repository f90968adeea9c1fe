"""A trace of requests for the caches' benchmark: how people request icons, drawn from committed parameters.

Sessions start by a Poisson process, with prompts of Zipf popularity. After a think time, a session rephrases its
prompt, adds a detail, changes something, or repeats the prompt. Every request carries its icon, so that the
served picture can be judged. The same parameters and seed give the same trace on any machine. `replay` sends the
trace to a server; `eviction` simulates a cache.

The parameters below were committed before any cache was tuned; a golden digest
in the tests notices a change.
"""

from __future__ import annotations

import bisect
import enum
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from training.icons import BACKGROUNDS, COLOURS, OBJECTS, Spec, caption, sample_spec
from training.icons.spec import PAINTS

SEEDS = (1, 2, 3)
"""Seeds of the traces for which figures are reported."""
FORBIDDEN = {("potion", "wooden"), ("potion", "stone"), ("candle", "wooden"), ("candle", "stone")}
"""Combinations that the training data does not contain."""


class Action(enum.StrEnum):
    """How a request relates to the one before it in its session."""

    START = "start"
    REPHRASE = "rephrase"
    ADD = "add"
    CHANGE = "change"
    REPEAT = "repeat"


@dataclass(frozen=True, slots=True)
class Parameters:
    """Parameters of a trace.

    `rephrase`, `add` and `change` are shares of the requests after a session's first; the rest repeat the prompt.

    Attributes:
        num_requests: number of requests of all sessions together.
        num_prompts: number of prompts that sessions start from.
        zipf_exponent: the k-th prompt has a popularity of k to the power of minus this.
        sessions_per_s: rate of the Poisson process by which sessions start.
        mean_session_requests: mean of the geometric distribution of a session's length.
        think_median_s: median of the log-normal think time.
        think_sigma: standard deviation of the think time's logarithm.
        pinned_share: share of sessions that send a seed. It belongs to the prompt that they start from, like an
            application's preset, and stays for the session. The others let the server choose and can never hit EXACT.
    """

    num_requests: int = 2000
    num_prompts: int = 1000
    zipf_exponent: float = 1.0
    sessions_per_s: float = 0.5
    mean_session_requests: float = 5.0
    rephrase: float = 0.40
    add: float = 0.32
    change: float = 0.20
    think_median_s: float = 8.0
    think_sigma: float = 1.0
    pinned_share: float = 0.5


DEFAULT = Parameters()


@dataclass(frozen=True, slots=True)
class Asked:
    """One request.

    Attributes:
        at_s: seconds since the trace began.
        session: number of the session, in the order of their starts.
        turn: index of the request in its session, from 0.
        icon: what a correct picture shows; the prompt always names its object, colour and background.
        seed: None: the server chooses it.
    """

    at_s: float
    session: int
    turn: int
    action: Action
    prompt: str
    icon: Spec
    seed: int | None


def trace(seed: int, parameters: Parameters = DEFAULT) -> tuple[Asked, ...]:
    """Generates a trace: the first `num_requests` requests by time."""
    rng = random.Random(f"trace/{seed}")
    popular = [_worded(_plain(sample_spec(rng)), rng) for _ in range(parameters.num_prompts)]
    weights = itertools.accumulate((rank + 1) ** -parameters.zipf_exponent for rank in range(parameters.num_prompts))
    cumulative = list(weights)
    asked: list[Asked] = []
    start_s = 0.0
    for session in itertools.count():
        start_s += rng.expovariate(parameters.sessions_per_s)
        if len(asked) >= parameters.num_requests and start_s > _nth_time(asked, parameters.num_requests):
            break
        rank = bisect.bisect_left(cumulative, rng.random() * cumulative[-1])
        asked += _session(session, start_s, popular[rank], rank, parameters, rng)
    return tuple(sorted(asked, key=lambda request: (request.at_s, request.session))[: parameters.num_requests])


def _nth_time(asked: Sequence[Asked], count: int) -> float:
    return sorted(request.at_s for request in asked)[count - 1]


def _plain(icon: Spec) -> Spec:
    """Returns an icon with at most one detail, so that the session can add some."""
    if icon.glow or icon.outline:
        return replace(icon, sparkles=False, tilt=None)
    return replace(icon, tilt=None) if icon.sparkles else icon


def _worded(icon: Spec, rng: random.Random) -> tuple[Spec, str]:
    return icon, caption(icon, rng, full=True)


def _session(
    session: int, start_s: float, first: tuple[Spec, str], rank: int, parameters: Parameters, rng: random.Random
) -> list[Asked]:
    icon, prompt = first
    seed = rank if rng.random() < parameters.pinned_share else None
    asked = [Asked(start_s, session, 0, Action.START, prompt, icon, seed)]
    at_s = start_s
    while rng.random() >= 1 / parameters.mean_session_requests:
        at_s += parameters.think_median_s * rng.lognormvariate(0, parameters.think_sigma)
        action = _action(parameters, rng)
        if action is Action.REPHRASE:
            icon, prompt = _rephrased(icon, prompt, rng)
        elif action is Action.ADD:
            icon = icon if _additions(icon) else _bare(icon)
            icon, prompt = _worded(rng.choice(_additions(icon))(icon), rng)
        elif action is Action.CHANGE:
            icon, prompt = _worded(_changed(icon, rng), rng)
        asked.append(Asked(at_s, session, len(asked), action, prompt, icon, seed))
    return asked


def _action(parameters: Parameters, rng: random.Random) -> Action:
    draw = rng.random()
    for action, share in (
        (Action.REPHRASE, parameters.rephrase),
        (Action.ADD, parameters.add),
        (Action.CHANGE, parameters.change),
    ):
        if draw < share:
            return action
        draw -= share
    return Action.REPEAT


def _rephrased(icon: Spec, prompt: str, rng: random.Random) -> tuple[Spec, str]:
    """Returns the same icon with another caption."""
    while True:
        worded = _worded(icon, rng)
        if worded[1] != prompt:
            return worded


def _additions(icon: Spec) -> list[Callable[[Spec], Spec]]:
    """Returns functions that add one missing detail each. As in the training data, glow and outline do not combine."""
    missing: list[Callable[[Spec], Spec]] = []
    if not icon.glow and not icon.outline:
        missing += [lambda spec: replace(spec, glow=True), lambda spec: replace(spec, outline=True)]
    if not icon.sparkles:
        missing.append(lambda spec: replace(spec, sparkles=True))
    if icon.tilt is None:
        missing += [lambda spec: replace(spec, tilt="left"), lambda spec: replace(spec, tilt="right")]
    if not icon.crystal and icon.colour in PAINTS and icon.colour != "black":
        missing.append(lambda spec: replace(spec, crystal=True))
    return missing


def _bare(icon: Spec) -> Spec:
    """Returns the icon without details, for when none is left to add."""
    return replace(icon, crystal=False, glow=False, outline=False, sparkles=False, tilt=None)


def _changed(icon: Spec, rng: random.Random) -> Spec:
    """Changes the colour, background or object, in this order of frequency."""
    kind = rng.choices(("colour", "background", "object"), (0.5, 0.3, 0.2))[0]
    kinds: dict[str, Iterable[str]] = {"colour": COLOURS, "background": BACKGROUNDS, "object": OBJECTS}
    values = kinds[kind]
    while True:
        value = rng.choice([other for other in values if other != getattr(icon, kind)])
        crystal = icon.crystal and kind != "colour"
        changed = replace(icon, **{kind: value}, crystal=crystal)  # type: ignore[arg-type]  # these three are strings
        if (changed.object, changed.colour) not in FORBIDDEN:
            return changed
