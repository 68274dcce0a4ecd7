"""The judgements of a batch: what a failed span means, when constraints are checked, how many may fail.

Pure, no I/O: errors and their verdicts come in, a decision goes out as a value. `batch.py` drives: it sends,
waits and undoes, and does what is decided here. So each rule can be read, and tested, without a server.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import asyncpg

from dbop_raw.batching.result import Failed
from dbop_raw.batching.spans import Step
from dbop_raw.batching.value_errors import Origin, origin_of, raised_in_our_function
from dbop_raw.batching.writers.protocol import Unsupported, WriteFailed
from dbop_raw.failure.errors import GroupFailed, RetriesExhausted
from dbop_raw.failure.sqlstate import Repair, Verdict

__all__ = [
    "FOREIGN_KEY_VIOLATION",
    "ConstraintChecks",
    "Decision",
    "Judgement",
    "by_reference",
    "choose_constraint_checks",
    "depends_on_others",
    "judge",
    "may_be_innocent",
    "too_many",
    "violates",
]

Item = TypeVar("Item")

FOREIGN_KEY_VIOLATION = "23503"
_CHECK_VIOLATION = "23514"
# Never raised by a deferred constraint over several rows: NOT NULL and a missing parent; and the classes of
# what a value, or the statement with it, got wrong.
_OF_THE_ROW = frozenset({"23502", FOREIGN_KEY_VIOLATION})
_OF_A_VALUE_CLASSES = frozenset({"22", "42", "54"})


# --- a span that failed


class Decision(enum.Enum):
    """What follows from the failure of a span."""

    RAISE = "raise"
    """The error leaves the batch: every item would meet it, or only a new transaction or connection repairs
    it, and the run around the batch starts the whole again.
    """
    RETRY = "retry"
    """The culprit is tried again from the savepoint, as often as the policy allows; after that it is bad."""
    BLAME = "blame"
    """The culprit is bad; where there is none, one of the span is, and the chooser goes on searching."""
    DOUBT = "doubt"
    """As `BLAME` if any other item gets through, for then the statement is right; else as `RAISE`."""
    NO_ROWS_HERE = "no rows here"
    """The server could not try these rows one by one: they are written in spans, which show why."""
    NO_ROWS = "no rows"
    """The server can't try any rows of this batch one by one."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a failed span means."""

    decision: Decision
    verdict: Verdict
    """Of the error; of the error behind it where an item's own `retry` gave up."""
    culprit: int | None = None
    """The item that the error is about, where that is known."""


def judge(step: Step, failed: WriteFailed, verdict_of: Callable[[BaseException], Verdict]) -> Judgement:
    """Say what the failure of a step means.

    Args:
        step: What was tried.
        failed: What the writer said of it.
        verdict_of: Gives the verdict of an error, by the rules of the engine that runs the batch.
    """
    if step.way == "rows":
        verdict = verdict_of(failed.error)
        return Judgement(_judge_rows(failed, verdict), verdict)
    # What an item's own retry gave up is final for the item; what it says of the item is in the cause.
    cause = failed.error.__cause__ if isinstance(failed.error, RetriesExhausted) else None
    verdict = verdict_of(cause or failed.error)
    culprit = failed.index if step.hi - step.lo > 1 else step.lo
    if verdict.repair is Repair.NEVER:
        # What the driver refused to send is the item's whatever its code: no server has seen it.
        if verdict.item or (failed.client and failed.index is not None):
            decision = Decision.BLAME
        else:
            decision = _BY_ORIGIN[origin_of(cause or failed.error)]
        if decision is not Decision.RAISE and not verdict.item and not failed.client:
            verdict = replace(verdict, item=True, reason=_OF_A_VALUE, blame="item")
    elif cause is not None:
        decision = Decision.BLAME
    elif verdict.repair is Repair.SAVEPOINT:
        # Nobody can be tried again where nobody is named: the search will show whom it is about.
        decision = Decision.BLAME if culprit is None else Decision.RETRY
    else:
        decision = Decision.RAISE
    return Judgement(decision, verdict, culprit)


_BY_ORIGIN = {
    Origin.VALUE: Decision.BLAME,
    Origin.UNSURE: Decision.DOUBT,
    Origin.STATEMENT: Decision.RAISE,
}
_OF_A_VALUE = "a row's value could not be read, or named what is not there: the same value never will be"


def _judge_rows(failed: WriteFailed, verdict: Verdict) -> Decision:
    if not failed.client and verdict.repair in {Repair.TRANSACTION, Repair.CONNECTION, Repair.UNKNOWN}:
        return Decision.RAISE
    # A row that can't be sent, or one that waits for a lock, says nothing of other rows. Anything else does:
    # no privilege, no language, a type that doesn't fit.
    here_only = failed.client or verdict.item or verdict.repair is Repair.SAVEPOINT
    if isinstance(failed.error, Unsupported):
        here_only = failed.error.of_rows
    elif not here_only and origin_of(failed.error) is not Origin.STATEMENT:
        here_only = raised_in_our_function(failed.error)
    return Decision.NO_ROWS_HERE if here_only else Decision.NO_ROWS


# --- deferred constraints


class ConstraintChecks(enum.Enum):
    """When deferred constraints are checked. Checked at COMMIT or all at once, they name no item."""

    AT_COMMIT = "at COMMIT"
    """Nothing is sent: only COMMIT follows, which checks them anyway. A clean batch is one round trip shorter
    by that. Where COMMIT refuses, the run starts again, with `IMMEDIATE`.
    """
    AT_END = "at the batch's end"
    """More follows in the transaction, so the batch checks them itself, once; where that fails, it undoes
    all and starts again, with `IMMEDIATE`.
    """
    IMMEDIATE = "immediate"
    """Each statement checks all, so that its error falls on an item."""


def choose_constraint_checks(*, more_follows: bool, constraints_immediate: bool) -> ConstraintChecks:
    """Say when a batch is to check deferred constraints.

    Args:
        more_follows: Will more than COMMIT follow the batch in its transaction?
        constraints_immediate: Has COMMIT refused this run before?
    """
    if more_follows:
        return ConstraintChecks.AT_END
    return ConstraintChecks.IMMEDIATE if constraints_immediate else ConstraintChecks.AT_COMMIT


def violates(verdict: Verdict) -> bool:
    """Does a failed check mean that a constraint is violated: not that the check could not be done?"""
    return verdict.item and verdict.repair is Repair.NEVER


def by_reference(failed: Mapping[int, Failed[Item]]) -> dict[int, Failed[Item]]:
    """Return those of `failed` that a foreign key refused.

    A row that refers to a later one is refused for coming too early, where the foreign key refers to its own
    table, or where deferred constraints are checked immediately.
    """
    return {index: one for index, one in failed.items() if one.verdict.sqlstate == FOREIGN_KEY_VIOLATION}


def may_be_innocent(failed: Failed[Item]) -> bool:
    """May the item have been refused only because a deferred constraint was checked too early?

    Not by what was wrong with a value or the row itself; and a missing parent is tried again anyway.
    """
    code = failed.verdict.sqlstate
    if code is None or not isinstance(failed.error, asyncpg.PostgresError):
        return False
    return code not in _OF_THE_ROW and code[:2] not in _OF_A_VALUE_CLASSES


def depends_on_others(failed: Failed[Item]) -> bool:
    """May the item have been refused only for another one that was in, such as one with the same key?"""
    error = failed.error.__cause__ if isinstance(failed.error, GroupFailed) else failed.error
    code = getattr(error, "sqlstate", None)
    if code is None:
        return False
    return code not in _OF_THE_ROW | {_CHECK_VIOLATION} and code[:2] not in _OF_A_VALUE_CLASSES


# --- the skip limit


def too_many(
    failed: Mapping[int, Failed[Item]], skip_limit: int, *, passing: Callable[[Failed[Item]], bool]
) -> tuple[Failed[Item], ...]:
    """Return the failures in order where they are more than `skip_limit` allows; else none.

    Args:
        failed: The items that are set aside at present, by index.
        skip_limit: How many items may fail.
        passing: May an item still be written in the end? Those don't count yet.
    """
    if len(failed) <= skip_limit:
        return ()
    counted = tuple(failed[index] for index in sorted(failed) if not passing(failed[index]))
    return counted if len(counted) > skip_limit else ()
