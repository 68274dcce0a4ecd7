"""A CSV file as a stream of rows: read lazily, broken lines told by their number.

Only the standard library. The reading itself is the `csv` module's, in C; what is done here for each row is
one comparison of lengths and one search for the text that means NULL.
"""

from __future__ import annotations

import codecs
import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter, methodcaller

from dbop_raw.sources.files import READ_ERRORS, Input, SourceError

__all__ = ["BrokenLine", "CsvRows", "Dialect", "Row"]

Row = Sequence[str | None]
"""One value for each column; None is NULL."""

# An unclosed quote makes one field of the rest of a file: this bounds what is read before that is noticed
# (characters).
_LONGEST_FIELD = 64 * 1024 * 1024


class BrokenLine(SourceError):
    """The input can't be read further than here; what came before this line was read well."""

    def __init__(self, name: str, line: int, what: str) -> None:
        super().__init__(f"{name}, line {line:,}: {what}")
        self.line = line
        """The line of the file, from 1, that the broken row begins on."""


class _WrongWidth(Exception):
    """A line has another number of fields than the header."""

    def __init__(self, found: int) -> None:
        super().__init__(found)
        self.found = found


@dataclass(frozen=True, slots=True)
class Dialect:
    """How the file is written. The quote is `"`, doubled inside of quotes."""

    delimiter: str = ","
    null: str = ""
    """A field of exactly this text is NULL, quoted or not: Python's reader can't tell the two apart."""
    encoding: str = "utf-8"
    """As Python names it; one where a newline is one byte, so not UTF-16. A byte order mark is left out."""


class CsvRows:
    """The rows of a CSV input below its header: iterate once.

    A row has one `str` or None for each of `columns`. Empty lines are left out, but where there is one column
    only: there an empty line is an empty field.

    A line that can't be read (a wrong number of fields, a stray quote, bytes of another encoding, a packed
    file that is cut short) ends it: in order, as if the file ended there. `broken` says so then, and what was
    read before that line is not lost.
    """

    def __init__(self, source: Input, dialect: Dialect, *, raise_broken: bool = False) -> None:
        """Read the header.

        Args:
            source: The input; the caller closes it.
            dialect: How it is written.
            raise_broken: Raise the `BrokenLine` that ends it, instead of ending as if the file did.

        Raises:
            SourceError: There is no header, or it can't be read.
        """
        csv.field_size_limit(min(_LONGEST_FIELD, sys.maxsize))
        self._source = source
        self._dialect = dialect
        self._raise = raise_broken
        # strict: an unclosed quote would otherwise take the rest of the file into one field, without a word.
        self._reader = csv.reader(_without_mark(self._lines()), delimiter=dialect.delimiter, strict=True)
        self._pick: Callable[[Row], Row] | None = None
        self.broken: BrokenLine | None = None
        """The line that ended it, once it is over; None where the file's end did."""
        self.header: tuple[str, ...] = self._read_header()
        """The names in the file's first line."""
        self.columns: tuple[str, ...] = self.header
        """The names of what a row has."""

    def _lines(self) -> Iterator[str]:
        """Decode line by line: a wrong byte must not take the good lines before it along."""
        utf8 = codecs.lookup(self._dialect.encoding).name == "utf-8"
        decode = bytes.decode if utf8 else methodcaller("decode", self._dialect.encoding)
        return map(decode, self._source.data)

    def _read_header(self) -> tuple[str, ...]:
        try:
            header = next(self._reader, None)
        except (csv.Error, UnicodeError, *READ_ERRORS) as exc:
            raise self._broken_by(exc, 0) from exc
        if not header:
            raise SourceError(f"{self._source.name} has no header: its first line is empty or missing")
        return tuple(header)

    def select(self, columns: Sequence[str]) -> None:
        """Give only some columns, from here on.

        Args:
            columns: Names of the header, in the order that a row is to have.

        Raises:
            SourceError: A name is not in the header, or there twice.
        """
        for name in columns:
            if self.header.count(name) != 1:
                there = "not in" if name not in self.header else "more than once in"
                raise SourceError(
                    f"column {name!r} is {there} the header of {self._source.name}: {', '.join(self.header)}"
                )
        self.columns = tuple(columns)
        indexes = [self.header.index(name) for name in columns]
        if len(indexes) == 1:
            only = indexes[0]
            self._pick = lambda row: (row[only],)
        elif self.columns != self.header:
            self._pick = itemgetter(*indexes)

    def __iter__(self) -> Iterator[Row]:
        """Read on; a `BrokenLine` is raised only with `raise_broken`."""
        reader, width, null, pick = self._reader, len(self.header), self._dialect.null, self._pick
        # The number of the last good row's last line.
        before = reader.line_num
        row: Row
        try:
            for row in reader:
                if len(row) != width:
                    if row:
                        raise _WrongWidth(len(row))  # noqa: TRY301 - one place for all that breaks a line
                    if width > 1:
                        before = reader.line_num
                        continue
                    row = [""]  # noqa: PLW2901
                if pick is not None:
                    row = pick(row)  # noqa: PLW2901
                # Found in C: only the rows that have one are gone through in Python.
                yield [None if value == null else value for value in row] if null in row else row
                before = reader.line_num
        except (csv.Error, UnicodeError, _WrongWidth, *READ_ERRORS) as exc:
            self.broken = self._broken_by(exc, before)
            if self._raise:
                raise self.broken from exc

    def _broken_by(self, exc: Exception, before: int) -> BrokenLine:
        """Say what broke the line that follows line `before`."""
        name, line = self._source.name, before + 1
        if isinstance(exc, _WrongWidth):
            return BrokenLine(name, line, f"{exc.found} fields, where the header has {len(self.header)}")
        if isinstance(exc, UnicodeDecodeError):
            what = f"it is not {self._dialect.encoding}: byte {exc.object[exc.start]:#04x}"
            return BrokenLine(name, self._reader.line_num + 1, f"{what}; --encoding names another")
        if isinstance(exc, csv.Error):
            return BrokenLine(name, line, f"it can't be read as CSV: {exc}")
        return BrokenLine(name, line, f"the file can't be read further: {exc}")


def _without_mark(lines: Iterator[str]) -> Iterator[str]:
    """Leave out a byte order mark, which would be part of the first column's name."""
    for first in lines:
        yield first.removeprefix("\ufeff")
        yield from lines
