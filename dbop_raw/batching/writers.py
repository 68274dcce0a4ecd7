"""The four ways to write items: `each`, `execute_many`, `copy_into`, `copy_text`.

Each writes one span, or raises and says which item it was.

A writer knows nothing of savepoints or retries: `dbop_raw.batch.batch` calls it for the spans that the
chooser names.
"""

from __future__ import annotations

import operator
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, Generic, Protocol, TypeVar, cast

import asyncpg

from dbop_raw.batching.inserver import Column, InServer, RowFailure, Tried
from dbop_raw.batching.suspects import Suspects, depends_on_order
from dbop_raw.driver import sql
from dbop_raw.driver.connection import is_gone
from dbop_raw.driver.underway import overlap
from dbop_raw.failure.errors import PolicyError
from dbop_raw.pipeline.operation import AnyOperation, to_operation
from dbop_raw.session.scope import Scope, name_of

__all__ = [
    "CopyInto",
    "CopyText",
    "Each",
    "ExecuteMany",
    "WriteFailed",
    "Writer",
    "copy_into",
    "copy_text",
    "each",
    "execute_many",
]

Item = TypeVar("Item")
Item_contra = TypeVar("Item_contra", contravariant=True)
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

Row = Sequence[Any]
TextRow = Sequence[str | None]

# COPY data is handed to the driver in pieces of so many lines: its flow control can work, and the server
# reads one while the next is written.
_LINES = 4096


class WriteFailed(Exception):
    """A span could not be written: a signal to the batch, with the item (if known) and the driver's error."""

    def __init__(self, index: int | None, error: Exception, *, client: bool = False) -> None:
        super().__init__(index, error)
        self.index = index
        self.error = error
        self.client = client
        """Raised before anything reached the server: surely the fault of the item, if `index` is known."""


class Writer(Protocol[Item_contra, R_co]):
    """What `batch` takes."""

    @property
    def name(self) -> str:
        """For events and for `repr`."""
        ...

    @property
    def opaque(self) -> bool:
        """Are the items operations, which only tell that they failed when they are run?"""
        ...

    async def write(self, scope: Scope, items: Sequence[Item_contra], lo: int, hi: int) -> Sequence[R_co]:
        """Write items `lo` to `hi`; raises `WriteFailed`. Gives their results, if the writer has any."""
        ...

    async def write_rows(
        self, scope: Scope, items: Sequence[Item_contra], lo: int, hi: int, density: float
    ) -> Tried:
        """Have the server try them one by one; gives those that failed.

        Raises `WriteFailed` where that can't be done.
        """
        ...


# --- any operation an item


@dataclass(frozen=True, slots=True)
class Each(Generic[Item, R]):
    """What `each` makes; see there."""

    make_op: Callable[[Item], AnyOperation[R]]
    opaque: bool = field(default=True, init=False)

    @property
    def name(self) -> str:
        """As it is written."""
        return f"each({name_of(self.make_op)})"

    async def write(self, scope: Scope, items: Sequence[Item], lo: int, hi: int) -> Sequence[R]:
        """One after another; the first that fails ends the span."""
        results: list[R] = []
        append, make_op = results.append, self.make_op
        outer = scope.attempts
        if lo == 0 or scope.control.begins:
            # What begins the transaction fails here, if it fails, and not as the first item.
            await scope.flush()
        try:
            for index in range(lo, hi):
                # The starts of an item's own retry are counted for one run of that item only.
                scope.attempts = {}
                try:
                    append(await to_operation(make_op(items[index])).step(scope, scope.frame))
                except Exception as exc:
                    raise WriteFailed(index, exc) from exc
        finally:
            scope.attempts = outer
        return results

    async def write_rows(
        self, scope: Scope, items: Sequence[Item], lo: int, hi: int, density: float
    ) -> Tried:
        """Not for operations: the chooser never asks."""
        raise NotImplementedError


def each(make_op: Callable[[Item], AnyOperation[R]]) -> Each[Item, R]:
    """Write each item with an operation of its own: `each(add_event)`. The results are kept.

    An item's operation may start more than once: when a later item of its span fails, what came before is
    done again. So it must have no effect outside of the transaction.
    """
    if not callable(make_op):
        message = (
            f"each() got an object of type {type(make_op).__name__}: give a function that makes an operation "
            "from an item"
        )
        raise PolicyError(message)
    return Each(make_op)


# --- rows of parameters


def _consumed(rows: Sequence[Any], left: Iterator[Any]) -> int:
    """How many of `rows` were taken from their iterator.

    The last one taken is the one that could not be encoded.
    """
    return len(rows) - operator.length_hint(left)


def _client_side(exc: Exception, scope: Scope) -> bool:
    return not isinstance(exc, (asyncpg.PostgresError, OSError, TimeoutError)) and not is_gone(scope.conn)


@dataclass(frozen=True, slots=True)
class ExecuteMany:
    """What `execute_many` makes; see there."""

    sql: str
    opaque: bool = field(default=False, init=False)
    _in_server: list[InServer] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The writer's name alone: SQL stays out of events."""
        return "execute_many"

    async def write(self, scope: Scope, items: Sequence[Row], lo: int, hi: int) -> Sequence[None]:
        """All executions in one round trip."""
        await scope.flush()
        rows = _part(items, lo, hi)
        left = iter(rows)
        try:
            await scope.conn.executemany(self.sql, left)
        except Exception as exc:
            # The driver encodes as it sends: its own errors are about the row that it took last; the server's
            # name none.
            taken = _consumed(rows, left)
            client = _client_side(exc, scope) and taken > 0
            raise WriteFailed(lo + taken - 1 if client else None, exc, client=client) from exc
        return ()

    async def write_rows(self, scope: Scope, items: Sequence[Row], lo: int, hi: int, density: float) -> Tried:
        """A loop in the server that executes the same statement."""
        del density
        try:
            if not self._in_server:
                self._in_server.append(await InServer.for_statement(scope, self.sql))
            tried = await self._in_server[0].run(scope, (items[lo:hi], 1))
        except Exception as exc:
            self._in_server.clear()
            raise WriteFailed(None, exc) from exc
        return tried.behind(lo)


def execute_many(statement: str) -> ExecuteMany:
    """Execute one statement for each row of parameters: `execute_many("INSERT INTO t VALUES ($1, $2)")`."""
    if not isinstance(statement, str) or not statement.strip():
        message = f"execute_many({statement!r}): give one SQL statement with parameters $1, $2, …"
        raise PolicyError(message)
    return ExecuteMany(statement)


# --- COPY


@dataclass(frozen=True, slots=True)
class _Target:
    """A table and its columns, each name taken literally."""

    table: str
    columns: tuple[str, ...]
    schema: str | None

    @classmethod
    def of(cls, table: str, columns: Sequence[str], schema: str | None) -> _Target:
        if isinstance(columns, str) or not all(isinstance(c, str) for c in columns):
            message = f"columns={columns!r}: give a sequence of column names, such as ('id', 'body')"
            raise PolicyError(message)
        if not columns:
            message = "columns=(): name at least one column"
            raise PolicyError(message)
        if len(set(columns)) != len(columns):
            message = f"columns={columns!r} names a column twice"
            raise PolicyError(message)
        for name in (table, *columns, *(() if schema is None else (schema,))):
            sql.identifier(name)
        return cls(table, tuple(columns), schema)

    @property
    def relation(self) -> str:
        return sql.relation(self.table, self.schema)

    def culprit(self, exc: Exception) -> int | None:
        """The row, from 0, that the server's error names in its context: `COPY t, line 38`.

        The words are translated, the table's name and the number are not. Two such lines, or none, name
        nobody.
        """
        context = getattr(exc, "context", None)
        if not isinstance(exc, asyncpg.PostgresError) or not isinstance(context, str):
            return None
        prefix = f"COPY {self.table}, "
        found = [line for line in context.split("\n") if line.startswith(prefix)]
        number = re.match(r"\D*(\d+)", found[0][len(prefix) :]) if len(found) == 1 else None
        return int(number[1]) - 1 if number and int(number[1]) > 0 else None


_TEXTS = (str, bytes)


def _part(items: Sequence[Row], lo: int, hi: int) -> Sequence[Row]:
    return items if lo == 0 and hi == len(items) else items[lo:hi]


def _misfit(rows: Sequence[Row], width: int, lo: int) -> None:
    """Raise for the first row that has not `width` values.

    The driver would cut a longer one short without a word.
    """
    try:
        # A text is a sequence too, of its characters.
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


class _Copy:
    """What both COPY writers share: the row-by-row way, by INSERT of the same columns."""

    __slots__ = ()
    target: _Target
    _in_server: list[InServer]
    _suspects: list[Suspects]

    async def _try_rows(
        self, scope: Scope, rows: Sequence[Row], lo: int, density: float, *, text: bool
    ) -> Tried:
        try:
            if not self._in_server:
                columns = await Column.of_table(scope, self.target.relation, self.target.columns)
                self._in_server.append(InServer.for_table(self.target.relation, columns, text=text))
            if not self._suspects:
                self._suspects.append(Suspects(self.target.columns))
            # Kept in hand: the workers of an ingest share this writer, and another's failure clears the list.
            in_server = self._in_server[0]
            tried = await self._apart(scope, in_server, rows) if density > _DENSE else None
            if tried is None:
                tried = await in_server.run(scope, (rows, _block(density)))
            if len(tried.failures) > _DENSE * len(rows):
                await self._suspects[0].learn(scope, rows, tried.failures)
        except Exception as exc:
            self._in_server.clear()
            raise WriteFailed(None, exc) from exc
        return tried.behind(lo)

    async def _apart(self, scope: Scope, in_server: InServer, rows: Sequence[Row]) -> Tried | None:
        """The suspects alone, after the others in blocks; None where that can't be, or there are none."""
        suspects = self._suspects[0].among(rows)
        if not suspects:
            return None
        apart = set(suspects)
        others = [place for place in range(len(rows)) if place not in apart]
        parts = [([rows[place] for place in places], n) for places, n in ((others, _BLOCK), (suspects, 1))]
        scope.control.savepoint()
        try:
            tried = await in_server.run(scope, *parts)
        except BaseException:
            scope.control.abandon()
            raise
        if any(map(depends_on_order, tried.failures)):
            scope.control.abandon()
            self._suspects[0].give_up()
            return None
        scope.control.release()
        places = others + suspects
        failures = [RowFailure(places[one.index], one.error) for one in tried.failures]
        return Tried(sorted(failures, key=lambda one: one.index), tried.seconds)


# Where more rows are bad, trying a block of them is mostly in vain.
_DENSE = 0.03
_LARGEST_BLOCK = 512
# With the suspects set apart, bad rows are rare among the others.
_BLOCK = 64


def _block(density: float) -> int:
    """How many rows the server tries together at first: about half the usual distance between bad ones."""
    return 1 if density > _DENSE else int(min(_LARGEST_BLOCK, 0.5 / max(density, 1e-6)))


@dataclass(frozen=True, slots=True)
class CopyInto(_Copy):
    """What `copy_into` makes; see there."""

    target: _Target
    opaque: bool = field(default=False, init=False)
    _in_server: list[InServer] = field(default_factory=list, init=False, repr=False, compare=False)
    _suspects: list[Suspects] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def name(self) -> str:
        """With the table's name."""
        return f"copy_into({self.target.relation})"

    async def write(self, scope: Scope, items: Sequence[Row], lo: int, hi: int) -> Sequence[None]:
        """One binary COPY."""
        rows = _part(items, lo, hi)
        await scope.flush()
        left = iter(rows)
        target = self.target
        copying = scope.conn.copy_records_to_table(
            target.table, schema_name=target.schema, columns=target.columns, records=left
        )
        check = partial(_misfit, rows, len(target.columns), lo)
        try:
            # The rows are looked at when they have been sent: a misfit is undone like anything that fails.
            await overlap(copying, check)
        except WriteFailed:
            raise
        except Exception as exc:
            taken = _consumed(rows, left)
            if _client_side(exc, scope) and taken > 0:
                # The driver's words for a row that is too short, or none, help nobody.
                check()
                raise WriteFailed(lo + taken - 1, exc, client=True) from exc
            row = target.culprit(exc)
            raise WriteFailed(None if row is None else lo + row, exc) from exc
        return ()

    async def write_rows(self, scope: Scope, items: Sequence[Row], lo: int, hi: int, density: float) -> Tried:
        """A loop in the server that inserts the same columns."""
        rows = _part(items, lo, hi)
        _misfit(rows, len(self.target.columns), lo)
        return await self._try_rows(scope, rows, lo, density, text=False)


def copy_into(table: str, *, columns: Sequence[str], schema: str | None = None) -> CopyInto:
    """Write rows of Python values with binary COPY: the fastest way in.

    `table`, `columns` and `schema` are single identifiers, taken literally: `copy_into("Order lines",
    columns=("id", "Größe"))`. A row has one value for each column, in that order, of the Python types that
    asyncpg takes for the column's type.
    """
    return CopyInto(_Target.of(table, columns, schema))


_TEXT_TYPES = {str, type(None)}
_SPECIAL = re.compile(r"[\\\t\n\r]")
_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}


def _escape(value: str) -> str:
    return _SPECIAL.sub(lambda m: _ESCAPES[m[0]], value)


def _text_line(row: TextRow) -> str:
    """One row in COPY's text format (PostgreSQL, "COPY", File Formats)."""
    nulls = row.count(None)
    texts = ["\\N" if value is None else value for value in row] if nulls else cast("Sequence[str]", row)
    line = "\t".join(texts)
    # Nearly always there is nothing to escape, and four searches of the whole line cost less than one of each
    # value.
    tabs, backslashes = line.count("\t"), line.count("\\")
    if tabs == len(row) - 1 and backslashes == nulls and "\n" not in line and "\r" not in line:
        return line
    return "\t".join(["\\N" if value is None else _escape(value) for value in row])


def _text(rows: Sequence[TextRow], width: int) -> str:
    """Rows of `width` values in COPY's text format."""
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
    return "\n".join([_text_line(row) for row in rows])


def _encode(rows: Sequence[TextRow], width: int, lo: int) -> Iterator[bytes]:
    """Piece by piece in COPY's text format.

    Raises `WriteFailed` for the first row that has not `width` values, or of which one is no `str`, or no
    valid text.
    """
    for start in range(0, len(rows), _LINES):
        some = _part(rows, start, min(start + _LINES, len(rows)))
        _misfit(some, width, lo + start)
        try:
            yield (_text(some, width) + "\n").encode()
        except (TypeError, ValueError) as exc:
            for index, row in enumerate(some, lo + start):
                _check_text(index, row)
            raise WriteFailed(None, exc, client=True) from exc


def _check_text(index: int, row: TextRow) -> None:
    for value in row:
        if value is not None and not isinstance(value, str):
            error: Exception = TypeError(
                f"copy_text takes str or None; this row has a {type(value).__name__}"
            )
            raise WriteFailed(index, error, client=True) from error
    try:
        _text_line(row).encode()
    except ValueError as exc:
        raise WriteFailed(index, exc, client=True) from exc


async def _stream(first: bytes, others: Iterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    for piece in others:
        yield piece


@dataclass(frozen=True, slots=True)
class CopyText(_Copy):
    """What `copy_text` makes; see there."""

    target: _Target
    opaque: bool = field(default=False, init=False)
    _in_server: list[InServer] = field(default_factory=list, init=False, repr=False, compare=False)
    _suspects: list[Suspects] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def name(self) -> str:
        """With the table's name."""
        return f"copy_text({self.target.relation})"

    async def write(self, scope: Scope, items: Sequence[TextRow], lo: int, hi: int) -> Sequence[None]:
        """One COPY in text format."""
        rows, target = _part(items, lo, hi), self.target
        pieces = _encode(rows, len(target.columns), lo)
        # The first piece is written while what opens the span is on its way, each next one while the server
        # reads the one before.
        _, first = await overlap(scope.flush(), partial(next, pieces))
        try:
            # A memoryview, since the driver takes bytes for a path.
            await scope.conn.copy_to_table(
                target.table,
                schema_name=target.schema,
                columns=target.columns,
                source=memoryview(first) if len(rows) <= _LINES else _stream(first, pieces),
                format="text",
                encoding="UTF8",
            )
        except WriteFailed:
            raise
        except Exception as exc:
            row = target.culprit(exc)
            raise WriteFailed(None if row is None else lo + row, exc) from exc
        return ()

    async def write_rows(
        self, scope: Scope, items: Sequence[TextRow], lo: int, hi: int, density: float
    ) -> Tried:
        """A loop in the server that casts and inserts the same columns."""
        rows = _part(items, lo, hi)
        _misfit(rows, len(self.target.columns), lo)
        if not {*map(type, chain.from_iterable(rows))} <= _TEXT_TYPES:
            for index, row in enumerate(rows, lo):
                _check_text(index, row)
        return await self._try_rows(scope, rows, lo, density, text=True)


def copy_text(table: str, *, columns: Sequence[str], schema: str | None = None) -> CopyText:
    """Write rows of `str | None` with COPY in text format.

    What a CSV gives, parsed by the server's own types.

    None is NULL, and the empty string is the empty string. `table`, `columns` and `schema` are single
    identifiers, taken literally.
    """
    return CopyText(_Target.of(table, columns, schema))
