"""The error tree: what each error says and keeps, and that it survives a pickle and a copy."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Callable

import pytest

from dbop_raw.failure import errors
from dbop_raw.failure.errors import (
    AcquireTimeout,
    CommitUnknown,
    DbopError,
    EngineClosed,
    EngineOverloaded,
    OperationTimeout,
    PolicyError,
    RetriesExhausted,
    RollbackFailed,
    SkipLimitExceeded,
    TransactionAborted,
    TransactionMisuse,
)

EXAMPLES: list[DbopError] = [
    OperationTimeout(seconds=1.5),
    OperationTimeout(seconds=0.25, by_server=True),
    AcquireTimeout(seconds=0.5, size=4, max_size=10, idle=1, waiting=7),
    EngineOverloaded(waiting=8, max_waiting=8, max_size=10),
    EngineClosed(),
    RetriesExhausted(attempts=4, elapsed=1.25, reason="budget"),
    CommitUnknown(),
    TransactionAborted(),
    TransactionMisuse("add_event called conn.transaction()"),
    RollbackFailed(original=ValueError("x"), rollback_error=TimeoutError()),
    RollbackFailed(original=None, rollback_error=TimeoutError()),
    SkipLimitExceeded(limit=1, failed=("a secret", "another")),
    PolicyError("attempts=0 is not allowed"),
]


def test_every_error_has_an_example_here_and_a_place_in_the_drawing() -> None:
    public = {name: getattr(errors, name) for name in errors.__all__}
    assert {type(error) for error in EXAMPLES} | {DbopError} == set(public.values())
    for name in public:
        assert name in (errors.__doc__ or "")


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "through", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))], ids=["copy", "pickle"]
)
def test_an_error_survives_a_copy_and_a_pickle(
    error: DbopError, through: Callable[[DbopError], DbopError]
) -> None:
    again = through(error)
    assert type(again) is type(error)
    assert (str(again), again.args) == (str(error), error.args)
    assert {key: repr(value) for key, value in vars(again).items()} == {
        key: repr(value) for key, value in vars(error).items()
    }


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_a_message_is_one_line_and_holds_no_value_of_an_item(error: DbopError) -> None:
    assert str(error)
    assert "\n" not in str(error)
    assert "secret" not in str(error)


def test_timeouts_are_caught_as_timeouts_and_policy_errors_as_value_errors() -> None:
    assert issubclass(OperationTimeout, asyncio.TimeoutError)
    assert issubclass(AcquireTimeout, TimeoutError)
    assert issubclass(PolicyError, ValueError)


def test_a_timeout_says_whether_the_connection_is_usable() -> None:
    assert "stays usable" in str(OperationTimeout(seconds=1, by_server=True))
    assert "client stopped waiting" in str(OperationTimeout(seconds=1))


def test_an_acquire_timeout_has_its_numbers_in_the_message() -> None:
    message = str(AcquireTimeout(seconds=0.5, size=4, max_size=10, idle=1, waiting=7))
    for part in ("0.5 s", "4 of at most 10", "1 idle", "7 more"):
        assert part in message


def test_a_retry_explains_each_of_its_reasons() -> None:
    reasons = ("attempts", "budget", "deadline")
    messages = {str(RetriesExhausted(attempts=1, elapsed=0.1, reason=reason)) for reason in reasons}
    assert len(messages) == len(reasons)


def test_a_failed_rollback_keeps_both_errors() -> None:
    first, second = ValueError("first"), TimeoutError("second")
    error = RollbackFailed(original=first, rollback_error=second)
    assert error.original is first
    assert error.rollback_error is second
