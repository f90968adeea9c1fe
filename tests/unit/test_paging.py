"""Pages cover the list once, in order, and only tokens that the server made continue it."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safelight_server.api.paging import DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE, page
from safelight_server.domain.errors import InvalidRequestError

NAMES = [f"model-{number:04}" for number in range(250)]


@given(names=st.sets(st.text(st.characters(codec="utf-8"), min_size=1)), size=st.integers(1, 7))
def test_pages_cover_the_list_once(names: set[str], size: int) -> None:
    seen, token = [], ""
    while True:
        found, token = page(sorted(names), size, token)
        assert len(found) <= size
        seen += found
        if not token:
            break
        assert found
    assert seen == sorted(names)


def test_sizes_have_a_default_and_a_most() -> None:
    assert len(page(NAMES, 0, "")[0]) == DEFAULT_PAGE_SIZE
    assert len(page(NAMES, 1000, "")[0]) == MAX_PAGE_SIZE


def test_a_full_last_page_has_no_token() -> None:
    assert page(NAMES[:3], 3, "") == (NAMES[:3], "")


def test_a_name_that_has_gone_does_not_break_the_way_on() -> None:
    _, token = page(NAMES, 3, "")
    assert page(NAMES[:2] + NAMES[3:], 2, token)[0] == NAMES[3:5]


@pytest.mark.parametrize("token", ["model-0003", "x", "====", "\0", base64.b64encode(b"9:model-0003").decode(), "é"])
def test_a_token_that_was_not_given_out_is_refused(token: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        page(NAMES, 0, token)
    (fault,) = refused.value.violations
    assert (fault.field, fault.description) == (
        "page_token",
        "must be next_page_token of an earlier response, or empty",
    )


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(InvalidRequestError) as refused:
        page(NAMES, -1, "x")
    assert [fault.field for fault in refused.value.violations] == ["page_size", "page_token"]
