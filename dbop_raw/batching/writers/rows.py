"""What the writers of rows share: cutting a span out, checking rows, telling which row the driver was at."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import asyncpg

from dbop_raw.batching.writers.protocol import WriteFailed
from dbop_raw.driver.connection import is_gone
from dbop_raw.session.scope import Scope

__all__ = ["Row", "TextRow", "check_widths", "raised_by_client", "span_of", "taken"]

T = TypeVar("T")

Row = Sequence[Any]
TextRow = Sequence[str | None]

_TEXTS = (str, bytes)


def span_of(items: Sequence[T], lo: int, hi: int) -> Sequence[T]:
    """Return the items `lo` up to but not including `hi`: uncopied where that is all."""
    return items if lo == 0 and hi == len(items) else items[lo:hi]


def check_widths(rows: Sequence[Row], width: int, lo: int) -> None:
    """Raise for the first row that has not `width` values.

    The driver would cut a longer one short without a word.

    Args:
        rows: The rows of a span.
        width: The number of columns.
        lo: The place of the span's first row among all items.

    Raises:
        WriteFailed: With the row's place among all items, and a `TypeError` or `ValueError`.
    """
    try:
        # Three passes in C: this is done for each row that is written. A text is a sequence too, of its
        # characters.
        if {*map(len, rows)} <= {width} and {*map(type, rows)}.isdisjoint(_TEXTS):
            return
    except TypeError:
        pass
    for index, row in enumerate(rows, lo):
        if not isinstance(row, Sequence):
            error: Exception = TypeError(
                f"a row is a sequence of {width} values, one a column; this is a {type(row).__name__}"
            )
        elif isinstance(row, _TEXTS):
            error = TypeError(
                f"a row is a sequence of {width} values, one a column; this is one {type(row).__name__}"
            )
        elif len(row) != width:
            error = ValueError(f"the row has {len(row)} values, but there are {width} columns")
        else:
            continue
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
