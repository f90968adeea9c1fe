"""Fixtures: the runners of all languages, each built and started once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest

from tests.clients.runner import Runner
from tests.clients.toolchains import require
from tools.clients import runners as built


@pytest.fixture(scope="session")
def runners() -> Iterator[Callable[[str], Runner]]:
    """Returns the runner of a language. Skips the test if the toolchain is not installed."""

    @functools.cache
    def of(language: str) -> Runner:
        require(language)
        made[language] = Runner(built.runner(language))
        return made[language]

    made: dict[str, Runner] = {}
    yield of
    failures = []
    for runner in made.values():
        try:
            runner.close()
        except AssertionError as failure:
            failures.append(failure)
    if failures:
        raise ExceptionGroup("runners", failures)
