"""A member fails only if its rows fail alone, never because of others in its batch."""

from __future__ import annotations

from safelight_server.engine.retries import MAX_ATTEMPTS, MAX_LOST, RetryCounter
from safelight_server.runtime.base import FaultOrigin
from safelight_server.scheduler import Batch, Kind, Row


def batch(*output_ids: int, kind: Kind = Kind.DENOISE) -> Batch:
    return Batch(1, kind, "key", 0, tuple(Row(output_id) for output_id in output_ids))


def test_failures_in_company_count_for_nobody():
    attempts = RetryCounter()
    for _ in range(10):
        assert not attempts.failed(batch(1, 2), FaultOrigin.ROWS, retryable=True)
    assert not attempts.failed(batch(1, 2), FaultOrigin.ROWS, retryable=False)
    assert not attempts.failed(batch(1), FaultOrigin.ROWS, retryable=True)


def test_both_rows_of_one_output_are_no_company():
    attempts = RetryCounter()
    assert list(attempts.failed(batch(7, 7), FaultOrigin.ROWS, retryable=False)) == [7]


def test_a_member_that_fails_alone_is_given_up_at_last():
    attempts = RetryCounter()
    for _ in range(2):  # counts are cleared with the verdict
        outcomes = [list(attempts.failed(batch(1), FaultOrigin.ROWS, retryable=True)) for _ in range(MAX_ATTEMPTS)]
        assert outcomes == [[]] * (MAX_ATTEMPTS - 1) + [[1]]


def test_a_success_forgets_earlier_failures():
    attempts = RetryCounter()
    for _ in range(3 * MAX_ATTEMPTS):
        assert not attempts.failed(batch(1), FaultOrigin.ROWS, retryable=True)
        attempts.succeeded(batch(1, 2))


def test_previews_and_what_has_ended_are_not_counted():
    attempts = RetryCounter()
    for _ in range(MAX_ATTEMPTS):
        assert not attempts.failed(batch(1, kind=Kind.PREVIEW), FaultOrigin.ROWS, retryable=False)
        assert not attempts.failed(batch(1), FaultOrigin.ROWS, retryable=True)
        attempts.forget(1)


def test_lost_instances_are_counted_apart_and_refusals_not_at_all():
    attempts = RetryCounter()
    for _ in range(MAX_LOST - 1):
        assert not attempts.failed(batch(1), FaultOrigin.INSTANCE, retryable=True)
        assert not attempts.failed(batch(1), FaultOrigin.NOBODY, retryable=True)
    assert not attempts.failed(batch(1), FaultOrigin.ROWS, retryable=True)
    assert list(attempts.failed(batch(1), FaultOrigin.INSTANCE, retryable=True)) == [1]
