"""Rows that a foreign key will most likely refuse, by what it refused before."""

from typing import Any

import asyncpg
import pytest

from dbop_raw.batching.suspects import Suspects, depends_on_order
from dbop_raw.batching.writers.protocol import RowFailure
from dbop_raw.session.scope import Scope


class Catalogue:
    """A connection that knows one foreign key's columns."""

    def __init__(self, columns: list[str] | None, *, to_itself: bool = False) -> None:
        self.columns = columns
        self.to_itself = to_itself
        self.asked = 0

    def is_in_transaction(self) -> bool:
        return True

    async def fetchrow(self, _query: str, *_args: str) -> dict[str, Any] | None:
        self.asked += 1
        if self.columns is None:
            return None
        return {"columns": self.columns, "referenced": ["id"], "to_itself": self.to_itself}


def refused(index: int) -> RowFailure:
    fields = {"S": "ERROR", "V": "ERROR", "C": "23503", "M": "no", "s": "public", "t": "t", "n": "t_fkey"}
    error: Any = asyncpg.PostgresError.new(fields)
    return RowFailure(index, error)


@pytest.mark.anyio
async def test_a_value_that_was_refused_is_suspect_in_the_next_rows() -> None:
    suspects = Suspects(("id", "parent"))
    conn = Catalogue(["parent"])
    rows = [(1, "a"), (2, "b"), (3, "a")]
    assert suspects.among(rows) == []
    await suspects.learn(Scope(conn), rows, [refused(1), refused(1)])
    assert suspects.among([(7, "b"), (8, "a"), (9, "b")]) == [0, 2]
    assert conn.asked == 1


@pytest.mark.anyio
async def test_values_of_several_columns_are_suspect_together_only() -> None:
    suspects = Suspects(("x", "y"))
    await suspects.learn(Scope(Catalogue(["x", "y"])), [(1, 2)], [refused(0)])
    assert suspects.among([(1, 2), (1, 3), (2, 2)]) == [0]


@pytest.mark.anyio
@pytest.mark.parametrize("columns", [None, ["another"]])
async def test_a_constraint_of_columns_that_are_not_written_teaches_nothing(
    columns: list[str] | None,
) -> None:
    suspects = Suspects(("id", "parent"))
    await suspects.learn(Scope(Catalogue(columns)), [(1, 2)], [refused(0)])
    assert suspects.among([(1, 2)]) == []


@pytest.mark.anyio
async def test_a_foreign_key_of_a_table_to_itself_teaches_nothing() -> None:
    """The parent that was missing may come with the next rows."""
    suspects = Suspects(("id", "parent"))
    await suspects.learn(Scope(Catalogue(["parent"], to_itself=True)), [(1, 2)], [refused(0)])
    assert suspects.among([(1, 2)]) == []


@pytest.mark.anyio
async def test_a_value_that_can_not_be_hashed_is_nobodys_reference() -> None:
    suspects = Suspects(("id", "parent"))
    await suspects.learn(Scope(Catalogue(["parent"])), [(1, 2)], [refused(0)])
    assert suspects.among([(1, [])]) == []


@pytest.mark.anyio
async def test_suspects_that_are_disabled_forget_and_learn_no_more() -> None:
    suspects = Suspects(("id", "parent"))
    scope = Scope(Catalogue(["parent"]))
    await suspects.learn(scope, [(1, 2)], [refused(0)])
    assert suspects.among([(1, 2)]) == [0]
    suspects.disable()
    assert suspects.among([(1, 2)]) == []
    await suspects.learn(scope, [(1, 2)], [refused(0)])
    assert suspects.among([(1, 2)]) == []


@pytest.mark.parametrize(
    ("code", "depends"),
    [
        ("23503", False),
        ("23502", False),
        ("23514", False),
        ("22P02", False),
        ("23505", True),
        ("23P01", True),
    ],
)
def test_an_error_that_other_rows_can_cause_depends_on_their_order(code: str, depends: bool) -> None:
    error: Any = asyncpg.PostgresError.new({"S": "ERROR", "V": "ERROR", "C": code, "M": "no"})
    assert depends_on_order(RowFailure(0, error)) is depends
