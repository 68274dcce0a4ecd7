"""The work that every way is given: a table, rows, and which of the rows are good."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from dbop_raw.driver import sql

__all__ = ["Row", "State", "Work", "state_of", "two_columns"]

Row = tuple[Any, ...]
State = tuple[int, str]
"""How many rows a table has, and the sum of their hashes: equal for equal rows in any order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Rows for one table, some of which its constraints refuse."""

    name: str
    """What the report calls it."""
    table: str
    columns: tuple[str, ...]
    create: str
    """SQL that makes the table, and what it refers to."""
    rows: Sequence[Row] = field(repr=False)
    good: Sequence[Row] = field(repr=False)
    """Those of `rows` that must be in the table in the end."""
    text_rows: Sequence[Sequence[str | None]] = field(repr=False)
    """`rows` as a CSV would give them."""
    parents: Mapping[str, tuple[tuple[str, ...], Sequence[Row]]] = field(default_factory=dict, repr=False)
    """What to fill before: columns and rows by table."""

    @property
    def relation(self) -> str:
        """The table's name, quoted."""
        return sql.identifier(self.table)

    @property
    def column_list(self) -> str:
        """The columns' names, quoted, with commas."""
        return ", ".join(map(sql.identifier, self.columns))

    @property
    def insert(self) -> str:
        """The INSERT of one row, with a parameter for each column."""
        holes = ", ".join(f"${place}" for place in range(1, len(self.columns) + 1))
        return f"INSERT INTO {self.relation} ({self.column_list}) VALUES ({holes})"

    async def prepare(self, conn: asyncpg.Connection[Any]) -> State:
        """Make the tables, and say what this one must be like after the work."""
        await conn.execute(self.create)
        for table, (columns, rows) in self.parents.items():
            await conn.copy_records_to_table(table, columns=columns, records=rows)
        await conn.copy_records_to_table(self.table, columns=self.columns, records=self.good)
        expected = await state_of(conn, self.table)
        await self.reset(conn)
        return expected

    async def reset(self, conn: asyncpg.Connection[Any]) -> None:
        """Empty the table."""
        await conn.execute(f"TRUNCATE {self.relation}")


async def state_of(conn: asyncpg.Connection[Any], table: str) -> State:
    """What is in a table."""
    row = await conn.fetchrow(
        "SELECT count(*), coalesce(sum(hashtextextended(t::text, 0)::numeric), 0)::text "
        f"FROM {sql.identifier(table)} AS t"
    )
    assert row is not None  # noqa: S101 - an aggregate always has a row
    return row[0], row[1]


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def text_rows_of(rows: Sequence[Row]) -> list[list[str | None]]:
    """The rows as text, None for NULL."""
    return [[_text(value) for value in row] for row in rows]


def two_columns(total: int, bad_share: float, *, seed: int = 1) -> Work:
    """`total` rows of a number and a text.

    `bad_share` of them, spread at random and never the first, are bad: some have NULL where none may be, the
    others the key of a good row before them.
    """
    rng = random.Random(seed)
    bad = set(rng.sample(range(1, total), min(total - 1, round(bad_share * total))))
    rows: list[Row] = []
    good: list[Row] = []
    for index in range(total):
        row: Row
        if index not in bad:
            row = (index, f"event {index} {rng.randrange(10**9)}")
            good.append(row)
        elif len(rows) % 2 or not good:
            row = (index, None)
        else:
            row = (rng.choice(good)[0], "a key that is there already")
        rows.append(row)
    return Work(
        name=f"two columns, {100 * bad_share:.4g} % bad",
        table="peer_events",
        columns=("id", "body"),
        create="DROP TABLE IF EXISTS peer_events; "
        "CREATE TABLE peer_events (id bigint PRIMARY KEY, body text NOT NULL)",
        rows=rows,
        good=good,
        text_rows=text_rows_of(rows),
    )
