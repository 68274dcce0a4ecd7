"""`copy_into`: rows of Python values by binary COPY, the fastest way in."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

from dbop_raw.batching.writers.copying import CopyWriter, Target
from dbop_raw.batching.writers.protocol import WriteFailed
from dbop_raw.batching.writers.rows import Row, by_place, check_widths, raised_by_client, span_of, taken
from dbop_raw.driver.underway import overlap
from dbop_raw.session.scope import Scope

__all__ = ["CopyInto", "copy_into"]


class CopyInto(CopyWriter):
    """The writer that `copy_into` makes."""

    __slots__ = ()
    _verb: ClassVar[str] = "copy_into"
    _text: ClassVar[bool] = False

    async def write(self, scope: Scope, items: Sequence[Row], lo: int, hi: int) -> Sequence[None]:
        """Send one binary COPY."""
        target = self.target
        span = span_of(items, lo, hi)
        _, rows = await overlap(scope.flush(), partial(by_place, span, target.columns, lo))
        left = iter(rows)
        copying = scope.conn.copy_records_to_table(
            target.table, schema_name=target.schema, columns=target.columns, records=left
        )
        check = partial(check_widths, rows, len(target.columns), lo)
        try:
            # The rows are looked at when they have been sent, while the server is at them: a row that doesn't
            # fit is undone like anything that fails.
            await overlap(copying, check)
        except WriteFailed:
            raise
        except Exception as exc:
            number = taken(rows, left)
            if raised_by_client(exc, scope) and number > 0:
                # The driver's words for a row that is too short, or none, help nobody.
                check()
                raise WriteFailed(lo + number - 1, exc, client=True) from exc
            row = target.culprit(exc)
            raise WriteFailed(None if row is None else lo + row, exc) from exc
        return ()

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
