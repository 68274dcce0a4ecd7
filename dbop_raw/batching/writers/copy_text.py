"""`copy_text`: rows of texts by COPY in text format, parsed by the server's own types: what a CSV gives."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import ClassVar

from dbop_raw.batching.writers.copying import CopyWriter, Target, written
from dbop_raw.batching.writers.protocol import WriteFailed, Written
from dbop_raw.batching.writers.rows import TextRow, by_place, check_widths, span_of
from dbop_raw.batching.writers.text_format import lines, one_line
from dbop_raw.driver.underway import overlap
from dbop_raw.session.scope import Scope

__all__ = ["CopyText", "copy_text"]

# COPY data is handed to the driver in pieces of so many lines: its flow control can work, and the server
# reads one while the next is written.
_LINES = 4096
# And of at most so many bytes: each is one message, and the server takes none of 1 GB.
_BYTES = 16 * 1024 * 1024
_VALUE_TYPES = {str, type(None)}


class CopyText(CopyWriter):
    """The writer that `copy_text` makes."""

    __slots__ = ()
    _verb: ClassVar[str] = "copy_text"
    _text: ClassVar[bool] = True

    async def write(self, scope: Scope, items: Sequence[TextRow], lo: int, hi: int) -> Written[None]:
        """Send one COPY in text format."""
        rows, target = span_of(items, lo, hi), self.target
        pieces = _pieces(rows, target.columns, lo)
        # The first piece is written while what opens the span is on its way, each next one while the server
        # reads the one before.
        _, first = await overlap(scope.flush(), partial(next, pieces))
        alone = len(rows) <= _LINES and len(first) < _BYTES
        try:
            # A memoryview, since the driver takes bytes for a path.
            tag = await scope.conn.copy_to_table(
                target.table,
                schema_name=target.schema,
                columns=target.columns,
                source=memoryview(first) if alone else _stream(first, pieces),
                format="text",
                encoding="UTF8",
            )
        except WriteFailed:
            raise
        except Exception as exc:
            row = target.culprit(exc)
            raise WriteFailed(None if row is None else lo + row, exc) from exc
        return written(tag, len(rows))

    async def _is_stale(self, scope: Scope, failed: WriteFailed) -> bool:
        """The driver sends the texts as they are, whatever it remembers."""
        del scope, failed
        return False

    def _check(self, rows: Sequence[TextRow], lo: int) -> None:
        check_widths(rows, len(self.target.columns), lo)
        if not {*map(type, chain.from_iterable(rows))} <= _VALUE_TYPES:
            for index, row in enumerate(rows, lo):
                _check_row(index, row)


def _pieces(rows: Sequence[TextRow], columns: Sequence[str], lo: int) -> Iterator[bytes]:
    """Encode rows piece by piece.

    Raises:
        WriteFailed: For the first row that is none, or has not as many values as there are columns, or of
            which one is no `str`, or no valid text.
    """
    width = len(columns)
    for start in range(0, len(rows), _LINES):
        some = by_place(span_of(rows, start, min(start + _LINES, len(rows))), columns, lo + start)
        check_widths(some, width, lo + start)
        try:
            data = (lines(some, width) + "\n").encode()
        except (TypeError, ValueError) as exc:
            for index, row in enumerate(some, lo + start):
                _check_row(index, row)
            raise WriteFailed(None, exc, client=True) from exc
        for at in range(0, len(data), _BYTES):
            yield data[at : at + _BYTES]


def _check_row(index: int, row: TextRow) -> None:
    """Raise `WriteFailed` where a value is neither str nor None, or no valid text (half a surrogate pair)."""
    for value in row:
        if value is not None and not isinstance(value, str):
            error = TypeError(f"copy_text takes str or None; this row has a {type(value).__name__}")
            raise WriteFailed(index, error, client=True) from error
    try:
        one_line(row).encode()
    except ValueError as exc:
        raise WriteFailed(index, exc, client=True) from exc


async def _stream(first: bytes, others: Iterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    for piece in others:
        yield piece


def copy_text(table: str, *, columns: Sequence[str], schema: str | None = None) -> CopyText:
    """Write rows of `str | None`, such as a CSV gives, with COPY in text format: the server parses them.

    None is NULL, and the empty string is the empty string. Names are single identifiers, taken literally.

    Args:
        table: The table's name.
        columns: The columns' names. A row has one value for each, in this order.
        schema: The table's schema; None: the first on the session's `search_path` that has the table.

    Returns:
        A writer for `batch`, whose items are rows.

    Raises:
        PolicyError: A name is not allowed, or there is no column, or one twice.
    """
    return CopyText(Target.of(table, columns, schema))
