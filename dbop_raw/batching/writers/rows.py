"""What the writers of rows share: cutting a span out, checking rows, telling which row the driver was at.

A row is a sequence of values, an asyncpg Record, or, where the writer has columns, a mapping by their names.
Whatever else can be iterated is refused: a str has characters, and a set no order.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import asyncpg

from dbop_raw.batching.writers.protocol import WriteFailed
from dbop_raw.driver.connection import is_gone
from dbop_raw.session.scope import Scope

__all__ = ["Row", "TextRow", "by_place", "check_widths", "raised_by_client", "span_of", "taken"]

T = TypeVar("T")

Row = Sequence[Any]
TextRow = Sequence[str | None]

# What a row mostly is: nothing more has to be asked of it.
_PLAIN = frozenset({tuple, list, asyncpg.Record})
# Sequences of what is no value of a row: characters, or numbers.
_TEXTS = (str, bytes, bytearray, memoryview)


def span_of(items: Sequence[T], lo: int, hi: int) -> Sequence[T]:
    """Return the items `lo` up to but not including `hi`: uncopied where that is all."""
    return items if lo == 0 and hi == len(items) else items[lo:hi]


def by_place(rows: Sequence[Any], columns: Sequence[str] | None, lo: int) -> Sequence[Row]:
    """Return the rows with their values in order: those that are mappings get that of the columns.

    Args:
        rows: The rows of a span.
        columns: The columns' names; None where the writer knows none, so that a mapping is no row.
        lo: The place of the span's first row among all items.

    Returns:
        `rows` itself, uncopied, where none is a mapping.

    Raises:
        WriteFailed: For the first one that is no row (`TypeError`), or a mapping without one of the columns,
            or with more (`ValueError`), with its place among all items.
    """
    # One pass in C, since this is done for each row that is written.
    odd = {*map(type, rows)} - _PLAIN
    if not odd or not any(map(_looked_at, odd)):
        return rows
    names = None if columns is None else set(columns)
    return [_row(index, row, columns, names) for index, row in enumerate(rows, lo)]


def _looked_at(kind: type) -> bool:
    return not issubclass(kind, (Sequence, asyncpg.Record)) or issubclass(kind, (Mapping, *_TEXTS))


def _row(index: int, row: Any, columns: Sequence[str] | None, names: set[str] | None) -> Row:
    kind = type(row)
    if not _looked_at(kind):
        plain: Row = row
        return plain
    if columns is None or names is None or not issubclass(kind, Mapping):
        error: Exception = TypeError(
            f"a row is a sequence of values{'' if columns is None else ', or a mapping by column name'}; "
            f"this is a {kind.__name__}"
        )
    elif row.keys() == names:
        return [row[name] for name in columns]
    else:
        missing = ", ".join(repr(name) for name in columns if name not in row)
        more = ", ".join(repr(name) for name in row if name not in names)
        told = [f"lacks {missing}"] * bool(missing) + [f"has no column for {more}"] * bool(more)
        error = ValueError(f"a row by name has one value for each column, but this one {' and '.join(told)}")
    raise WriteFailed(index, error, client=True) from error


def check_widths(rows: Sequence[Row], width: int, lo: int) -> None:
    """Raise for the first row that has not `width` values.

    The driver would cut a longer one short without a word.

    Args:
        rows: The rows of a span, as `by_place` gives them.
        width: The number of columns.
        lo: The place of the span's first row among all items.

    Raises:
        WriteFailed: With the row's place among all items, and a `ValueError`.
    """
    if {*map(len, rows)} <= {width}:
        return
    for index, row in enumerate(rows, lo):
        if len(row) != width:
            error = ValueError(f"the row has {len(row)} values, but there are {width} columns")
            raise WriteFailed(index, error, client=True) from error


def taken(rows: Sequence[Any], left: Iterator[Any]) -> int:
    """Return how many of `rows` the driver has taken from their iterator `left`.

    It encodes rows as it takes them: the last one taken is the one that could not be encoded.
    """
    return len(rows) - operator.length_hint(left)


def raised_by_client(exc: Exception, scope: Scope) -> bool:
    """Was `exc` raised by the driver on encoding a value: not by the server, nor for a lost connection?"""
    # For a statement's parameter the driver raises the server's class of error, without a severity, which the
    # server always sends.
    of_server = isinstance(exc, asyncpg.PostgresError) and not (
        isinstance(exc, asyncpg.DataError) and exc.severity is None
    )
    return not (of_server or isinstance(exc, (OSError, TimeoutError)) or is_gone(scope.conn))
