"""What both COPY writers share: the table that is their target, and how the server tries its rows one by one.

Row by row the server inserts what COPY would have written, in blocks where bad rows are rare, so that it is
no slower than a span there, and one after another where they are not.

Rows whose foreign key value was refused before are tried apart from the others, which then go in blocks: bad
references come in crowds. Where an error depends on the rows' order, they are tried in order after all, and
no row is set apart any more (`suspects.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import asyncpg

from dbop_raw.batching.inserver import Impossible, InServer
from dbop_raw.batching.suspects import Suspects, depends_on_order
from dbop_raw.batching.writers.protocol import RowFailure, Tried, WriteFailed, Written
from dbop_raw.batching.writers.rows import Row, by_place, raised_by_client, span_of
from dbop_raw.driver import sql
from dbop_raw.failure.errors import PolicyError
from dbop_raw.session.scope import Scope

__all__ = ["CopyWriter", "Target", "written"]

# Class 54, program limit exceeded: "row is too big".
_TOO_LARGE = "54"
# Where a larger share of rows is bad, trying a block of them is mostly in vain.
_HIGH_FAILURE_RATE = 0.03
_LARGEST_BLOCK = 512
# With the suspects set apart, bad rows are rare among the others.
_BLOCK_WITHOUT_SUSPECTS = 64


@dataclass(frozen=True, slots=True)
class Target:
    """A table and its columns, each name taken literally."""

    table: str
    columns: tuple[str, ...]
    schema: str | None

    @classmethod
    def of(cls, table: str, columns: Sequence[str], schema: str | None) -> Self:
        """Check the names.

        Raises:
            PolicyError: There is no column, or one twice, or what can't be an SQL identifier.
        """
        if isinstance(columns, str) or not all(isinstance(c, str) for c in columns):
            raise PolicyError(f"columns={columns!r}: give a sequence of column names, such as ('id', 'body')")
        if not columns:
            raise PolicyError("columns=(): name at least one column")
        if len(set(columns)) != len(columns):
            raise PolicyError(f"columns={columns!r} names a column twice")
        for name in (table, *columns, *(() if schema is None else (schema,))):
            sql.identifier(name)
        return cls(table, tuple(columns), schema)

    @property
    def relation(self) -> str:
        """The table as SQL writes it."""
        return sql.relation(self.table, self.schema)

    def culprit(self, exc: Exception) -> int | None:
        """Return the row, from 0, that the server's error names in its context: `COPY t, line 38`.

        The words are translated, the table's name and the number are not. Two such lines, or none, name
        nobody.
        """
        context = getattr(exc, "context", None)
        if not isinstance(exc, asyncpg.PostgresError) or not isinstance(context, str):
            return None
        if (exc.sqlstate or "").startswith(_TOO_LARGE):
            # Raised when the rows that were buffered are inserted together: the line is that of the last.
            return None
        prefix = f"COPY {self.table}, "
        found = [line for line in context.split("\n") if line.startswith(prefix)]
        number = re.match(r"\D*(\d+)", found[0][len(prefix) :]) if len(found) == 1 else None
        return int(number[1]) - 1 if number and int(number[1]) > 0 else None


def _first_block(failure_rate: float) -> int:
    """How many rows the server tries together at first: about half the usual distance between bad ones."""
    if failure_rate > _HIGH_FAILURE_RATE:
        return 1
    return int(min(_LARGEST_BLOCK, 0.5 / max(failure_rate, 1e-6)))


def written(tag: str, count: int) -> Written[None]:
    """Return what COPY's tag says of `count` rows: `COPY 48` of 60, where a trigger dropped 12."""
    stored = tag.rpartition(" ")[2]
    return Written(dropped=count - int(stored) if stored.isdecimal() else 0)


class CopyWriter:
    """The base of both COPY writers: all but how they write a span, and how they check its rows."""

    __slots__ = ("_impossible", "_in_server", "_suspects", "target")
    per_item: ClassVar[bool] = False
    _verb: ClassVar[str]
    """The function that makes such a writer."""
    _text: ClassVar[bool]
    """Are the values texts, to be read as COPY reads them?"""

    def __init__(self, target: Target) -> None:
        self.target = target
        # Made when the server is first asked to try row by row, and again after it failed: the table may have
        # changed.
        self._in_server: InServer | None = None
        self._impossible = Impossible()
        self._suspects = Suspects(target.columns)

    @property
    def name(self) -> str:
        """With the table's name: `copy_into("events")`."""
        return f"{self._verb}({self.target.relation})"

    @property
    def columns(self) -> Sequence[str]:
        """The columns that a row's values are written to."""
        return self.target.columns

    def __repr__(self) -> str:
        """With the table's name."""
        return self.name

    def _check(self, rows: Sequence[Row], lo: int) -> None:
        """Raise `WriteFailed` for the first row that this writer can't take."""
        raise NotImplementedError

    async def write_rows(
        self, scope: Scope, items: Sequence[Row], lo: int, hi: int, failure_rate: float
    ) -> Tried:
        """Insert the same columns row by row, or block by block, in a loop in the server."""
        rows = by_place(span_of(items, lo, hi), self.target.columns, lo)
        self._check(rows, lo)
        try:
            self._impossible.check(scope)
            if self._in_server is None or not self._in_server.suits(scope.conn):
                self._in_server = await InServer.for_table(
                    scope, self.target.relation, self.target.columns, text=self._text
                )
            # Kept in hand: the workers of an ingest share this writer, and another's failure forgets it.
            in_server = self._in_server
            tried = None
            if failure_rate > _HIGH_FAILURE_RATE:
                tried = await self._try_suspects_apart(scope, in_server, rows)
            if tried is None:
                tried = await in_server.run(scope, (rows, _first_block(failure_rate)))
            if len(tried.failures) > _HIGH_FAILURE_RATE * len(rows):
                await self._suspects.learn(scope, rows, tried.failures)
        except Exception as exc:
            self._in_server = None
            self._impossible.learn(scope, exc)
            raise WriteFailed(None, exc, client=raised_by_client(exc, scope)) from exc
        return tried.moved(lo)

    async def _is_stale(self, scope: Scope, failed: WriteFailed) -> bool:
        """Is what the driver remembers of the schema why a span failed?"""
        raise NotImplementedError

    async def refresh(self, scope: Scope, failed: WriteFailed) -> bool:
        """Make the driver forget what it remembers, where the table is not so any more."""
        if not await self._is_stale(scope, failed):
            return False
        self._in_server = None
        await scope.conn.reload_schema_state()
        return True

    async def _try_suspects_apart(
        self, scope: Scope, in_server: InServer, rows: Sequence[Row]
    ) -> Tried | None:
        """Try the suspects alone, after the others in blocks.

        Returns:
            What came of them; None, with nothing done, where there are no suspects, or where an error was met
            that depends on the rows' order.
        """
        suspects = self._suspects.among(rows)
        if not suspects:
            return None
        apart = set(suspects)
        others = [place for place in range(len(rows)) if place not in apart]
        scope.control.savepoint()
        try:
            tried = await in_server.run(
                scope,
                ([rows[place] for place in others], _BLOCK_WITHOUT_SUSPECTS),
                ([rows[place] for place in suspects], 1),
            )
        except BaseException:
            scope.control.abandon()
            raise
        if any(map(depends_on_order, tried.failures)):
            scope.control.abandon()
            self._suspects.disable()
            return None
        scope.control.release()
        places = others + suspects
        failures = [RowFailure(places[one.index], one.error) for one in tried.failures]
        return Tried(sorted(failures, key=lambda one: one.index), tried.seconds, tried.dropped)
