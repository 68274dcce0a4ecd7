"""`copy_into`: rows of Python values by binary COPY, the fastest way in."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import asyncpg

from dbop_raw.batching.inserver import array_literal
from dbop_raw.batching.sql import read
from dbop_raw.batching.writers.copying import CopyWriter, Target, written
from dbop_raw.batching.writers.protocol import WriteFailed, Written
from dbop_raw.batching.writers.rows import Row, by_place, check_widths, raised_by_client, span_of, taken
from dbop_raw.batching.writers.stale import is_stale
from dbop_raw.driver import sql
from dbop_raw.driver.connection import Connection, is_gone
from dbop_raw.driver.remembered import bare, columns_query, has_binary_codec, kept_statement, types_of
from dbop_raw.driver.underway import overlap
from dbop_raw.failure.errors import PolicyError
from dbop_raw.session.scope import Scope

__all__ = ["CopyInto", "copy_into"]


class CopyInto(CopyWriter):
    """The writer that `copy_into` makes."""

    __slots__ = ("_asked", "_columns_query", "_domains")
    _verb: ClassVar[str] = "copy_into"
    _text: ClassVar[bool] = False

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self._columns_query = columns_query(target.relation, target.columns)
        # The domains that columns were seen to be of, by their base types.
        self._domains: dict[int, set[int]] = {}
        # By connection: what its driver keeps of that query, and what to ask the server about it.
        self._asked: WeakKeyDictionary[Connection, tuple[Any, str]] = WeakKeyDictionary()

    async def write(self, scope: Scope, items: Sequence[Row], lo: int, hi: int) -> Written[None]:
        """Send one binary COPY."""
        target = self.target
        span = span_of(items, lo, hi)
        _, rows = await overlap(self._open(scope), partial(by_place, span, target.columns, lo))
        left = iter(rows)
        copying = scope.conn.copy_records_to_table(
            target.table, schema_name=target.schema, columns=target.columns, records=left
        )
        check = partial(check_widths, rows, len(target.columns), lo)
        try:
            # The rows are looked at when they have been sent, while the server is at them: a row that doesn't
            # fit is undone like anything that fails.
            tag, _ = await overlap(copying, check)
        except WriteFailed:
            raise
        except Exception as exc:
            number = taken(rows, left)
            if raised_by_client(exc, scope) and number > 0:
                # The driver's words for a row that is too short, or none, help nobody.
                check()
                raise WriteFailed(lo + number - 1, exc, client=True) from exc
            if number == 0 and type(exc) is asyncpg.InternalClientError:
                self._explain(scope, exc)
            row = target.culprit(exc)
            raise WriteFailed(None if row is None else lo + row, exc) from exc
        return written(tag, len(rows))

    def _explain(self, scope: Scope, exc: asyncpg.InternalClientError) -> None:
        """Give the driver's error the reason as its cause, where a column's codec is why it sends no row."""
        statement = kept_statement(scope.conn, self._columns_query)
        if statement is None or is_gone(scope.conn):
            return
        columns = zip(self.target.columns, types_of(statement)[1], strict=True)
        texts = [name for name, oid in columns if not has_binary_codec(scope.conn, oid)]
        if texts:
            exc.__cause__ = PolicyError(
                f"copy_into sends values in binary, and the driver has only a text codec for {texts}: set a "
                "codec with format='binary', or use execute_many or copy_text"
            )

    async def _open(self, scope: Scope) -> None:
        """Send what opens the span, and ask if the columns are of the types that the driver remembers.

        It encodes by these, and COPY takes the bits for what the column is now: an int8 for a float8, say.
        The question travels with the message that goes anyway. Where the driver remembers nothing, it will
        ask by itself.

        Raises:
            WriteFailed: They are not.
        """
        asked = self._ask(scope.conn)
        if asked:
            scope.control.push(asked)
        try:
            await scope.flush()
        except asyncpg.InvalidArgumentForWidthBucketFunctionError as exc:
            if asked:
                raise WriteFailed(None, exc, stale=True) from exc
            raise

    def _ask(self, conn: Connection) -> str:
        """Return SQL that raises where the driver's memory of the columns is stale; "" where it has none."""
        statement = kept_statement(conn, self._columns_query)
        if statement is None:
            return ""
        known = self._asked.get(conn_key := bare(conn))
        if known is None or known[0] is not statement:
            _, types = types_of(statement)
            # The driver is told a domain's base type.
            pairs = [
                f"{name} {oid}"
                for name, told in zip(self.target.columns, types, strict=True)
                for oid in (told, *self._domains.get(told, ()))
            ]
            question = read("columns_as_remembered").format(
                relation=sql.literal(self.target.relation),
                known=sql.literal(array_literal(pairs)),
                number=len(self.target.columns),
            )
            self._asked[conn_key] = known = (statement, question)
        return known[1]

    async def _is_stale(self, scope: Scope, failed: WriteFailed) -> bool:
        if not failed.stale:
            return await is_stale(scope, failed, self._columns_query)
        # Once it is known which of the columns' types are domains, the question is the right one.
        await scope.flush()
        query = read("domains_of_table").format(relation=sql.literal(self.target.relation))
        for base, own in await scope.conn.fetch(query):
            self._domains.setdefault(base, set()).add(own)
        return True

    def _check(self, rows: Sequence[Row], lo: int) -> None:
        check_widths(rows, len(self.target.columns), lo)


def copy_into(table: str, *, columns: Sequence[str], schema: str | None = None) -> CopyInto:
    """Write rows of Python values with binary COPY: the fastest way in.

    Names are single identifiers, taken literally: `copy_into("Order lines", columns=("id", "Größe"))`.

    Args:
        table: The table's name.
        columns: The columns' names. A row has one value for each, in this order, of the Python types that
            asyncpg takes for the column's type.
        schema: The table's schema; None: the first on the session's `search_path` that has the table.

    Returns:
        A writer for `batch`, whose items are rows.

    Raises:
        PolicyError: A name is not allowed, or there is no column, or one twice.
    """
    return CopyInto(Target.of(table, columns, schema))
