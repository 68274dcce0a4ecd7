"""What the tests of `ingest` share: rows, a table's batch, a sink that keeps, and what is in the table."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from dbop_raw import Engine, Reject, batch, copy_into, operation

__all__ = ["TABLES", "Kept", "Row", "add_item", "as_stream", "copying", "engine_on", "rows", "stored"]

Row = tuple[int, str | None]

TABLES = "CREATE TABLE item (id int PRIMARY KEY, body text NOT NULL)"


@asynccontextmanager
async def engine_on(dsn: str, **options: Any) -> AsyncIterator[Engine]:
    """Give an engine of up to five connections."""
    async with Engine.open(dsn, **{"min_size": 0, "max_size": 5} | options) as engine:
        yield engine


@operation
async def add_item(conn: Any, row: Row) -> None:
    """Insert one row."""
    await conn.execute("INSERT INTO item VALUES ($1, $2)", *row)


def copying(table: str = "item") -> Any:
    """Return a batch that copies rows into a table."""
    return batch(copy_into(table, columns=("id", "body")))


def rows(count: int, bad: Iterable[int] = (), start: int = 0) -> list[Row]:
    """Return rows with ids from `start`; those of `bad` have a NULL where there may be none."""
    broken = frozenset(bad)
    return [(n, None if n in broken else f"body {n}") for n in range(start, start + count)]


async def as_stream(items: Iterable[Row]) -> AsyncIterator[Row]:
    """Give the same items, each after a turn of the event loop."""
    for item in items:
        await asyncio.sleep(0)
        yield item


async def stored(engine: Engine, table: str = "item") -> list[int]:
    """Return the ids that are in the table, in order."""
    return [row["id"] for row in await engine.fetch(f"SELECT id FROM {table} ORDER BY id")]


class Kept:
    """A sink that keeps what it is given.

    Attributes:
        rejects: What it was given.
    """

    def __init__(self) -> None:
        self.rejects: list[Reject] = []

    async def write(self, rejects: Sequence[Reject]) -> None:
        """Keep them."""
        self.rejects.extend(rejects)

    @property
    def indexes(self) -> list[int]:
        """The places in the source of what it was given."""
        return [reject.index for reject in self.rejects]
