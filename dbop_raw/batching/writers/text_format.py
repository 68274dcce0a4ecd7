"""Rows in COPY's text format (PostgreSQL, "COPY", File Formats).

Pure, and fast where nothing is to be escaped, which is nearly always.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import cast

from dbop_raw.batching.writers.rows import TextRow

__all__ = ["escape", "lines", "one_line"]

_SPECIAL = re.compile(r"[\\\t\n\r]")
_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}


def escape(value: str) -> str:
    """Return one value as it stands in a line."""
    return _SPECIAL.sub(lambda m: _ESCAPES[m[0]], value)


def one_line(row: TextRow) -> str:
    """Return one row, without the line's end.

    Raises:
        TypeError: A value is neither str nor None.
    """
    # A tuple, for not all that is a row can count: the driver's Record can't.
    nulls = tuple(row).count(None)
    texts = ["\\N" if value is None else value for value in row] if nulls else cast("Sequence[str]", row)
    line = "\t".join(texts)
    # Nearly always there is nothing to escape, and four searches of the whole line cost less than one of each
    # value.
    tabs, backslashes = line.count("\t"), line.count("\\")
    if tabs == len(row) - 1 and backslashes == nulls and "\n" not in line and "\r" not in line:
        return line
    return "\t".join(["\\N" if value is None else escape(value) for value in row])


def lines(rows: Sequence[TextRow], width: int) -> str:
    """Return rows of `width` values each, without the last line's end.

    Raises:
        TypeError: A value is neither str nor None.
    """
    try:
        text = "\n".join(map("\t".join, cast("Sequence[Sequence[str]]", rows)))
    except TypeError:
        pass  # a NULL, or no text
    else:
        # Where no value holds what has to be escaped, only what was put between them is found.
        tabs, ends = len(rows) * (width - 1), len(rows) - 1
        plain = text.count("\t") == tabs and text.count("\n") == ends
        if plain and "\\" not in text and "\r" not in text:
            return text
    # As tuples, since not every row can count (a Record can't).
    return "\n".join([one_line(tuple(row)) for row in rows])
