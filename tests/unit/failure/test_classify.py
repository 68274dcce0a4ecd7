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

from dbop_raw.failure import errors
from dbop_raw.failure.classify import Phase, classify
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
from dbop_raw.failure.sqlstate import CONDITIONS, Repair, Rule, verdict_of
from tests.support.failures import lost_line, server_error

S, T, C, N, U = Repair.SAVEPOINT, Repair.TRANSACTION, Repair.CONNECTION, Repair.NEVER, Repair.UNKNOWN


# --- the server


@pytest.mark.parametrize("code", sorted(CONDITIONS))
@pytest.mark.parametrize("severity", ["ERROR", "FATAL"])
def test_an_error_of_the_server_is_judged_by_its_code_and_severity(code: str, severity: str) -> None:
    assert classify(server_error(code, severity)) == verdict_of(code, severity=severity)


def test_a_code_that_the_driver_does_not_know_is_judged_too() -> None:
    verdict = classify(server_error("MY001"))
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
    verdict = classify(lost_line(server_error(code, "FATAL")))
    assert (verdict.sqlstate, verdict.repair, verdict.evict) == (code, repair, True)


@pytest.mark.parametrize("code", ["23505", "40001"])
def test_a_line_lost_after_an_ordinary_error_is_a_lost_line(code: str) -> None:
    # tests/faults/test_line.py: a cut between the ErrorResponse and the ReadyForQuery after it.
    verdict = classify(lost_line(server_error(code)))
    assert (verdict.sqlstate, verdict.repair, verdict.evict, verdict.item) == ("08003", U, True, False)


def test_a_line_lost_after_a_protocol_violation_is_judged_by_it_whatever_its_severity() -> None:
    assert classify(lost_line(server_error("08P01"))) == classify(lost_line(server_error("08P01", "FATAL")))


@pytest.mark.parametrize("cause", [None, ConnectionResetError(), OSError()])
def test_a_line_lost_without_a_word_leaves_the_outcome_unknown(cause: BaseException | None) -> None:
    verdict = classify(lost_line(cause))
    assert (verdict.sqlstate, verdict.repair, verdict.evict, verdict.item) == ("08003", U, True, False)


def test_a_line_that_the_server_lost_to_another_node_is_not_ours() -> None:
    verdict = classify(server_error("08006"))
    assert (verdict.repair, verdict.evict) == (T, False)


@pytest.mark.parametrize(
    ("error", "repair"),
    [(lost_line(), U), (RetriesExhausted(attempts=1, elapsed=0, reason="attempts"), N)],
)
def test_an_error_that_is_its_own_cause_is_classified_too(error: Exception, repair: Repair) -> None:
    error.__cause__ = error
    try:
        assert classify(error).repair is repair
    finally:
        error.__cause__ = None


def test_a_stale_plan_is_repaired_by_a_new_transaction_and_another_missing_feature_never() -> None:
    stale = server_error("0A000", R="RevalidateCachedQuery")
    assert isinstance(stale, exceptions.InvalidCachedStatementError)
    assert classify(stale).repair is T
    assert classify(server_error("0A000", "FATAL", R="RevalidateCachedQuery")).evict
    assert classify(server_error("0A000", R="transformStmt")).repair is N


def test_a_row_level_security_policy_refuses_a_row_and_a_missing_privilege_the_statement() -> None:
    assert classify(server_error("42501", R="ExecWithCheckOptions")).item
    assert not classify(server_error("42501", R="aclcheck_error")).item


def test_a_row_that_citus_refuses_under_copy_is_the_rows_fault_on_a_healthy_connection() -> None:
    # multi_copy.c: the worker's message without its code.
    verdict = classify(server_error("XX000", R="ReportCopyError"))
    assert (verdict.repair, verdict.item, verdict.evict, verdict.blame) == (N, True, False, "item")
    bug = classify(server_error("XX000", R="elog_internal"))
    assert (bug.repair, bug.item, bug.evict, bug.blame) == (N, False, True, "server")


def test_a_worker_of_citus_that_is_lost_under_copy_is_another_node() -> None:
    verdict = classify(server_error("58030", R="ReportCopyError"))
    assert (verdict.repair, verdict.item, verdict.evict, verdict.blame) == (T, False, False, "server")


def test_a_session_that_ends_in_that_routine_is_gone_all_the_same() -> None:
    verdict = classify(server_error("XX000", "FATAL", R="ReportCopyError"))
    assert (verdict.item, verdict.evict) == (False, True)


@pytest.mark.parametrize("key", ["0A000", "0A"])
def test_overrides_win_over_the_table_and_over_the_routine(key: str) -> None:
    rows = {key: Rule(N, item=True, reason="ours")}
    verdict = classify(server_error("0A000", R="RevalidateCachedQuery"), overrides=rows)
    assert (verdict.repair, verdict.reason) == (N, "ours")
    assert classify(lost_line(server_error("0A000", "FATAL")), overrides=rows).reason == "ours"


# --- the driver


@pytest.mark.parametrize("kind", [exceptions.DataError, _base.DataError])
def test_a_value_that_the_client_refuses_is_one_rows_fault(kind: type[Exception]) -> None:
    verdict = classify(kind("invalid input"))
    assert (verdict.sqlstate, verdict.condition) == ("22000", "data_exception")
    assert (verdict.repair, verdict.item, verdict.evict) == (N, True, False)


@pytest.mark.parametrize(
    ("closed", "repair", "evict"), [(True, C, True), (None, N, False), (False, N, False)]
)
def test_a_command_on_a_connection_that_is_known_to_be_closed_sent_nothing(
    closed: bool | None, repair: Repair, evict: bool
) -> None:
    verdict = classify(asyncpg.InterfaceError("connection is closed"), closed=closed)
    assert (verdict.repair, verdict.evict, verdict.item) == (repair, evict, False)


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


@pytest.mark.parametrize(
    ("kind", "repair", "evict"),
    [
        (exceptions.OutdatedSchemaCacheError, T, False),
        (exceptions.TargetServerAttributeNotMatched, C, False),
        (exceptions.ProtocolError, N, True),
        # The server may have ended the session between two commands: before COMMIT a new one repairs it.
        (exceptions.InternalClientError, U, True),
    ],
)
def test_an_error_inside_the_driver_is_no_items_fault(
    kind: type[Exception], repair: Repair, evict: bool
) -> None:
    verdict = classify(kind("x"))
    assert (verdict.repair, verdict.evict, verdict.item) == (repair, evict, False)


# --- Python


@pytest.mark.parametrize(
    "error",
    [
        TypeError(),
        OverflowError(),
        IndexError(),
        ValueError(),
        RuntimeError(),
        EOFError(),
    ],
)
def test_an_error_of_the_body_or_of_a_value_is_one_items_fault(error: Exception) -> None:
    verdict = classify(error)
    assert (verdict.sqlstate, verdict.condition) == (None, type(error).__name__)
    assert (verdict.repair, verdict.item, verdict.evict) == (N, True, False)


@pytest.mark.parametrize(
    "error", [OSError(), ConnectionRefusedError(), socket.gaierror(), FileNotFoundError(), ssl.SSLEOFError()]
)
@pytest.mark.parametrize("phase", [None, Phase.ACQUIRE])
def test_an_error_of_connecting_sent_nothing(error: OSError, phase: Phase | None) -> None:
    verdict = classify(error, phase=phase)
    assert (verdict.repair, verdict.evict, verdict.item) == (C, True, False)


@pytest.mark.parametrize("error", [ssl.SSLError(), ssl.SSLCertVerificationError()])
@pytest.mark.parametrize("phase", [None, Phase.ACQUIRE])
def test_a_refusal_of_tls_is_never_repaired(error: OSError, phase: Phase | None) -> None:
    assert classify(error, phase=phase).repair is N


def test_a_timeout_of_which_nothing_is_known_leaves_the_outcome_unknown() -> None:
    verdict = classify(TimeoutError())
    assert (verdict.repair, verdict.evict) == (U, True)


def test_a_timeout_while_connecting_sent_nothing() -> None:
    assert classify(TimeoutError(), phase=Phase.ACQUIRE).repair is C


OWN = [OSError(), FileNotFoundError(), ConnectionResetError(), TimeoutError(), EOFError(), ssl.SSLError()]


def in_module(name: str, error: Exception) -> Exception:
    """The error as code of that module raises it."""
    scope: dict[str, Any] = {"__name__": name, "error": error}
    exec("def f():\n    raise error", scope)  # noqa: S102 - a frame of another module
    with pytest.raises(type(error)):
        scope["f"]()
    return error


def raised(error: Exception) -> Exception:
    """The error as a body raises it."""
    return in_module("service.orders", error)


@pytest.mark.parametrize("error", OWN, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("phase", [Phase.BODY, Phase.STATEMENT])
@pytest.mark.parametrize("closed", [False, None])
def test_an_error_of_the_bodys_own_input_or_output_is_permanent_and_evicts_nothing(
    error: Exception, phase: Phase, closed: bool | None
) -> None:
    verdict = classify(raised(error), closed=closed, phase=phase)
    assert (verdict.repair, verdict.evict, verdict.item, verdict.blame) == (N, False, True, "caller")
    assert (verdict.sqlstate, verdict.condition) == (None, type(error).__name__)


@pytest.mark.parametrize("error", [error for error in OWN if isinstance(error, OSError)], ids=repr)
def test_such_an_error_on_a_connection_that_is_gone_may_be_of_the_line(error: Exception) -> None:
    verdict = classify(raised(error), closed=True, phase=Phase.BODY)
    assert (verdict.repair, verdict.evict, verdict.item, verdict.blame) == (U, True, False, "server")


def test_the_drivers_own_timeout_in_a_transaction_is_repaired_from_a_savepoint() -> None:
    timed_out = in_module("asyncpg.protocol.protocol", TimeoutError())
    verdict = classify(timed_out, closed=False, phase=Phase.BODY)
    assert (verdict.repair, verdict.evict, verdict.item, verdict.blame) == (S, False, True, "load")


def test_the_drivers_own_timeout_of_a_statement_that_commits_by_itself_leaves_the_outcome_unknown() -> None:
    timed_out = in_module("asyncpg.protocol.protocol", TimeoutError())
    verdict = classify(timed_out, closed=False, phase=Phase.STATEMENT)
    assert (verdict.repair, verdict.evict, verdict.item) == (U, False, False)


def test_a_file_that_the_driver_was_to_read_is_the_bodys_own() -> None:
    missing = in_module("asyncpg.connection", FileNotFoundError())
    assert classify(missing, closed=False, phase=Phase.BODY).repair is N


# --- statements that commit by themselves


@pytest.mark.parametrize("code", ["08006", "57P01", "57P02", "58030"])
def test_a_statement_that_commits_by_itself_may_be_done_where_a_node_or_the_system_failed(code: str) -> None:
    assert classify(server_error(code), phase=Phase.BODY).repair in {T, C}
    verdict = classify(server_error(code), phase=Phase.STATEMENT)
    assert (verdict.repair, verdict.item) == (U, False)


def test_a_statement_that_commits_by_itself_may_be_done_whatever_an_override_says() -> None:
    rows = {"XX000": Rule(T, reason="ours")}
    assert classify(server_error("XX000"), overrides=rows, phase=Phase.BODY).repair is T
    assert classify(server_error("XX000"), overrides=rows, phase=Phase.STATEMENT).repair is U


@pytest.mark.parametrize("code", ["57P01", "57P02"])
def test_a_session_ended_in_the_middle_of_such_a_statement_leaves_its_outcome_unknown(code: str) -> None:
    # Ended while it waited for a synchronous standby, it is committed.
    verdict = classify(lost_line(server_error(code, "FATAL")), closed=True, phase=Phase.STATEMENT)
    assert (verdict.repair, verdict.evict) == (U, True)
    assert classify(lost_line(server_error(code, "FATAL")), closed=True, phase=Phase.BODY).repair is C


@pytest.mark.parametrize("code", ["40001", "40P01", "55P03", "55006"])
def test_a_statement_that_commits_by_itself_can_be_repeated_where_it_was_refused(code: str) -> None:
    assert classify(server_error(code), phase=Phase.STATEMENT) == classify(server_error(code))


def test_a_statement_whose_rows_the_driver_could_not_read_may_be_done() -> None:
    outdated = exceptions.OutdatedSchemaCacheError("x")
    assert classify(outdated, phase=Phase.BODY).repair is T
    assert classify(outdated, phase=Phase.STATEMENT).repair is U


# --- groups


def group(*errors: Exception) -> ExceptionGroup[Exception]:
    return ExceptionGroup("tasks", errors)


OWN_TIMEOUT = OperationTimeout(seconds=1, by_server=True)


@pytest.mark.parametrize(
    ("errors", "repair"),
    [
        ((server_error("40001"),), T),
        ((server_error("55P03"), OWN_TIMEOUT), S),
        ((server_error("55P03"), server_error("40001")), T),
        ((server_error("40001"), server_error("26000")), C),
        ((server_error("40001"), server_error("23505")), N),
        ((server_error("26000"), ValueError()), N),
        ((server_error("40001"), lost_line()), U),
        ((ValueError(), lost_line()), U),
    ],
)
def test_a_group_needs_the_strictest_repair_of_its_leaves(
    errors: tuple[Exception, ...], repair: Repair
) -> None:
    for order in (errors, errors[::-1]):
        assert classify(group(*order)).repair is repair
        assert classify(group(group(*order[:1]), *order[1:])).repair is repair


def test_in_a_transaction_a_lost_line_in_a_group_is_less_than_a_permanent_error() -> None:
    # Before COMMIT an unknown outcome is a sure rollback: what counts is that a leaf fails again.
    assert classify(group(lost_line(), ValueError()), phase=Phase.BODY).repair is N
    assert classify(group(lost_line(), server_error("40001")), phase=Phase.BODY).repair is U
    assert classify(group(lost_line(), ValueError()), phase=Phase.STATEMENT).repair is U


def test_a_group_evicts_if_one_leaf_does_and_is_an_items_fault_only_if_all_are() -> None:
    verdict = classify(group(server_error("23505"), server_error("26000")))
    assert (verdict.evict, verdict.item) == (True, False)
    verdict = classify(group(server_error("23505"), ValueError()))
    assert (verdict.evict, verdict.item, verdict.sqlstate) == (False, True, "23505")


def test_a_leaf_of_a_group_is_judged_with_overrides_phase_and_the_state_of_the_connection() -> None:
    assert classify(group(server_error("23505")), overrides={"23505": Rule(T, reason="x")}).repair is T
    assert classify(group(raised(OSError())), phase=Phase.BODY, closed=False).repair is N
    assert classify(group(server_error("40001")), closed=True).repair is C


def test_a_group_with_a_cancellation_inside_is_a_cancellation() -> None:
    mixed = BaseExceptionGroup("tasks", [server_error("40001"), asyncio.CancelledError()])
    verdict = classify(mixed)
    assert (verdict.repair, verdict.evict, verdict.item) == (N, True, False)


# --- whom to blame


@pytest.mark.parametrize("module", ["asyncpg.protocol.protocol", "dbop_raw.batching.writers"])
def test_a_value_that_can_not_be_sent_is_the_items_fault_and_a_bug_in_the_body_the_callers(
    module: str,
) -> None:
    for error in (TypeError(), OverflowError()):
        assert classify(in_module(module, error)).blame == "item"
        assert classify(raised(error.with_traceback(None))).blame == "caller"


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
    (GroupFailed(index=0), N, False, True),
    (LedgerMismatch(ledger="x", field="size", was=1, now=2), N, False, False),
    (CommitUnknown(), U, True, False),
    (TransactionAborted(), N, False, False),
    (RollbackFailed(original=None, rollback_error=OSError()), C, True, False),
]


@pytest.mark.parametrize(("error", "repair", "evict", "item"), OURS)
def test_an_error_of_our_own_has_its_verdict(
    error: DbopError, repair: Repair, evict: bool, item: bool
) -> None:
    verdict = classify(error)
    assert (verdict.repair, verdict.evict, verdict.item) == (repair, evict, item)
    assert verdict.condition == type(error).__name__


@pytest.mark.parametrize(
    ("error", "blame"),
    [
        (OperationTimeout(seconds=1, by_server=True), "load"),
        (OperationTimeout(seconds=1), "load"),
        (AcquireTimeout(seconds=1, size=1, max_size=1, idle=0, waiting=1), "load"),
        (EngineOverloaded(waiting=1, max_waiting=1, max_size=1), "load"),
        (EngineClosed(), "server"),
        (RetriesExhausted(attempts=1, elapsed=1, reason="attempts"), "load"),
        (SkipLimitExceeded(limit=1, failed=()), "item"),
        (PolicyError("x"), "caller"),
        (TransactionMisuse("x"), "caller"),
        (GroupFailed(index=0), "item"),
        (LedgerMismatch(ledger="x", field="size", was=1, now=2), "caller"),
        (CommitUnknown(), "server"),
        (TransactionAborted(), "caller"),
        (RollbackFailed(original=None, rollback_error=OSError()), "server"),
    ],
)
def test_our_own_errors_say_whom_to_blame(error: DbopError, blame: str) -> None:
    assert classify(error).blame == blame


def test_every_error_of_ours_is_judged_here() -> None:
    judged = {type(error) for error, *_ in OURS}
    assert judged == {getattr(errors, name) for name in errors.__all__} - {DbopError}


def test_a_retry_that_gave_up_is_load_whatever_it_gave_up_on() -> None:
    error = RetriesExhausted(attempts=2, elapsed=1, reason="attempts")
    error.__cause__ = lost_line()
    assert classify(error).blame == "load"


@pytest.mark.parametrize("code", ["23505", "55P03", "42601"])
def test_a_companion_is_judged_like_the_item_that_failed_but_without_its_code(code: str) -> None:
    companion, outer = GroupFailed(index=3), GroupFailed(index=4)
    companion.__cause__, outer.__cause__ = server_error(code), companion
    first = classify(server_error(code))
    for error in (companion, outer):
        verdict = classify(error)
        assert (verdict.sqlstate, verdict.condition) == (None, "GroupFailed")
        assert (verdict.repair, verdict.blame, verdict.item, verdict.evict) == (
            first.repair,
            first.blame,
            True,
            False,
        )


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize(
    ("cause", "code", "evict"), [(server_error("40001"), "40001", False), (lost_line(), "08003", True)]
)
def test_a_retry_that_gave_up_is_final_and_keeps_the_code_and_the_eviction_of_the_last_error(
    cause: Exception, code: str, evict: bool, levels: int
) -> None:
    for _ in range(levels):
        given_up = RetriesExhausted(attempts=2, elapsed=1, reason="attempts")
        given_up.__cause__ = cause
        cause = given_up
    verdict = classify(cause)
    assert (verdict.sqlstate, verdict.repair) == (code, N)
    assert (verdict.evict, verdict.item) == (evict, not evict)


# --- a connection that is known to be closed


@pytest.mark.parametrize(
    "error",
    [
        server_error("55P03"),
        server_error("40001"),
        server_error("08006"),
        OperationTimeout(seconds=1, by_server=True),
    ],
)
def test_a_closed_connection_can_only_be_replaced(error: Exception) -> None:
    verdict = classify(error, closed=True)
    assert (verdict.repair, verdict.evict, verdict.item) == (C, True, False)


def test_a_closed_connection_does_not_make_a_permanent_error_transient_nor_an_unknown_outcome_known() -> None:
    assert classify(server_error("23505"), closed=True).repair is N
    assert classify(lost_line(), closed=True).repair is U
