"""From asyncpg's exceptions (made as asyncpg makes them), Python's and our own, to a verdict."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Any

import asyncpg
import pytest
from asyncpg import exceptions
from asyncpg.exceptions import _base

from dbop_raw.failure.classify import classify
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
from dbop_raw.failure.sqlstate import CONDITIONS, Repair, Rule, verdict_of

S, T, C, N, U = Repair.SAVEPOINT, Repair.TRANSACTION, Repair.CONNECTION, Repair.NEVER, Repair.UNKNOWN


def server(code: str, severity: str = "ERROR", **fields: str) -> asyncpg.PostgresError:
    """An error as the protocol brings it; the message is in another language, as it may be."""
    return asyncpg.PostgresError.new({"S": "ФАТАЛ", "V": severity, "C": code, "M": "сообщение", **fields})


def lost(cause: BaseException | None = None) -> asyncpg.PostgresError:
    """What asyncpg raises when the line goes in the middle of a command."""
    error = asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")
    error.__cause__ = cause
    return error


# --- the server


@pytest.mark.parametrize("code", sorted(CONDITIONS))
@pytest.mark.parametrize("severity", ["ERROR", "FATAL"])
def test_an_error_of_the_server_is_judged_by_its_code_and_severity(code: str, severity: str) -> None:
    assert classify(server(code, severity)) == verdict_of(code, severity=severity)


def test_a_code_that_the_driver_does_not_know_is_judged_too() -> None:
    verdict = classify(server("MY001"))
    assert (verdict.sqlstate, verdict.repair, verdict.item) == ("MY001", N, True)


def test_a_pooler_that_sends_no_untranslated_severity_is_understood() -> None:
    error = asyncpg.PostgresError.new({"S": "FATAL", "C": "57P01", "M": "…"})
    assert classify(error).evict


@pytest.mark.parametrize(
    ("code", "repair"),
    [
        ("57P01", C),
        ("57P02", C),
        ("57P05", C),
        ("25P03", C),
        ("25P04", N),
        ("57P04", N),
        ("08P01", U),
        ("23505", N),
        ("40001", C),
    ],
)
def test_a_line_lost_with_the_servers_last_words_is_judged_by_those(code: str, repair: Repair) -> None:
    verdict = classify(lost(server(code, "FATAL")))
    assert (verdict.sqlstate, verdict.repair, verdict.evict) == (code, repair, True)


def test_a_line_lost_after_an_ordinary_error_is_a_lost_line() -> None:
    # tests/faults/test_line.py: a cut between the ErrorResponse and the ReadyForQuery after it.
    for code in ("23505", "40001"):
        verdict = classify(lost(server(code)))
        assert (verdict.sqlstate, verdict.repair, verdict.evict, verdict.item) == ("08003", U, True, False)
    assert classify(lost(server("08P01"))) == classify(lost(server("08P01", "FATAL")))


@pytest.mark.parametrize("cause", [None, ConnectionResetError(), OSError()])
def test_a_line_lost_without_a_word_leaves_the_outcome_unknown(cause: BaseException | None) -> None:
    verdict = classify(lost(cause))
    assert (verdict.sqlstate, verdict.repair, verdict.evict, verdict.item) == ("08003", U, True, False)


def test_a_line_that_the_server_lost_to_another_node_is_not_ours() -> None:
    verdict = classify(server("08006"))
    assert (verdict.repair, verdict.evict) == (T, False)


def test_causes_in_a_circle_end() -> None:
    error = lost()
    error.__cause__ = error
    assert classify(error).repair is U
    given_up = RetriesExhausted(attempts=1, elapsed=0, reason="attempts")
    given_up.__cause__ = given_up
    assert classify(given_up).repair is N


def test_a_stale_plan_is_repaired_by_a_new_transaction_and_another_missing_feature_never() -> None:
    stale = server("0A000", R="RevalidateCachedQuery")
    assert isinstance(stale, exceptions.InvalidCachedStatementError)
    assert classify(stale).repair is T
    assert classify(server("0A000", "FATAL", R="RevalidateCachedQuery")).evict
    assert classify(server("0A000", R="transformStmt")).repair is N


def test_a_row_level_security_policy_refuses_a_row_and_a_missing_privilege_the_statement() -> None:
    assert classify(server("42501", R="ExecWithCheckOptions")).item
    assert not classify(server("42501", R="aclcheck_error")).item


@pytest.mark.parametrize("key", ["0A000", "0A"])
def test_overrides_win_over_the_table_and_over_the_routine(key: str) -> None:
    rows = {key: Rule(N, item=True, reason="ours")}
    verdict = classify(server("0A000", R="RevalidateCachedQuery"), overrides=rows)
    assert (verdict.repair, verdict.reason) == (N, "ours")
    assert classify(lost(server("0A000", "FATAL")), overrides=rows).reason == "ours"


# --- the driver


def test_a_value_that_the_client_refuses_is_one_rows_fault() -> None:
    for error in (exceptions.DataError("invalid input"), _base.DataError("invalid input")):
        verdict = classify(error)
        assert (verdict.sqlstate, verdict.condition) == ("22000", "data_exception")
        assert (verdict.repair, verdict.item, verdict.evict) == (N, True, False)


def test_a_command_on_a_closed_connection_sent_nothing() -> None:
    error = asyncpg.InterfaceError("connection is closed")
    verdict = classify(error, closed=True)
    assert (verdict.repair, verdict.evict, verdict.item) == (C, True, False)
    for closed in (None, False):
        verdict = classify(error, closed=closed)
        assert (verdict.repair, verdict.evict, verdict.item) == (N, False, False)


def test_the_drivers_own_check_for_a_closed_connection_is_known_by_its_frame() -> None:
    conn: Any = asyncpg.Connection.__new__(asyncpg.Connection)
    conn._aborted = True
    with pytest.raises(asyncpg.InterfaceError) as caught:
        conn._check_open()
    assert classify(caught.value).repair is C


def test_a_row_of_the_wrong_length_is_known_by_the_drivers_hint() -> None:
    verdict = classify(asyncpg.InterfaceError("19 were passed", hint="Check the query"))
    assert (verdict.repair, verdict.item, verdict.evict) == (N, True, False)
    wrong_option = exceptions.ClientConfigurationError("bad DSN", hint="Check the DSN")
    assert not classify(wrong_option).item


def test_a_wrong_configuration_is_nobodys_row() -> None:
    verdict = classify(exceptions.ClientConfigurationError("bad DSN"))
    assert (verdict.repair, verdict.item, verdict.evict) == (N, False, False)


def test_errors_inside_the_driver() -> None:
    verdict = classify(exceptions.OutdatedSchemaCacheError("x"))
    assert (verdict.repair, verdict.evict, verdict.item) == (T, False, False)
    assert classify(exceptions.TargetServerAttributeNotMatched("x")).repair is C
    verdict = classify(exceptions.ProtocolError("x"))
    assert (verdict.repair, verdict.evict) == (N, True)
    # The server may have ended the session between two commands: before COMMIT a new one repairs it.
    verdict = classify(exceptions.InternalClientError("x"))
    assert (verdict.repair, verdict.evict) == (U, True)


# --- Python


@pytest.mark.parametrize(
    "error",
    [
        TypeError(),
        OverflowError(),
        IndexError(),
        ValueError(),
        RuntimeError(),
        ExceptionGroup("x", [OSError()]),
    ],
)
def test_what_the_body_or_a_value_raised_is_one_items_fault(error: Exception) -> None:
    verdict = classify(error)
    assert (verdict.sqlstate, verdict.condition) == (None, type(error).__name__)
    assert (verdict.repair, verdict.item, verdict.evict) == (N, True, False)


@pytest.mark.parametrize(
    "error", [OSError(), ConnectionRefusedError(), socket.gaierror(), FileNotFoundError(), ssl.SSLEOFError()]
)
def test_what_connecting_raised_sent_nothing(error: OSError) -> None:
    verdict = classify(error)
    assert (verdict.repair, verdict.evict, verdict.item) == (C, True, False)


@pytest.mark.parametrize("error", [ssl.SSLError(), ssl.SSLCertVerificationError()])
def test_tls_that_was_refused_is_refused_again(error: OSError) -> None:
    assert classify(error).repair is N


def test_a_timeout_that_is_not_ours_leaves_the_outcome_unknown() -> None:
    verdict = classify(TimeoutError())
    assert (verdict.repair, verdict.evict) == (U, True)


@pytest.mark.parametrize("error", [asyncio.CancelledError(), KeyboardInterrupt(), GeneratorExit()])
def test_a_cancellation_is_never_repaired_and_its_connection_is_thrown_away(error: BaseException) -> None:
    verdict = classify(error)
    assert (verdict.repair, verdict.evict, verdict.item) == (N, True, False)


# --- ours

OURS: list[tuple[DbopError, Repair, bool, bool]] = [
    (OperationTimeout(seconds=1, by_server=True), S, False, True),
    (OperationTimeout(seconds=1), S, True, False),
    (AcquireTimeout(seconds=1, size=1, max_size=1, idle=0, waiting=1), N, False, False),
    (EngineOverloaded(waiting=1, max_waiting=1, max_size=1), N, False, False),
    (EngineClosed(), N, False, False),
    (RetriesExhausted(attempts=1, elapsed=1, reason="attempts"), N, False, True),
    (SkipLimitExceeded(limit=1, failed=()), N, False, False),
    (PolicyError("x"), N, False, False),
    (TransactionMisuse("x"), N, False, False),
    (CommitUnknown(), U, True, False),
    (TransactionAborted(), N, False, False),
    (RollbackFailed(original=None, rollback_error=OSError()), C, True, False),
]


@pytest.mark.parametrize(("error", "repair", "evict", "item"), OURS)
def test_our_own_errors(error: DbopError, repair: Repair, evict: bool, item: bool) -> None:
    verdict = classify(error)
    assert (verdict.repair, verdict.evict, verdict.item) == (repair, evict, item)
    assert verdict.condition == type(error).__name__


def test_a_retry_that_gave_up_is_final_and_keeps_the_code_and_the_eviction_of_the_last_error() -> None:
    for cause, code, evict in ((server("40001"), "40001", False), (lost(), "08003", True)):
        error = RetriesExhausted(attempts=2, elapsed=1, reason="attempts")
        error.__cause__ = cause
        outer = RetriesExhausted(attempts=2, elapsed=1, reason="attempts")
        outer.__cause__ = error
        for given_up in (error, outer):
            verdict = classify(given_up)
            assert (verdict.sqlstate, verdict.repair, verdict.evict, verdict.item) == (
                code,
                N,
                evict,
                not evict,
            )


# --- a connection that is known to be closed


@pytest.mark.parametrize(
    "error", [server("55P03"), server("40001"), server("08006"), OperationTimeout(seconds=1, by_server=True)]
)
def test_a_closed_connection_can_only_be_replaced(error: Exception) -> None:
    verdict = classify(error, closed=True)
    assert (verdict.repair, verdict.evict, verdict.item) == (C, True, False)


def test_a_closed_connection_does_not_make_a_permanent_error_transient_nor_an_unknown_outcome_known() -> None:
    assert classify(server("23505"), closed=True).repair is N
    assert classify(lost(), closed=True).repair is U
