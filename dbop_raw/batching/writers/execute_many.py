"""`execute_many`: one statement for each row of parameters, all in one round trip."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

from dbop_raw.batching.inserver import Impossible, InServer
from dbop_raw.batching.writers.protocol import Tried, WriteFailed, Written
from dbop_raw.batching.writers.rows import Row, by_place, raised_by_client, span_of, taken
from dbop_raw.batching.writers.stale import is_stale
from dbop_raw.driver.underway import overlap
from dbop_raw.failure.errors import PolicyError
from dbop_raw.session.scope import Scope

__all__ = ["ExecuteMany", "execute_many"]


class ExecuteMany:
    """The writer that `execute_many` makes."""

    __slots__ = ("_impossible", "_in_server", "sql")
    per_item: ClassVar[bool] = False
    columns: ClassVar[None] = None

    def __init__(self, sql: str) -> None:
        self.sql = sql
        # Made when the server is first asked to try row by row, and again after it failed.
        self._in_server: InServer | None = None
        self._impossible = Impossible()

    @property
    def name(self) -> str:
        """The writer's name alone: SQL stays out of events."""
        return "execute_many"

    def __repr__(self) -> str:
        """The writer's name alone: SQL may hold a secret."""
        return self.name

    async def write(self, scope: Scope, items: Sequence[Row], lo: int, hi: int) -> Written[None]:
        """Execute all in one round trip."""
        _, rows = await overlap(scope.flush(), partial(by_place, span_of(items, lo, hi), None, lo))
        left = iter(rows)
        try:
            await scope.conn.executemany(self.sql, left)
        except Exception as exc:
            # The driver's own errors are about the row that it took last; the server's name none.
            number = taken(rows, left)
            client = raised_by_client(exc, scope) and number > 0
            raise WriteFailed(lo + number - 1 if client else None, exc, client=client) from exc
        return Written()

    async def write_rows(
        self, scope: Scope, items: Sequence[Row], lo: int, hi: int, failure_rate: float
    ) -> Tried:
        """Execute the same statement for each row in a loop in the server."""
        del failure_rate
        rows = by_place(items[lo:hi], None, lo)
        try:
            self._impossible.check(scope)
            if self._in_server is None or not self._in_server.suits(scope.conn):
                self._in_server = await InServer.for_statement(scope, self.sql)
            tried = await self._in_server.run(scope, (rows, 1))
        except Exception as exc:
            self._in_server = None
            self._impossible.learn(scope, exc)
            raise WriteFailed(None, exc, client=raised_by_client(exc, scope)) from exc
        return tried.moved(lo)

    async def refresh(self, scope: Scope, failed: WriteFailed) -> bool:
        """Make the driver forget what it remembers of the statement, where its types are others now."""
        if not await is_stale(scope, failed, self.sql):
            return False
        self._in_server = None
        await scope.conn.reload_schema_state()
        return True


def execute_many(statement: str) -> ExecuteMany:
    """Execute one statement for each row of parameters: `execute_many("INSERT INTO t VALUES ($1, $2)")`.

    Args:
        statement: One SQL statement with parameters $1, $2, …

    Returns:
        A writer for `batch`, whose items are sequences of parameters.

    Raises:
        PolicyError: `statement` is no text, or empty.
    """
    if not isinstance(statement, str) or not statement.strip():
        raise PolicyError(f"execute_many({statement!r}): give one SQL statement with parameters $1, $2, …")
    return ExecuteMany(statement)
