"""The writers: arguments are checked when they are made, rows before they count as sent."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from dbop_raw import PolicyError, copy_into, copy_text, each, execute_many
from dbop_raw.batching.writers.copying import Target
from dbop_raw.batching.writers.protocol import RowFailure, Tried, WriteFailed
from dbop_raw.batching.writers.rows import by_place, check_widths, span_of, taken


@pytest.mark.parametrize("make", [copy_into, copy_text])
@pytest.mark.parametrize("columns", [(), "id", ("id", "id"), (1,), ("a\0",)])
def test_columns_are_checked_when_the_writer_is_made(make: Any, columns: Any) -> None:
    with pytest.raises(PolicyError):
        make("item", columns=columns)


@pytest.mark.parametrize("statement", ["", "  ", None])
def test_a_statement_is_checked_when_the_writer_is_made(statement: Any) -> None:
    with pytest.raises(PolicyError, match="give one SQL statement"):
        execute_many(statement)


def test_a_function_is_checked_when_the_writer_is_made() -> None:
    with pytest.raises(PolicyError, match="give a function"):
        each("no function")  # type: ignore[arg-type]


def test_a_writer_of_rows_is_called_by_its_table() -> None:
    assert repr(copy_into("Order lines", columns=("id",), schema="s")) == 'copy_into("s"."Order lines")'


def test_a_statement_stays_out_of_the_writers_name() -> None:
    writer = execute_many("INSERT INTO t VALUES ('secret', $1)")
    assert "secret" not in repr(writer) + writer.name


@pytest.mark.parametrize(
    ("context", "row"),
    [
        ("COPY t, line 38", 37),
        ("COPY t, line 38, column id: «x»", 37),
        ("SQL statement …\nCOPY t, Zeile 1", 0),
        ("COPY other, line 38", None),
        ("COPY t, line 1\nCOPY t, line 2", None),
        ("COPY t, line 0", None),
        (None, None),
    ],
)
def test_a_row_is_named_by_the_context_of_copys_error(context: str | None, row: int | None) -> None:
    error: Any = asyncpg.PostgresError.new({"S": "ERROR", "C": "23502", "M": "no", "W": context or ""})
    assert Target.of("t", ("id",), None).culprit(error) == row


def test_a_span_that_is_all_items_is_not_copied() -> None:
    items = [1, 2, 3]
    assert span_of(items, 0, 3) is items
    assert span_of(items, 1, 2) == [2]


def test_the_rows_that_the_driver_has_taken_are_counted() -> None:
    rows = [(1,), (2,), (3,)]
    left = iter(rows)
    assert taken(rows, left) == 0
    next(left)
    assert taken(rows, left) == 1


@pytest.mark.parametrize("row", [(1,), (1, 2, 3), 7, "ab", b"ab", {1, 2}])
def test_a_row_that_does_not_fit_is_named_by_its_place_among_all_items(row: Any) -> None:
    with pytest.raises(WriteFailed) as raised:
        check_widths(by_place([(1, 2), row, (1,)], ("a", "b"), lo=40), 2, lo=40)
    assert (raised.value.index, raised.value.client) == (41, True)


def test_failures_keep_their_seconds_where_other_rows_come_first() -> None:
    error = ValueError("of the test")
    assert Tried([RowFailure(1, error)], 0.5).moved(10) == Tried([RowFailure(11, error)], 0.5)
