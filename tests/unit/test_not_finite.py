"""A decoder whose arithmetic overflows gives no picture: the output fails, and nothing is kept of it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np
import pytest
from safelight_server.catalog.pixels import NotFiniteError, to_pixels
from safelight_server.domain.component import Component
from safelight_server.domain.errors import InternalError

from tests.conftest import eventually
from tests.unit.test_execution import STEPS, GatedRuntime, Member, Stage
from tests.unit.test_leased_runner import NAME, POINTER, Pair

BAD = (np.nan, np.inf, -np.inf)


def overflow(runtime: GatedRuntime, value: float) -> None:
    """Makes the decoder return one such value from now on."""
    run = runtime.run

    async def poisoned(instance, model, component, inputs):  # type: ignore[no-untyped-def]  # as the protocol
        results = dict(await run(instance, model, component, inputs))
        if component is Component.DECODER:
            results["image"] = results["image"].copy()
            results["image"][..., 0, 0] = value
        return results

    runtime.run = poisoned  # type: ignore[method-assign]


@pytest.mark.parametrize("value", BAD)
def test_pixels_are_made_of_numbers_only(value: float) -> None:
    image = np.zeros((3, 4, 4), np.float32)
    image[1, 2, 3] = value
    with pytest.raises(NotFiniteError):
        to_pixels(image)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    made = Pair()
    yield made
    await made.one.close()
    await made.other.close()


async def test_alone_the_output_fails() -> None:
    stage = Stage()
    overflow(stage.runtime, np.nan)
    member, execution = Member(), stage.execution()
    execution.join(member)
    await stage.step(execution, STEPS)
    await eventually(lambda: isinstance(member.error, InternalError))
    assert member.picture is None
    assert stage.executions.find("same") is None, "a later request must develop it again"
    await stage.engine.close()


async def test_beside_others_it_fails_too_and_is_neither_kept_nor_billed(pair: Pair) -> None:
    overflow(pair.one.stage.runtime, np.nan)
    member, execution = Member(), pair.one.execution()
    execution.join(member)
    await pair.one.step(execution, STEPS)
    await eventually(lambda: isinstance(member.error, InternalError))
    await eventually(lambda: not pair.one.leased_runners._tasks)
    assert await pair.bills() == []
    assert await pair.store.get(POINTER) is None
    assert await pair.coordinator.holder(NAME) is None, "others may try"
