"""The error tree: what each error says and keeps, and that it survives a pickle and a copy."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Callable

import asyncpg
import pytest
from asyncpg.exceptions import _base

from dbop_raw import Failed
from dbop_raw.failure import errors
from dbop_raw.failure.classify import classify
from dbop_raw.failure.errors import (
    AcquireTimeout,
    CommitUnknown,
    DbopError,
    EngineClosed,
    EngineOverloaded,
    GroupFailed,
    LedgerMismatch,
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
    GroupFailed(index=7),
    LedgerMismatch(ledger="x", field="size", was=10, now=20),
    LedgerMismatch(ledger="x", field="columns", was=("id",), now=("id", "body")),
    LedgerMismatch(ledger="x", field="items", was=10, now=7, chunk=3),
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


def pickled(error: DbopError) -> DbopError:
    again: DbopError = pickle.loads(pickle.dumps(error))
    return again


def server(code: str, **fields: str) -> asyncpg.PostgresError:
    """An error of the server as the driver makes it."""
    return asyncpg.PostgresError.new(
        {"S": "ERROR", "V": "ERROR", "C": code, "M": "m", "D": "d", **fields}, query="SELECT 1"
    )


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_the_cause_of_an_error_travels_with_it(error: DbopError) -> None:
    given = type(error).__new__(type(error))
    given.args, given.__dict__ = error.args, dict(vars(error))
    given.__cause__ = server("23505", n="t_pkey", t="t")
    again = pickled(given)
    assert isinstance(again.__cause__, asyncpg.UniqueViolationError)
    assert vars(again.__cause__) == vars(given.__cause__)
    assert vars(again).keys() == vars(given).keys()
    assert copy.copy(given).__cause__ is given.__cause__


def test_an_error_without_a_cause_has_none_afterwards() -> None:
    again = pickled(RetriesExhausted(attempts=4, elapsed=1.25, reason="budget"))
    assert again.__cause__ is None
    assert not again.__suppress_context__


def test_causes_in_a_circle_travel() -> None:
    error = CommitUnknown()
    error.__cause__ = error
    again = pickled(error)
    assert again.__cause__ is again


def test_a_chain_of_our_own_errors_travels_whole() -> None:
    error, inner = RetriesExhausted(attempts=2, elapsed=1.0, reason="attempts"), CommitUnknown()
    inner.__cause__ = server("XX000")
    error.__cause__ = inner
    cause = pickled(error).__cause__
    assert isinstance(cause, CommitUnknown)
    assert isinstance(cause.__cause__, asyncpg.InternalServerError)


@pytest.mark.parametrize(
    "inner",
    [
        server("23505", n="t_pkey", t="t", s="public", R="_bt_check_unique"),
        _base.DataError("invalid input", hint="look at it"),
        asyncpg.InterfaceError("connection is closed"),
        ExceptionGroup("two", [server("40001"), ValueError("v")]),
        OperationTimeout(seconds=1.0),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_inside_an_error_travels_with_its_fields(inner: Exception) -> None:
    rollback = pickled(RollbackFailed(original=inner, rollback_error=inner, savepoint=True))
    assert isinstance(rollback, RollbackFailed)
    for found in (rollback.original, rollback.rollback_error):
        assert type(found) is type(inner)
        assert str(found) == str(inner)
        assert {k: repr(v) for k, v in vars(found).items()} == {k: repr(v) for k, v in vars(inner).items()}
    assert rollback.savepoint


def test_the_failed_items_of_a_skip_limit_travel_with_error_and_verdict() -> None:
    companion = GroupFailed(index=3)
    companion.__cause__ = server("23503")
    failed = tuple(
        Failed(index, {"id": index}, error, classify(error))
        for index, error in [(3, server("23503")), (4, companion)]
    )
    again = pickled(SkipLimitExceeded(limit=1, failed=failed, total=9))
    assert isinstance(again, SkipLimitExceeded)
    assert again.limit == 1
    assert [(one.index, one.item, one.verdict) for one in again.failed] == [
        (one.index, one.item, one.verdict) for one in failed
    ]
    assert again.failed[0].error.sqlstate == "23503"
    assert again.failed[1].error.__cause__.sqlstate == "23503"


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


@pytest.mark.parametrize("field", ["target", "columns", "size", "items", "growth"])
def test_a_ledger_mismatch_says_what_was_what_is_and_what_to_do(field: str) -> None:
    error = LedgerMismatch(ledger="events-1", field=field, was="was-7", now="now-8", chunk=3)
    for part in (
        "'events-1'",
        "was-7",
        "now-8",
        "run it again" if field == "growth" else "another ledger name",
    ):
        assert part in str(error)
    assert (error.ledger, error.field, error.was, error.now, error.chunk) == (
        "events-1", field, "was-7", "now-8", 3,
    )  # fmt: skip
