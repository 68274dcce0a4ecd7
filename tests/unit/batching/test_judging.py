"""The judgements of a batch: who is blamed, what is tried again, when constraints are checked."""

from __future__ import annotations

import pytest

from dbop_raw import Failed, Repair, RetriesExhausted, Verdict
from dbop_raw.batching.judging import (
    ConstraintChecks,
    Decision,
    by_reference,
    choose_constraint_checks,
    judge,
    too_many,
)
from dbop_raw.batching.spans import Step
from dbop_raw.batching.writers.protocol import Unsupported, WriteFailed

SPAN = Step("write", 10, 20)
ALONE = Step("write", 10, 11)
ROWS = Step("rows", 10, 20)
ERROR = LookupError("of the test")

NEEDS_MORE_THAN_A_SAVEPOINT = (Repair.TRANSACTION, Repair.CONNECTION, Repair.UNKNOWN)


def verdict(repair: Repair, *, item: bool = False, sqlstate: str = "XX000") -> Verdict:
    return Verdict(sqlstate, "of the test", repair, evict=False, item=item, reason="", blame="server")


def gave_up(cause: BaseException) -> RetriesExhausted:
    """What an item's own retry raises."""
    error = RetriesExhausted(attempts=3, elapsed=0.1, reason="attempts")
    error.__cause__ = cause
    return error


class TestASpan:
    @pytest.mark.parametrize("repair", NEEDS_MORE_THAN_A_SAVEPOINT)
    @pytest.mark.parametrize("index", [None, 13])
    def test_an_error_that_needs_more_than_a_savepoint_leaves_the_batch(
        self, repair: Repair, index: int | None
    ) -> None:
        found = judge(SPAN, WriteFailed(index, ERROR), lambda _: verdict(repair))
        assert found.decision is Decision.RAISE

    def test_an_error_that_no_item_causes_leaves_the_batch(self) -> None:
        found = judge(SPAN, WriteFailed(13, ERROR), lambda _: verdict(Repair.NEVER))
        assert found.decision is Decision.RAISE

    def test_an_error_that_an_item_causes_is_blamed_on_the_item_that_it_names(self) -> None:
        found = judge(SPAN, WriteFailed(13, ERROR), lambda _: verdict(Repair.NEVER, item=True))
        assert (found.decision, found.culprit) == (Decision.BLAME, 13)

    def test_an_error_that_names_nobody_is_searched_for(self) -> None:
        found = judge(SPAN, WriteFailed(None, ERROR), lambda _: verdict(Repair.NEVER, item=True))
        assert (found.decision, found.culprit) == (Decision.BLAME, None)

    def test_an_error_of_one_item_alone_is_its_own(self) -> None:
        found = judge(ALONE, WriteFailed(None, ERROR), lambda _: verdict(Repair.NEVER, item=True))
        assert (found.decision, found.culprit) == (Decision.BLAME, 10)

    def test_a_value_that_the_driver_refuses_is_the_items_whatever_its_code(self) -> None:
        failed = WriteFailed(13, ERROR, client=True)
        found = judge(SPAN, failed, lambda _: verdict(Repair.NEVER))
        assert (found.decision, found.culprit) == (Decision.BLAME, 13)

    def test_a_refusal_of_the_driver_that_names_nobody_leaves_the_batch(self) -> None:
        failed = WriteFailed(None, ERROR, client=True)
        found = judge(SPAN, failed, lambda _: verdict(Repair.NEVER))
        assert found.decision is Decision.RAISE

    def test_a_failure_that_a_savepoint_repairs_is_tried_again(self) -> None:
        found = judge(SPAN, WriteFailed(13, ERROR), lambda _: verdict(Repair.SAVEPOINT))
        assert (found.decision, found.culprit) == (Decision.RETRY, 13)

    def test_a_failure_that_a_savepoint_repairs_is_searched_for_where_it_names_nobody(self) -> None:
        found = judge(SPAN, WriteFailed(None, ERROR), lambda _: verdict(Repair.SAVEPOINT))
        assert (found.decision, found.culprit) == (Decision.BLAME, None)


class TestAnItemWhoseOwnRetryGaveUp:
    @pytest.mark.parametrize("repair", [Repair.SAVEPOINT, *NEEDS_MORE_THAN_A_SAVEPOINT])
    def test_it_is_bad_and_not_tried_again(self, repair: Repair) -> None:
        found = judge(SPAN, WriteFailed(13, gave_up(ERROR)), lambda _: verdict(repair))
        assert (found.decision, found.culprit) == (Decision.BLAME, 13)

    def test_its_verdict_is_that_of_the_error_behind(self) -> None:
        behind = verdict(Repair.SAVEPOINT, sqlstate="55P03")
        found = judge(
            SPAN,
            WriteFailed(13, gave_up(ERROR)),
            lambda exc: behind if exc is ERROR else verdict(Repair.NEVER),
        )
        assert found.verdict is behind


class TestRowsThatTheServerCouldNotTry:
    @pytest.mark.parametrize("repair", NEEDS_MORE_THAN_A_SAVEPOINT)
    def test_an_error_that_needs_more_than_a_savepoint_leaves_the_batch(self, repair: Repair) -> None:
        found = judge(ROWS, WriteFailed(None, ERROR), lambda _: verdict(repair))
        assert found.decision is Decision.RAISE

    @pytest.mark.parametrize(
        ("repair", "item"), [(Repair.NEVER, True), (Repair.SAVEPOINT, False)], ids=["a value", "a lock"]
    )
    def test_an_error_of_these_rows_says_nothing_of_others(self, repair: Repair, item: bool) -> None:
        found = judge(ROWS, WriteFailed(None, ERROR), lambda _: verdict(repair, item=item))
        assert found.decision is Decision.NO_ROWS_HERE

    def test_a_row_that_can_not_be_sent_says_nothing_of_others(self) -> None:
        failed = WriteFailed(13, ERROR, client=True)
        found = judge(ROWS, failed, lambda _: verdict(Repair.UNKNOWN))
        assert found.decision is Decision.NO_ROWS_HERE

    def test_an_error_that_all_share_says_that_no_rows_can_be_tried(self) -> None:
        found = judge(ROWS, WriteFailed(None, ERROR), lambda _: verdict(Repair.NEVER))
        assert found.decision is Decision.NO_ROWS

    def test_types_that_do_not_fit_say_that_no_rows_can_be_tried(self) -> None:
        failed = WriteFailed(None, Unsupported())
        found = judge(ROWS, failed, lambda _: verdict(Repair.NEVER, item=True))
        assert found.decision is Decision.NO_ROWS

    def test_rows_that_do_not_fit_say_nothing_of_others(self) -> None:
        failed = WriteFailed(None, Unsupported(of_rows=True), client=True)
        found = judge(ROWS, failed, lambda _: verdict(Repair.NEVER))
        assert found.decision is Decision.NO_ROWS_HERE


@pytest.mark.parametrize(
    ("more_follows", "constraints_immediate", "checks"),
    [
        (False, False, ConstraintChecks.AT_COMMIT),
        (False, True, ConstraintChecks.IMMEDIATE),
        (True, False, ConstraintChecks.AT_END),
        (True, True, ConstraintChecks.AT_END),
    ],
)
def test_constraints_are_checked_by_commit_unless_it_refused_or_more_follows(
    more_follows: bool, constraints_immediate: bool, checks: ConstraintChecks
) -> None:
    found = choose_constraint_checks(more_follows=more_follows, constraints_immediate=constraints_immediate)
    assert found is checks


def failures(**sqlstates: str) -> dict[int, Failed[str]]:
    """Failures by index: `_3="23503"`."""
    return {
        int(index[1:]): Failed(
            int(index[1:]), "an item", ERROR, verdict(Repair.NEVER, item=True, sqlstate=code)
        )
        for index, code in sqlstates.items()
    }


def test_only_a_violated_foreign_key_may_have_come_too_early() -> None:
    failed = failures(_1="23503", _2="23505", _5="23503")
    assert sorted(by_reference(failed)) == [1, 5]


class TestTooMany:
    def test_as_many_as_the_limit_are_not_too_many(self) -> None:
        assert too_many(failures(_1="23505", _2="23505"), 2, passing=lambda _: False) == ()

    def test_one_more_than_the_limit_is_too_many_and_all_are_given_in_order(self) -> None:
        failed = failures(_7="23505", _2="23505", _5="23503")
        found = too_many(failed, 2, passing=lambda _: False)
        assert [one.index for one in found] == [2, 5, 7]

    def test_an_item_that_may_still_be_written_does_not_count(self) -> None:
        failed = failures(_7="23505", _2="23505", _5="23503")
        assert too_many(failed, 2, passing=lambda one: one.verdict.sqlstate == "23503") == ()
