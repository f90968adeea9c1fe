"""One hierarchy: each error has its status and reason, and the reference page has them all."""

from __future__ import annotations

import re
from pathlib import Path

import grpc
import pytest
from safelight_server.domain import errors
from safelight_server.domain.errors import (
    FieldViolation,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    SafelightError,
)

ROOT = Path(__file__).parents[2]
SOURCES = "\n".join(path.read_text() for path in (ROOT / "server" / "safelight_server").rglob("*.py"))
PAGE = ROOT / "docs" / "operations" / "errors.md"


def kinds(kind: type[SafelightError] = SafelightError) -> list[type[SafelightError]]:
    return [each for sub in kind.__subclasses__() for each in (sub, *kinds(sub))]


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_each_error_has_a_status_and_a_place_in_the_tree(kind: type[SafelightError]) -> None:
    assert isinstance(kind.status, grpc.StatusCode)
    assert re.fullmatch(r"[A-Z_]+", kind.reason)
    line = next(line for line in (errors.__doc__ or "").splitlines() if f" {kind.__name__} " in line)
    assert f" {kind.status.name}" in line


def test_the_reference_page_has_every_reason_with_its_status() -> None:
    told = dict(re.findall(r"^\| `([A-Z_]+)` \| ([A-Z_]+) \|", PAGE.read_text(), re.MULTILINE))
    used = set(re.findall(r'\breason ?= ?"([A-Z_]+)"', SOURCES))
    assert used == set(told)
    assert {kind.reason: kind.status.name for kind in kinds()}.items() <= told.items()


def test_the_reference_page_has_every_warning() -> None:
    for reason in re.findall(r'Notice\("([A-Z_]+)"', SOURCES):
        assert f"`{reason}`" in PAGE.read_text()


def test_the_message_tells_the_first_faults_and_how_many_follow() -> None:
    faults = [FieldViolation(f"f{n}", "bad") for n in range(5)]
    assert InvalidRequestError(faults).message == "f0: bad; f1: bad; f2: bad; and 2 more"
    assert InvalidRequestError(faults[:3]).message == "f0: bad; f1: bad; f2: bad"
    assert InvalidRequestError(faults).violations == tuple(faults)


def test_a_bug_has_a_fixed_text() -> None:
    assert InternalError().message == "internal error; the server's log has the details"


def test_a_reason_can_be_narrowed() -> None:
    error = NotFoundError("gone", reason="MODEL_NOT_FOUND", metadata={"a": "b"}, retry_after_s=1.0)
    assert (error.reason, error.metadata, error.retry_after_s) == ("MODEL_NOT_FOUND", {"a": "b"}, 1.0)
    assert NotFoundError("gone").reason == "NOT_FOUND"
