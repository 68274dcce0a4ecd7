"""The report: what its numbers mean, and that reports add up."""

from __future__ import annotations

from typing import Any

import pytest

from dbop_raw import IngestReport


def report(**numbers: Any) -> IngestReport:
    none: dict[str, Any] = {
        **dict.fromkeys(("read", "written", "rejected", "retries", "chunks", "skipped", "rolled_back"), 0),
        "by_sqlstate": {},
        "seconds": 0.0,
        "finished": True,
    }
    return IngestReport(**none | numbers)


A = report(
    read=10, written=7, rejected=3, by_sqlstate={"23502": 2, "23505": 1}, retries=1, chunks=2, skipped=3,
    rolled_back=1, seconds=2.0,
)  # fmt: skip
B = report(
    read=5, written=4, rejected=1, by_sqlstate={"23505": 1}, retries=2, chunks=1, skipped=1, seconds=0.5
)
BOTH = report(
    read=15, written=11, rejected=4, by_sqlstate={"23502": 2, "23505": 2}, retries=3, chunks=3, skipped=4,
    rolled_back=1, seconds=2.5,
)  # fmt: skip


def test_reports_add_up() -> None:
    assert A + B == B + A == BOTH


def test_the_sum_of_a_list_is_a_report() -> None:
    assert sum([A, B]) == BOTH
    assert sum([A]) == A


@pytest.mark.parametrize(("a", "b"), [(True, False), (False, True), (False, False)])
def test_a_sum_is_finished_when_all_of_it_is(a: bool, b: bool) -> None:
    assert (report(finished=a) + report(finished=b)).finished is (a and b)


def test_adding_leaves_both_as_they_were() -> None:
    total = A + B
    assert total.by_sqlstate is not A.by_sqlstate
    assert A.by_sqlstate == {"23502": 2, "23505": 1}


@pytest.mark.parametrize("other", [1, None, {}], ids=repr)
def test_nothing_else_can_be_added(other: Any) -> None:
    with pytest.raises(TypeError):
        A + other
    if other != 0:
        with pytest.raises(TypeError):
            other + A


def test_rows_a_second_of_no_time_are_none() -> None:
    assert report(written=5).rows_per_second == 0.0
    assert A.rows_per_second == 5.0
