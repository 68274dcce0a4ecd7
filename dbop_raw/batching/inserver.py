"""Row by row in the server: the way for spans in which many rows are bad.

A function in `pg_temp` takes one array a column and catches each row's error. That is one round trip however
many rows are bad, at one internal subtransaction a row (PL/pgSQL, "Trapping Errors"). Where bad rows are rare
it tries blocks of them, so that it is no slower than a span there. `server_functions.py` makes the function;
here it is called.

The rows go to the server a piece at a time, so that the driver's work is done while the server is at its own,
at no message more: while it tries one piece, the next is written as arguments, and the errors of the one
before are rebuilt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

import asyncpg

from dbop_raw.batching.server_functions import (
    Column,
    ServerFunction,
    check_own_codecs,
    inserts,
    statement_executions,
)
from dbop_raw.batching.writers.protocol import RowFailure, Tried, Unsupported
from dbop_raw.driver.connection import Connection
from dbop_raw.driver.underway import overlap
from dbop_raw.failure.sqlstate import RULES, Rule, verdict_of
from dbop_raw.session.scope import Scope

__all__ = ["Impossible", "InServer", "array_literal"]

Part = tuple[Sequence[Sequence[Any]], int]
"""Rows, and how many of them the server tries together at first."""

# More rows than this are given to the server in several pieces: the driver's work on one goes on while the
# server is at another, and an array's element costs the more to reach, the further back it is.
_LARGEST_PIECE = 512
# Nor more bytes than this, in texts and the like, as long as a piece has several rows: the server takes no
# message of 1 GB.
_HEAVIEST_PIECE = 16 * 1024 * 1024
# Insufficient privilege (TEMP), undefined object (the language). Not all of class 42: a value can raise that.
_REFUSED = frozenset({"42501", "42704"})
# How many attempts are left out where one has shown that the server can't try rows at all.
_BATCHES_OF_REST = 20


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows that go to the server in one call; `first` is the place of the first one."""

    first: int
    count: int
    columns: Sequence[Sequence[Any]]
    function: ServerFunction
    block: int


class InServer:
    """Tries rows in the server, one after another or in blocks.

    Args:
        columns: The columns to write, or the statement's parameters.
        ways: How the values of each travel.
        alone: The function that tries one row after another.
        blocks: The one that tries blocks, if there is one.
        copied: Would the driver send the values by COPY? None: they are texts anyway.
    """

    def __init__(
        self,
        columns: Sequence[Column],
        ways: Sequence[str],
        alone: ServerFunction,
        blocks: ServerFunction | None = None,
        *,
        copied: bool | None,
    ) -> None:
        self._columns = columns
        self._ways = ways
        self._copied = copied
        self._alone = alone
        self._blocks = blocks
        # By the overrides that they were made for: those of the engine that runs the batch.
        self._codes: tuple[list[str], list[str]] | None = None
        self._codes_of: Mapping[str, Rule] | None = None

    @staticmethod
    async def for_statement(scope: Scope, statement: str) -> InServer:
        """Prepare for any one statement with parameters, executed with each row's values.

        Raises:
            Unsupported: It has no parameters, or one whose values can't travel as the driver would send them.
        """
        await scope.flush()
        prepared = await scope.conn.prepare(statement)
        types = [type_.oid for type_ in prepared.get_parameters()]
        if not types:
            raise Unsupported
        columns = await Column.of_parameters(scope, types)
        ways = _ways(scope.conn, columns, copied=False)
        return InServer(columns, ways, statement_executions(columns, ways, statement), copied=False)

    @staticmethod
    async def for_table(scope: Scope, relation: str, names: Sequence[str], *, text: bool) -> InServer:
        """Prepare for INSERT into a table's columns of what COPY would write there.

        Args:
            scope: Where to ask what the columns are.
            relation: The table's name, quoted.
            names: The columns to write, not quoted.
            text: The values are texts, to be cast as COPY parses them.

        Raises:
            Unsupported: There is a column whose values can't travel as the driver would send them.
        """
        columns = await Column.of_table(scope, relation, names)
        copied = None if text else True
        ways = _ways(scope.conn, columns, copied=copied)
        return InServer(columns, ways, *inserts(relation, columns, ways), copied=copied)

    def suits(self, conn: Connection) -> bool:
        """Would the values travel in the same ways on this connection, whose codecs may be others?"""
        try:
            check_own_codecs(conn)
            return _ways(conn, self._columns, copied=self._copied) == self._ways
        except Unsupported:
            return False

    async def run(self, scope: Scope, *parts: Part) -> Tried:
        """Try the rows of all parts, one part after another.

        Returns:
            The failures, by the rows' places in all parts together.

        Raises:
            Unsupported: The rows have not as many values as there are columns, or one is of a Python type
                that the driver might encode otherwise in an array.
        """
        verdicts, clock = scope.settings.verdicts, scope.settings.clock
        if self._codes is None or self._codes_of is not verdicts:
            self._codes, self._codes_of = _stop_codes(verdicts), verdicts
        # It travels with the savepoint's message, at no round trip of its own.
        for function in dict.fromkeys(self._function(block) for rows, block in parts if rows):
            scope.control.push(function.ensure)
        pieces = self._pieces(parts)
        failures: list[RowFailure] = []
        met: Sequence[Mapping[str, Any]] = ()
        at, dropped, seconds, warm = 0, 0, 0.0, True

        def prepare() -> tuple[_Piece, tuple[Any, ...]] | None:
            failures.extend(_failures(met, at))
            piece = next(pieces, None)
            return None if piece is None else (piece, self._call(piece))

        _, ready = await overlap(scope.flush(), prepare)
        while ready is not None:
            piece, call = ready
            started = clock()
            found, ready = await overlap(scope.conn.fetch(*call), prepare)
            seconds += clock() - started
            warm = warm and piece.function.warm
            piece.function.warm = True
            met, at = found, piece.first
            dropped += sum(-row["d_index"] for row in found[-1:] if row["d_index"] < 0)
        failures.extend(_failures(met, at))
        return Tried(failures, seconds if warm else 0.0, dropped)

    def _function(self, block: int) -> ServerFunction:
        return self._alone if self._blocks is None or block <= 1 else self._blocks

    def _pieces(self, parts: Sequence[Part]) -> Iterator[_Piece]:
        first = 0
        for rows, block in parts:
            size = math.ceil(len(rows) / max(1, math.ceil(len(rows) / _LARGEST_PIECE))) or 1
            for at in range(0, len(rows), size):
                for count, columns in self._bounded(rows[at : at + size]):
                    yield _Piece(first, count, columns, self._function(block), block)
                    first += count

    def _bounded(self, rows: Sequence[Sequence[Any]]) -> Iterator[tuple[int, Sequence[Sequence[Any]]]]:
        """Cut rows into pieces that are not too heavy; give the length and the columns of each."""
        columns = self._by_column(rows)
        if len(rows) > 1 and _is_too_heavy(columns):
            middle = len(rows) // 2
            yield from self._bounded(rows[:middle])
            yield from self._bounded(rows[middle:])
        else:
            yield len(rows), columns

    def _by_column(self, rows: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
        try:
            values: list[Sequence[Any]] = list(zip(*rows, strict=True))
        except (TypeError, ValueError):
            raise Unsupported(of_rows=True) from None
        if len(values) != len(self._columns):
            raise Unsupported(of_rows=True)
        return values

    def _call(self, piece: _Piece) -> tuple[Any, ...]:
        """Return the query and its arguments.

        Raises:
            Unsupported: A value can't travel in an array as the driver would send it by itself.
        """
        stop, keep = self._codes or ([], [])
        types: list[str | None] = []
        arrays: list[Any] = []
        arguments = piece.function.arguments
        for type_, places in zip(arguments.types, arguments.columns, strict=True):
            values: Sequence[Any] = piece.columns[places[0]]
            if len(places) > 1:
                values = [value for place in places for value in piece.columns[place]]
            cast_to, array = _array(type_, values, text=self._ways[places[0]] == "text")
            types.append(cast_to)
            arrays.append(array)
        return (piece.function.call(types), piece.block, stop, keep, piece.count, *arrays)


class Impossible:
    """Where the server was found not to try rows at all: no privilege, no language, a type that does not fit.

    It holds for the engine on which that was found, since a writer may be used on several; and not for ever,
    since privileges can be granted.
    """

    def __init__(self) -> None:
        self._settings: object = None
        self._rest = 0

    def check(self, scope: Scope) -> None:
        """Raise `Unsupported` where it was found for this engine, and not long ago: once for each attempt."""
        if self._settings is scope.settings and self._rest > 0:
            self._rest -= 1
            raise Unsupported

    def learn(self, scope: Scope, error: Exception) -> None:
        """Take in why rows could not be tried."""
        refused = getattr(error, "sqlstate", None) in _REFUSED
        lasting = isinstance(error, Unsupported) and not error.of_rows
        if (refused or lasting) and self._rest <= 0:
            self._settings, self._rest = scope.settings, _BATCHES_OF_REST


def _ways(conn: Connection, columns: Sequence[Column], *, copied: bool | None) -> list[str]:
    """Say how the values of each column travel; None for `copied`: as texts, which is what they are.

    Raises:
        Unsupported: There is no way for one of them.
    """
    if copied is not None:
        return [column.way(conn, copied=copied) for column in columns]
    if any(column.casts_otherwise for column in columns):
        raise Unsupported
    return ["text"] * len(columns)


def _is_too_heavy(columns: Sequence[Sequence[Any]]) -> bool:
    """Would the values make too long a message?"""
    heavy = 0
    for values in columns:
        kinds = {*map(type, values)}
        if kinds <= _PLAIN:
            heavy += sum(map(len, values))
        elif not kinds.isdisjoint(_PLAIN):
            heavy += sum([len(value) for value in values if type(value) in _PLAIN])
    return heavy > _HEAVIEST_PIECE


# --- arrays

_NULL = type(None)
# Types, as format_type() writes them, whose Python values stand in an array's text just as they are.
_INTEGERS = frozenset({"smallint", "integer", "bigint"})
_TEXTS = frozenset({"text", "character varying"})
# What the driver takes for one value in an array, though it has a length.
_PLAIN = frozenset({str, bytes, bytearray, memoryview})


def _array(type_: str, values: Sequence[Any], *, text: bool) -> tuple[str | None, Any]:
    """Return values as an argument, and the type of the elements that it is to be cast to, if any.

    As one text where the driver would send the same, else as a list: the driver looks at each element of
    a list in Python, and sends a text of all of them as it is.

    Args:
        type_: The elements' type, as SQL writes it.
        values: Of one column, or of several one after another.
        text: They travel as texts, which is what they have to be.

    Raises:
        Unsupported: One is of a Python type that the driver might encode otherwise in an array.
    """
    kinds = {*map(type, values)} - {_NULL}
    if text:
        if not kinds <= {str}:
            raise Unsupported(of_rows=True)
        return type_, array_literal(values)
    if kinds == {int} and type_ in _INTEGERS:
        # Only a None has letters.
        return type_, "{" + ",".join(map(str, values)).replace("None", "NULL") + "}"
    if kinds == {str} and type_ in _TEXTS:
        return type_, array_literal(values)
    # What can be walked through would be taken for one more dimension of the array.
    if any(issubclass(kind, (Iterable, Sized)) and kind not in _PLAIN for kind in kinds):
        raise Unsupported(of_rows=True)
    return None, list(values)


def array_literal(values: Sequence[str | None]) -> str:
    """Return an array of texts as the server reads it (PostgreSQL, "Array Input and Output Syntax")."""
    together = "".join(filter(None, values))
    if '"' in together or "\\" in together:
        values = [None if value is None else _escape(value) for value in values]
    if None in values:
        return "{" + ",".join(["NULL" if value is None else f'"{value}"' for value in values]) + "}"
    return '{"' + '","'.join(cast("Sequence[str]", values)) + '"}' if values else "{}"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


# --- errors: which end the call, and how those that don't are rebuilt

# A code has five characters, a class the first two of them.
_CODE_LENGTH = 5
# The letters that the protocol names an error's fields by ("Error and Notice Message Fields"), in the order
# of the columns that `sql/function.sql` returns after the row's place.
_FIELDS = ("C", "M", "D", "H", "s", "t", "c", "d", "n")


def _stop_codes(overrides: Mapping[str, Rule] | None) -> tuple[list[str], list[str]]:
    """Return the codes and classes that are no row's fault, and the exceptions in these classes.

    What a savepoint can repair stops it too: to try a row again is for the way of spans.
    """
    keys = {*RULES, *(overrides or ())}
    verdicts = {
        key: verdict_of(key if len(key) == _CODE_LENGTH else key + "000", overrides=overrides) for key in keys
    }
    classes = {key for key in keys if len(key) != _CODE_LENGTH}
    stop = {key for key in keys if verdicts[key].transient or not verdicts[key].item}
    keep = {key for key in keys - classes - stop if key[:2] in stop}
    return sorted(stop), sorted(keep)


def _failures(found: Sequence[Mapping[str, Any]], first: int) -> list[RowFailure]:
    return [RowFailure(first + row["d_index"] - 1, _error(row)) for row in found if row["d_index"] > 0]


def _error(row: Mapping[str, Any]) -> Exception:
    """Return the error that the row would have raised, rebuilt from its fields."""
    fields = {"S": "ERROR", "V": "ERROR"}
    fields |= {letter: value for letter, value in zip(_FIELDS, tuple(row.values())[1:], strict=True) if value}
    error: Exception = asyncpg.PostgresError.new(fields)
    return error
