"""`Ledger`: which chunks of a source are in.

Kept in a table, and written in each chunk's own transaction: so a row stands or falls with its chunk, and
also tells what became of a COMMIT in doubt.
"""

from __future__ import annotations

from dataclasses import dataclass

import asyncpg

from dbop_raw.driver import sql
from dbop_raw.driver.connection import Connection
from dbop_raw.engine.commit import RowRecord
from dbop_raw.failure.errors import PolicyError

__all__ = ["Ledger"]


@dataclass(frozen=True, slots=True)
class Ledger:
    """Lets an ingest go on where it stopped.

    Run the same source again with the same `size` and the same ledger's name, and nothing is written twice
    and nothing is lost. The table is made when it is not there. To begin from the start again, delete the
    ledger's
    rows: `DELETE FROM dbop_raw_ledger WHERE name = '…'`.
    """

    name: str
    """One ledger for each source and target."""
    table: str = "dbop_raw_ledger"
    schema: str | None = None
    """None: where the search_path finds it."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip() or "\0" in self.name:
            raise PolicyError(
                f"Ledger(name={self.name!r}): give a name for this source, such as 'events-2026-11'"
            )
        sql.relation(self.table, self.schema)

    @property
    def relation(self) -> str:
        """The table's name, quoted."""
        return sql.relation(self.table, self.schema)

    async def install(self, conn: Connection) -> None:
        """Create the table if it is not there: an operation."""
        if await conn.fetchval("SELECT pg_catalog.to_regclass($1) IS NOT NULL", self.relation):
            return
        await conn.execute(
            f"CREATE TABLE IF NOT EXISTS {self.relation} (name text, chunk bigint, size integer NOT NULL, "
            "items integer NOT NULL, "
            "at timestamptz NOT NULL DEFAULT pg_catalog.now(), PRIMARY KEY (name, chunk))"
        )

    async def done(self, conn: Connection, size: int) -> dict[int, int]:
        """Read which chunks are in, with their numbers of items: an operation.

        Args:
            conn: The operation's connection.
            size: Items in a chunk, as the source is cut now.

        Raises:
            PolicyError: They were cut with another `size`, so the chunks' numbers mean other items.

        """
        rows = await conn.fetch(
            f"SELECT chunk, size, items FROM {self.relation} WHERE name OPERATOR(pg_catalog.=) $1", self.name
        )
        other = {row["size"] for row in rows} - {size}
        if other:
            raise PolicyError(
                f"the ledger {self.name!r} was written with size={min(other)}, and now size={size}: use the "
                "same size again, or another name"
            )
        return {row["chunk"]: row["items"] for row in rows}

    def record(self, chunk: int, size: int, items: int) -> RowRecord:
        """Make the row of one chunk, which also resolves its COMMIT."""
        values = f"{sql.literal(self.name)}, {chunk:d}, {size:d}, {items:d}"
        insert = f"INSERT INTO {self.relation} (name, chunk, size, items) VALUES ({values})"
        return RowRecord(insert)


async def install(ledger: Ledger, conn: Connection) -> None:
    """`Ledger.install`, where another process may do the same at the same moment."""
    try:
        await ledger.install(conn)
    except (asyncpg.UniqueViolationError, asyncpg.DuplicateTableError, asyncpg.DuplicateObjectError):
        # IF NOT EXISTS does not see a table that another transaction is creating now; it is there all the
        # same.
        return
