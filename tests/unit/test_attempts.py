"""A member is given up for what it does alone, never for the company it was in."""

from __future__ import annotations

from safelight_server.attempts import MAX_ATTEMPTS, MAX_LOST, Attempts
from safelight_server.runtime.base import Fault
from safelight_server.scheduler import Batch, Kind, Row


def batch(*output_ids: int, kind: Kind = Kind.DENOISE) -> Batch:
    return Batch(1, kind, "key", 0, tuple(Row(output_id) for output_id in output_ids))


def test_failures_in_company_count_for_nobody():
    attempts = Attempts()
    for _ in range(10):
        assert not attempts.failed(batch(1, 2), Fault.ROWS, retryable=True)
    assert not attempts.failed(batch(1, 2), Fault.ROWS, retryable=False)
    assert not attempts.failed(batch(1), Fault.ROWS, retryable=True)


def test_both_rows_of_one_output_are_no_company():
    attempts = Attempts()
    assert list(attempts.failed(batch(7, 7), Fault.ROWS, retryable=False)) == [7]


def test_a_member_that_fails_alone_is_given_up_at_last():
    attempts = Attempts()
    for _ in range(2):  # what was counted goes with the verdict
        outcomes = [list(attempts.failed(batch(1), Fault.ROWS, retryable=True)) for _ in range(MAX_ATTEMPTS)]
        assert outcomes == [[]] * (MAX_ATTEMPTS - 1) + [[1]]


def test_a_success_forgets_earlier_failures():
    attempts = Attempts()
    for _ in range(3 * MAX_ATTEMPTS):
        assert not attempts.failed(batch(1), Fault.ROWS, retryable=True)
        attempts.succeeded(batch(1, 2))


def test_previews_and_what_has_ended_are_not_counted():
    attempts = Attempts()
    for _ in range(MAX_ATTEMPTS):
        assert not attempts.failed(batch(1, kind=Kind.PREVIEW), Fault.ROWS, retryable=False)
        assert not attempts.failed(batch(1), Fault.ROWS, retryable=True)
        attempts.forget(1)


def test_lost_instances_are_counted_apart_and_refusals_not_at_all():
    attempts = Attempts()
    for _ in range(MAX_LOST - 1):
        assert not attempts.failed(batch(1), Fault.INSTANCE, retryable=True)
        assert not attempts.failed(batch(1), Fault.NOBODY, retryable=True)
    assert not attempts.failed(batch(1), Fault.ROWS, retryable=True)
    assert list(attempts.failed(batch(1), Fault.INSTANCE, retryable=True)) == [1]
