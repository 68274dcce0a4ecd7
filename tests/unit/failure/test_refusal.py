"""Which errors in answer to COMMIT are a sure no: those of the transaction's own checks and triggers."""

from __future__ import annotations

import re

import asyncpg
import pytest
from asyncpg import exceptions

from dbop_raw.failure.classify import Phase, classify
from dbop_raw.failure.refusal import REFUSALS, refuses_commit
from dbop_raw.failure.sqlstate import CONDITIONS, Repair, Rule

# Every one of PostgreSQL's codes that is a sure no, written out: what is not here is in doubt.
SURE = re.compile(r"0[0129]|2[1237F]|3[89]|4[24]|P0")
SURE_CODES = {"40000", "40001", "40002", "40P01", "55P03"}


def server(code: str, severity: str = "ERROR", **fields: str) -> asyncpg.PostgresError:
    return asyncpg.PostgresError.new({"S": severity, "V": severity, "C": code, "M": "m", **fields})


@pytest.mark.parametrize("code", sorted(CONDITIONS))
def test_an_error_refuses_a_commit_only_where_the_transactions_own_checks_raise_it(code: str) -> None:
    sure = bool(SURE.fullmatch(code[:2])) or code in SURE_CODES
    assert refuses_commit(server(code)) is sure


@pytest.mark.parametrize(
    "code", ["XX000", "08006", "08000", "57P01", "58030", "40003", "08007", "53100", "57014"]
)
def test_what_tells_of_a_node_of_the_system_or_of_a_cancellation_refuses_nothing(code: str) -> None:
    assert not refuses_commit(server(code))


@pytest.mark.parametrize("severity", ["FATAL", "PANIC"])
@pytest.mark.parametrize("code", ["23505", "40001", "P0001", "57P01"])
def test_a_session_that_ended_at_commit_may_have_committed(code: str, severity: str) -> None:
    assert not refuses_commit(server(code, severity))


def test_a_code_of_the_users_own_refuses_where_a_raise_in_plpgsql_made_it() -> None:
    assert refuses_commit(server("MY001", R="exec_stmt_raise"))
    assert not refuses_commit(server("MY001", R="ReportResultError"))
    assert not refuses_commit(server("MY001"))


def test_a_raise_does_not_make_sure_what_the_code_leaves_open() -> None:
    assert not refuses_commit(server("XX000", R="exec_stmt_raise"))


def test_what_was_not_sent_is_refused_and_what_was_lost_is_not() -> None:
    assert refuses_commit(asyncpg.InterfaceError("connection is closed"))
    lost = asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")
    for error in (lost, TimeoutError(), OSError(), exceptions.InternalClientError("x"), RuntimeError()):
        assert not refuses_commit(error)


@pytest.mark.parametrize("key", sorted(REFUSALS))
def test_each_row_is_a_code_or_a_class_and_has_a_reason(key: str) -> None:
    assert key in CONDITIONS or key in {code[:2] for code in CONDITIONS}
    assert len(REFUSALS[key]) > 10


@pytest.mark.parametrize("code", sorted(code for code in CONDITIONS if not refuses_commit(server(code))))
def test_no_override_turns_a_doubt_at_commit_into_a_no(code: str) -> None:
    for rule in (Rule(Repair.NEVER, item=True, reason="x"), Rule(Repair.TRANSACTION, reason="x")):
        verdict = classify(server(code), overrides={code: rule, code[:2]: rule}, phase=Phase.COMMIT)
        assert (verdict.repair, verdict.evict, verdict.item) == (Repair.UNKNOWN, True, False)
        assert (verdict.sqlstate, verdict.condition) == (code, CONDITIONS[code])


def test_a_refusal_at_commit_is_judged_like_the_same_error_before() -> None:
    for code in ("23505", "40001", "55P03", "P0001"):
        assert classify(server(code), phase=Phase.COMMIT) == classify(server(code), phase=Phase.BODY)
