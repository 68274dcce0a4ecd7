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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import asyncpg

from dbop_raw.batching.server_functions import Column, ServerFunction, inserts, statement_executions
from dbop_raw.batching.writers.protocol import RowFailure, Tried, Unsupported
from dbop_raw.driver import sql
from dbop_raw.driver.underway import overlap
from dbop_raw.failure.sqlstate import RULES, Rule, verdict_of
from dbop_raw.session.scope import Scope

__all__ = ["InServer"]

Part = tuple[Sequence[Sequence[Any]], int]
"""Rows, and how many of them the server tries together at first."""

# More rows than this are given to the server in several pieces: the driver's work on one goes on while the
# server is at another, and an array's element costs the more to reach, the further back it is.
_LARGEST_PIECE = 512


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows that go to the server in one call; `first` is the place of the first one."""

    first: int
    rows: Sequence[Sequence[Any]]
    function: ServerFunction
    block: int


class InServer:
    """Tries rows in the server, one after another or in blocks.

    Args:
        types: The types of the columns, as SQL writes them.
        alone: The function that tries one row after another.
        blocks: The one that tries blocks, if there is one.
        text: All values are texts.
    """

    def __init__(
        self,
        types: Sequence[str],
        alone: ServerFunction,
        blocks: ServerFunction | None = None,
        *,
        text: bool = False,
    ) -> None:
        self._types = types
        self._text = text
        self._alone = alone
        self._blocks = blocks
        # By the overrides that they were made for: those of the engine that runs the batch.
        self._codes: tuple[list[str], list[str]] | None = None
        self._codes_of: Mapping[str, Rule] | None = None

    @staticmethod
    async def for_statement(scope: Scope, statement: str) -> InServer:
        """Prepare for any one statement with parameters, executed with each row's values.

        Raises:
            Unsupported: It has no parameters, or one of them is an array.
        """
        await scope.flush()
        prepared = await scope.conn.prepare(statement)
        types = prepared.get_parameters()
        if not types or any(type_.kind == "array" for type_ in types):
            # An array of arrays is one array of more dimensions in SQL: its rows can't differ in length.
            raise Unsupported
        names = [f"{sql.identifier(type_.schema)}.{sql.identifier(type_.name)}" for type_ in types]
        return InServer(names, statement_executions(names, statement))

    @staticmethod
    def for_table(relation: str, columns: Sequence[Column], *, text: bool) -> InServer:
        """Prepare for INSERT into a table's columns of what COPY would write there.

        Args:
            relation: The table's name, quoted.
            columns: The columns to write.
            text: The values are texts, to be cast as COPY parses them.

        Raises:
            Unsupported: The values are no texts, and a column is an array.
        """
        if not text and any(column.is_array for column in columns):
            raise Unsupported
        types, alone, blocks = inserts(relation, columns, text=text)
        return InServer(types, alone, blocks, text=text)

    async def run(self, scope: Scope, *parts: Part) -> Tried:
        """Try the rows of all parts, one part after another.

        Returns:
            The failures, by the rows' places in all parts together.

        Raises:
            Unsupported: The rows don't have as many values as there are columns.
        """
        verdicts, clock = scope.settings.verdicts, scope.settings.clock
        if self._codes is None or self._codes_of is not verdicts:
            self._codes, self._codes_of = _stop_codes(verdicts), verdicts
        pieces = self._pieces(parts)
        # It travels with the savepoint's message, at no round trip of its own.
        for function in dict.fromkeys(piece.function for piece in pieces):
            scope.control.push(function.ensure)
        failures: list[RowFailure] = []
        met: Sequence[Mapping[str, Any]] = ()
        at, seconds, warm = 0, 0.0, True

        def prepare(following: _Piece | None) -> tuple[Any, ...]:
            failures.extend(_failures(met, at))
            return () if following is None else self._call(following)

        _, call = await overlap(scope.flush(), partial(prepare, pieces[0]))
        for piece, following in zip(pieces, (*pieces[1:], None), strict=True):
            started = clock()
            found, next_call = await overlap(scope.conn.fetch(*call), partial(prepare, following))
            seconds += clock() - started
            warm = warm and piece.function.warm
            piece.function.warm = True
            met, at, call = found, piece.first, next_call
        failures.extend(_failures(met, at))
        return Tried(failures, seconds if warm else 0.0)

    def _pieces(self, parts: Sequence[Part]) -> list[_Piece]:
        pieces: list[_Piece] = []
        first = 0
        for rows, block in parts:
            function = self._alone if self._blocks is None or block <= 1 else self._blocks
            # Of about the same size; and no piece where there is no row.
            size = math.ceil(len(rows) / max(1, math.ceil(len(rows) / _LARGEST_PIECE))) or 1
            starts = range(0, len(rows), size)
            pieces += [_Piece(first + at, rows[at : at + size], function, block) for at in starts]
            first += len(rows)
        return pieces

    def _call(self, piece: _Piece) -> tuple[Any, ...]:
        """Return the query and its arguments.

        Raises:
            Unsupported: The rows don't have as many values as there are columns.
        """
        values = list(zip(*piece.rows, strict=True))
        if len(values) != len(self._types):
            raise Unsupported
        columns = [self._array(type_, column) for type_, column in zip(self._types, values, strict=True)]
        query = piece.function.call([type_ for type_, _ in columns])
        stop, keep = self._codes or ([], [])
        return (query, piece.block, stop, keep, *(array for _, array in columns))

    def _array(self, type_: str, values: Sequence[Any]) -> tuple[str | None, Any]:
        """Return a column's values as an argument, and the type that it is to be cast to, if any.

        As one text where the driver would send the same, else as a list: the driver looks at each element of
        a list in Python, and sends a text of all of them as it is.
        """
        if self._text:
            return type_, _array_literal(values)
        kinds = {*map(type, values)} - {_NULL}
        if kinds == {int} and type_ in _INTEGERS:
            # Only a None has letters.
            return type_, "{" + ",".join(map(str, values)).replace("None", "NULL") + "}"
        if kinds == {str} and type_ in _TEXTS:
            return type_, _array_literal(values)
        return None, list(values)


# --- arrays as texts

_NULL = type(None)
# Types, as format_type() writes them, whose Python values stand in an array's text just as they are.
_INTEGERS = frozenset({"smallint", "integer", "bigint"})
_TEXTS = frozenset({"text", "character varying"})


def _array_literal(values: Sequence[str | None]) -> str:
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
    return [RowFailure(first + row["d_index"] - 1, _error(row)) for row in found]


def _error(row: Mapping[str, Any]) -> Exception:
    """Return the error that the row would have raised, rebuilt from its fields."""
    fields = {"S": "ERROR", "V": "ERROR"}
    fields |= {letter: value for letter, value in zip(_FIELDS, tuple(row.values())[1:], strict=True) if value}
    error: Exception = asyncpg.PostgresError.new(fields)
    return error
