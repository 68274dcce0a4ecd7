"""What tests of batches share: writers over a table, the way that a batch takes, what its result says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import pytest

from dbop_raw import Batch, BatchResult, Engine, RetryPolicy, batch, copy_into, copy_text, each, execute_many
from dbop_raw import operation as make_operation
from dbop_raw.batching.costs import CostModel

__all__ = [
    "COPY_WRITERS",
    "ITEM_COLUMNS",
    "QUICK",
    "ROW_WRITERS",
    "WRITERS",
    "Way",
    "as_items",
    "both_ways",
    "count",
    "in_spans",
    "insert_of",
    "item_batch",
    "items_for",
    "make_batch",
    "make_writer",
    "row_by_row",
    "told",
]

WRITERS = ("each", "execute_many", "copy_into", "copy_text")
ROW_WRITERS = ("execute_many", "copy_into", "copy_text")
COPY_WRITERS = ("copy_into", "copy_text")

QUICK = RetryPolicy(attempts=3, first_delay=0.001, max_delay=0.001)


# --- writers


def insert_of(table: str, columns: Sequence[str]) -> str:
    """Return the INSERT of one row; names as SQL writes them."""
    places = ", ".join(f"${n}" for n in range(1, len(columns) + 1))
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({places})"


def make_writer(writer: str, table: str, columns: Sequence[str], schema: str | None = None) -> Any:
    """Return a writer of rows into a table; `each` gives the row's first column."""
    relation = table if schema is None else f"{schema}.{table}"
    insert = insert_of(relation, columns)

    @make_operation
    async def add(conn: Any, row: Sequence[Any]) -> Any:
        return await conn.fetchval(f"{insert} RETURNING {columns[0]}", *row)

    makers: dict[str, Callable[[], Any]] = {
        "each": lambda: each(add),
        "execute_many": lambda: execute_many(insert),
        "copy_into": lambda: copy_into(table, columns=columns, schema=schema),
        "copy_text": lambda: copy_text(table, columns=columns, schema=schema),
    }
    return makers[writer]()


def make_batch(writer: str, table: str, columns: Sequence[str], **options: Any) -> Batch[Any, Any]:
    """Return a batch of rows into a table, which has measured nothing yet."""
    return batch(make_writer(writer, table, columns), **options)


def as_items(writer: str, rows: Iterable[Sequence[Any]]) -> list[Any]:
    """Return rows as the writer takes them: `copy_text` takes texts."""
    if writer != "copy_text":
        return list(rows)
    return [tuple(None if value is None else str(value) for value in row) for row in rows]


# --- the table `item`, which refuses rows as their bodies say (tests/integration/batching/conftest.py)

ITEM_COLUMNS = ("id", "body")


def item_batch(writer: str, **options: Any) -> Batch[Any, Any]:
    """Return a batch of items."""
    return make_batch(writer, "item", ITEM_COLUMNS, **options)


def items_for(writer: str, bodies: Mapping[int, str | None], total: int = 100) -> list[Any]:
    """Return `total` items; those in `bodies` have such a body, all others a good one."""
    return as_items(writer, [(n, bodies.get(n, "fine")) for n in range(total)])


# --- the way that a batch takes, which follows from what it has measured

Way: TypeAlias = Callable[[Batch[Any, Any]], Batch[Any, Any]]


def row_by_row(write: Batch[Any, Any]) -> Batch[Any, Any]:
    """Make the batch believe that earlier ones were full of bad rows, and rows cheap to try alone."""
    write._costs = CostModel(seen=1000, bad=500, attempt=1e-3, row=1e-5, row_alone=1e-6)
    return write


def in_spans(write: Batch[Any, Any]) -> Batch[Any, Any]:
    """Make the batch believe that the server can't try row by row."""
    write._costs = CostModel(rows_possible=False)
    return write


both_ways = pytest.mark.parametrize("way", [row_by_row, in_spans], ids=["row by row", "in spans"])


# --- what came of it


def told(result: BatchResult[Any, Any]) -> list[tuple[int, str]]:
    """Return which items failed, and by what: the SQLSTATE, or the exception's name where it has none."""
    return [
        (failed.index, failed.verdict.sqlstate or type(failed.error).__name__) for failed in result.failed
    ]


async def count(engine: Engine, table: str = "item") -> int:
    """Count a table's rows."""
    return int(await engine.fetchval(f"SELECT count(*) FROM {table}"))
