"""A CSV file as a stream of rows: opened by its ending, read lazily, broken lines told by their number.

Only the standard library. The reading itself is the `csv` module's, in C; what is done here for each row is
one comparison of lengths and one search for the text that means NULL.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import csv
import gzip
import io
import itertools
import os
import stat
import sys
import threading
import zipfile
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter, methodcaller
from typing import IO, Any, TypeVar

__all__ = [
    "STDIN",
    "BrokenLine",
    "CsvRows",
    "Dialect",
    "Input",
    "Row",
    "SourceError",
    "in_thread",
    "open_input",
    "rows_in_thread",
    "unpacked",
]

T = TypeVar("T")

STDIN = "-"
Row = Sequence[str | None]

# An unclosed quote makes one field of the rest of a file: this bounds what is read before that is noticed
# (characters).
_LONGEST_FIELD = 64 * 1024 * 1024
# How many rows a thread reads at a time: handing one over costs more than reading it.
_ROWS_AT_A_TIME = 500
# Bytes that are unpacked at a time.
_BUFFER = 1 << 18
# How many names a message lists.
_MANY = 10
_READ_ERRORS = (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError)


class SourceError(Exception):
    """The input can't be used; the message is one sentence for a person, and names the file."""


class BrokenLine(SourceError):
    """The input can't be read further than here; what came before this line was read well."""

    def __init__(self, name: str, line: int, what: str) -> None:
        super().__init__(f"{name}, line {line:,}: {what}")
        self.line = line
        """The line of the file, from 1, that the broken row begins on."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """How the file is written. The quote is `"`, doubled inside of quotes."""

    delimiter: str = ","
    null: str = ""
    """A field of exactly this text is NULL, quoted or not: Python's reader can't tell the two apart."""
    encoding: str = "utf-8"
    """As Python names it; one where a newline is one byte, so not UTF-16. A byte order mark is left out."""


@dataclass(slots=True)
class Input:
    """An open file of bytes, and how far its reading has come."""

    name: str
    """For messages."""
    data: IO[bytes]
    """What is in it, unpacked."""
    size: int | None = None
    """Bytes of the file as it lies there (packed, if it is); None where that is not known."""
    may_wait: bool = False
    """Reading may take as long as it likes (a pipe): see `rows_in_thread`."""
    _packed: IO[bytes] | None = None
    _others: list[IO[bytes] | zipfile.ZipFile] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Bytes of the file that were read so far, of `size`."""
        return 0 if self._packed is None or self._packed.closed else self._packed.tell()

    def close(self) -> None:
        """Close it. Not where a thread may still wait for a read of it: closing would wait for that."""
        if self.may_wait:
            return
        for one in (self.data, *self._others):
            one.close()


def open_input(path: str) -> Input:
    """Open a file: `.gz` as gzip, `.zip` as the one file in it, `-` as standard input, else as it is.

    Raises `SourceError` when it is missing, can't be read, or is a zip of none or several files.
    """
    if path == STDIN:
        # A file object of our own: a thread may be left in the middle of a read of it when the process ends,
        # and the interpreter's own sys.stdin would be locked then.
        return Input("standard input", open(0, "rb", closefd=False), may_wait=True)
    try:
        packed = open(path, "rb")  # noqa: PTH123, SIM115 - Input closes it
        status = os.fstat(packed.fileno())
    except OSError as exc:
        raise SourceError(f"{path} can't be read: {exc.strerror or exc}") from exc
    plain = stat.S_ISREG(status.st_mode)
    source = unpacked(path, packed, status.st_size if plain else None)
    source.may_wait = not plain
    return source


def unpacked(name: str, packed: IO[bytes], size: int | None) -> Input:
    """Look inside of an open file, by the ending of its name. Raises `SourceError` as `open_input` does."""
    ending = os.path.splitext(name)[1].lower()  # noqa: PTH122 - no path: it may be a name in an archive
    if ending == ".gz":
        data = io.BufferedReader(gzip.GzipFile(fileobj=packed, mode="rb"), _BUFFER)
        return Input(name, data, size, _packed=packed, _others=[packed])
    if ending == ".zip":
        return _only_member(name, packed, size)
    return Input(name, packed, size, _packed=packed)


def _only_member(name: str, packed: IO[bytes], size: int | None) -> Input:
    try:
        archive = zipfile.ZipFile(packed)
        members = [info.filename for info in archive.infolist() if not info.is_dir()]
        data = archive.open(members[0]) if len(members) == 1 else None
    except _READ_ERRORS as exc:
        packed.close()
        raise SourceError(f"{name} can't be read as a zip: {exc}") from exc
    if data is None:
        packed.close()
        found = ", ".join(members[:_MANY]) or "none"
        more = f", and {len(members) - _MANY} more" if len(members) > _MANY else ""
        raise SourceError(f"{name} must have exactly one file in it, and has: {found}{more}")
    buffered = io.BufferedReader(data, _BUFFER)  # type: ignore[type-var]
    return Input(f"{name}:{members[0]}", buffered, size, _packed=packed, _others=[archive, packed])


class CsvRows:
    """The rows of a CSV input below its header: iterate once.

    A row is a sequence of `str | None`, one for each of `columns`. Empty lines are left out, but where there
    is one column only: there an empty line is an empty field.

    A line that can't be read (a wrong number of fields, a stray quote, bytes of another encoding, a packed
    file that is cut short) ends it. With `raise_broken`, by a `BrokenLine`; else in order, as if the file
    ended there, and `broken` holds it: what was read before it is not lost.
    """

    def __init__(self, source: Input, dialect: Dialect, *, raise_broken: bool = False) -> None:
        csv.field_size_limit(min(_LONGEST_FIELD, sys.maxsize))
        self._source = source
        self._dialect = dialect
        self._raise = raise_broken
        # strict: an unclosed quote would otherwise take the rest of the file into one field, without a word.
        self._reader = csv.reader(_without_mark(self._lines()), delimiter=dialect.delimiter, strict=True)
        self._pick: Callable[[Row], Row] | None = None
        self.broken: BrokenLine | None = None
        self.header: tuple[str, ...] = self._read_header()
        self.columns: tuple[str, ...] = self.header

    def _lines(self) -> Iterator[str]:
        """Decoded line by line: a wrong byte must not take good lines before it along."""
        utf8 = codecs.lookup(self._dialect.encoding).name == "utf-8"
        decode = bytes.decode if utf8 else methodcaller("decode", self._dialect.encoding)
        return map(decode, self._source.data)

    def _read_header(self) -> tuple[str, ...]:
        try:
            header = next(self._reader, None)
        except (csv.Error, UnicodeError, *_READ_ERRORS) as exc:
            raise self._broken_by(exc, 0) from exc
        if not header:
            raise SourceError(f"{self._source.name} has no header: its first line is empty or missing")
        return tuple(header)

    def select(self, columns: Sequence[str]) -> None:
        """Give only these columns of the header, in this order.

        Raises `SourceError` for one that is not in the header, or there twice.
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
        """Read on. Raises `BrokenLine` only with `raise_broken`."""
        reader, width, null, pick = self._reader, len(self.header), self._dialect.null, self._pick
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
        except (csv.Error, UnicodeError, _WrongWidth, *_READ_ERRORS) as exc:
            self.broken = self._broken_by(exc, before)
            if self._raise:
                raise self.broken from exc

    def _broken_by(self, exc: Exception, before: int) -> BrokenLine:
        """What to say of it; `before` is the number of the last good row's last line."""
        name, line = self._source.name, before + 1
        if isinstance(exc, _WrongWidth):
            return BrokenLine(name, line, f"{exc.found} fields, where the header has {len(self.header)}")
        if isinstance(exc, UnicodeDecodeError):
            what = f"it is not {self._dialect.encoding}: byte {exc.object[exc.start]:#04x}"
            return BrokenLine(name, self._reader.line_num + 1, f"{what}; --encoding names another")
        if isinstance(exc, csv.Error):
            return BrokenLine(name, line, f"it can't be read as CSV: {exc}")
        return BrokenLine(name, line, f"the file can't be read further: {exc}")


class _WrongWidth(Exception):
    """A line has another number of fields than the header: never leaves this module."""

    def __init__(self, found: int) -> None:
        super().__init__(found)
        self.found = found


def _without_mark(lines: Iterator[str]) -> Iterator[str]:
    """Leave out a byte order mark, which would be part of the first column's name."""
    for first in lines:
        yield first.removeprefix("\ufeff")
        yield from lines


async def rows_in_thread(rows: Iterator[Row], at_a_time: int) -> AsyncIterator[Row]:
    """The same rows, read in a thread, so many at a time: for an input that may make a reader wait."""
    read = partial(_some, rows, min(at_a_time, _ROWS_AT_A_TIME))
    while batch := await in_thread(read):
        for row in batch:
            yield row


def _some(rows: Iterator[Row], number: int) -> list[Row]:
    return list(itertools.islice(rows, number))


async def in_thread(call: Callable[[], T]) -> T:
    """Call it in a thread of its own, which a cancellation and the end of the process leave behind.

    Nobody can end a read of a pipe from outside, and the threads of a pool would be waited for.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(set_it: Callable[[Any], None], value: object) -> None:
        if not future.done():
            set_it(value)

    def work() -> None:
        try:
            outcome: tuple[Callable[[Any], None], object] = future.set_result, call()
        except BaseException as exc:  # noqa: BLE001 - carried to the caller
            outcome = future.set_exception, exc
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=work, name="dbop-raw-read", daemon=True).start()
    return await future
