"""Row by row in the server.

A function in `pg_temp` that takes one array a column, and catches each row's error.

One round trip however many rows are bad, at one internal subtransaction a row (PL/pgSQL, "Trapping Errors").
It needs the TEMP privilege and PL/pgSQL. All names in it are qualified, so that no `search_path` can put
something else in their place.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import asyncpg

from dbop_raw.driver import sql
from dbop_raw.driver.underway import now, overlap
from dbop_raw.failure.sqlstate import RULES, Rule, verdict_of
from dbop_raw.session.scope import Scope

__all__ = ["Column", "InServer", "RowFailure", "Tried", "Unsupported"]


class Unsupported(Exception):
    """The server can't try these rows one by one: the way of spans is left."""


@dataclass(frozen=True, slots=True)
class RowFailure:
    """The row at `index` failed in the server, with what would have been raised."""

    index: int
    error: Exception


@dataclass(frozen=True, slots=True)
class Tried:
    """What came of rows that the server tried one by one."""

    failures: Sequence[RowFailure]
    """In order."""
    seconds: float
    """What it took, without what is done only once; 0 where that can't be told."""

    def behind(self, number: int) -> Tried:
        """The same, where `number` other rows come first."""
        return Tried([RowFailure(number + one.index, one.error) for one in self.failures], self.seconds)


@dataclass(frozen=True, slots=True)
class Column:
    """A column as the function needs it."""

    name: str
    type: str
    """As SQL writes it, of a domain the base type, and without a length.

    A cast to `varchar(3)`, or to a domain over it, would cut silently; the assignment to the column raises.
    """
    is_array: bool
    oid: int
    """The column's own type, a domain perhaps."""

    @staticmethod
    async def of_table(scope: Scope, relation: str, columns: Sequence[str]) -> list[Column]:
        """Read the columns' types; raises `Unsupported` when one is not there (COPY will say so better)."""
        await scope.flush()
        rows = await scope.conn.fetch(_COLUMNS, relation)
        found = {row["name"]: Column(row["name"], row["type"], row["is_array"], row["oid"]) for row in rows}
        if not all(name in found for name in columns):
            raise Unsupported
        return [found[name] for name in columns]


# With -1 for the length format_type says bpchar, where it would else say character, of which one is meant.
_COLUMNS = """
WITH RECURSIVE c AS (
    SELECT a.attname AS name, a.atttypid AS oid, a.atttypid AS base FROM pg_catalog.pg_attribute AS a
    WHERE a.attrelid OPERATOR(pg_catalog.=) $1::pg_catalog.text::pg_catalog.regclass
    AND a.attnum OPERATOR(pg_catalog.>) 0 AND NOT a.attisdropped
    UNION ALL
    SELECT c.name, c.oid, t.typbasetype FROM c
    JOIN pg_catalog.pg_type AS t ON t.oid OPERATOR(pg_catalog.=) c.base
    WHERE t.typtype OPERATOR(pg_catalog.=) 'd'
)
SELECT c.name::pg_catalog.text AS name, pg_catalog.format_type(c.base, -1) AS type, c.oid,
    t.typlen OPERATOR(pg_catalog.=) -1 AND t.typelem OPERATOR(pg_catalog.<>) 0 AS is_array
FROM c JOIN pg_catalog.pg_type AS t ON t.oid OPERATOR(pg_catalog.=) c.base
WHERE t.typtype OPERATOR(pg_catalog.<>) 'd'
"""

# The fields of an error that PL/pgSQL can read, and the letters that the protocol names them by. Not its
# context, which would tell of our function.
_FIELDS = (
    ("code", "RETURNED_SQLSTATE", "C"),
    ("message", "MESSAGE_TEXT", "M"),
    ("detail", "PG_EXCEPTION_DETAIL", "D"),
    ("hint", "PG_EXCEPTION_HINT", "H"),
    ("schema", "SCHEMA_NAME", "s"),
    ("tab", "TABLE_NAME", "t"),
    ("col", "COLUMN_NAME", "c"),
    ("typ", "PG_DATATYPE_NAME", "d"),
    ("con", "CONSTRAINT_NAME", "n"),
)

# Nothing here is looked up by an unqualified name. Variables begin with d_, and a column of the user's that
# is named alike wins.
_RETURNS = ", ".join(f"d_{name} pg_catalog.text" for name, _, _ in _FIELDS)
_DIAGNOSTICS = ", ".join(f"d_{name} = {item}" for name, item, _ in _FIELDS)
# An error that is no row's fault ends the call.
_STOP = """IF (SQLSTATE OPERATOR(pg_catalog.=) ANY (d_stop)
          OR pg_catalog.substr(SQLSTATE, 1, 2) OPERATOR(pg_catalog.=) ANY (d_stop))
         AND NOT SQLSTATE OPERATOR(pg_catalog.=) ANY (d_keep) THEN
        RAISE;
      END IF;"""

# One row after another: where many are bad. A loop over records, since a subscript for each value costs more.
_ALONE = """
#variable_conflict use_column
DECLARE
  d_r pg_catalog.record;
BEGIN{guard}
  FOR d_r IN SELECT d_u.* FROM ROWS FROM ({arrays}) WITH ORDINALITY AS d_u({aliases}, d_at) LOOP
    BEGIN
      {one};
    EXCEPTION WHEN OTHERS THEN
      {stop}
      GET STACKED DIAGNOSTICS {diagnostics};
      d_index := d_r.d_at;
      RETURN NEXT;
    END;
  END LOOP;
END
"""

# Blocks of rows: where few are bad. A block that fails is tried again in smaller ones, at last row by row;
# `d_calm` counts the good rows since the last bad one, and where it grows, blocks are tried again.
_BLOCKS = """
#variable_conflict use_column
DECLARE
  d_k pg_catalog.int4 := 1;
  d_n pg_catalog.int4 := COALESCE(pg_catalog.array_length(d_1, 1), 0);
  d_hi pg_catalog.int4;
  d_calm pg_catalog.int4 := 0;
BEGIN{guard}
  WHILE d_k OPERATOR(pg_catalog.<=) d_n LOOP
    d_hi := LEAST(d_k OPERATOR(pg_catalog.+) d_block OPERATOR(pg_catalog.-) 1, d_n);
    BEGIN
      IF d_hi OPERATOR(pg_catalog.=) d_k THEN
        {one};
      ELSE
        {block};
      END IF;
      d_calm := d_calm OPERATOR(pg_catalog.+) d_hi OPERATOR(pg_catalog.-) d_k OPERATOR(pg_catalog.+) 1;
      d_k := d_hi OPERATOR(pg_catalog.+) 1;
      IF d_block OPERATOR(pg_catalog.>) 1 THEN
        d_block := LEAST(d_block OPERATOR(pg_catalog.*) 2, 512);
      ELSIF d_calm OPERATOR(pg_catalog.>=) 24 THEN
        d_block := 8;
      END IF;
    EXCEPTION WHEN OTHERS THEN
      {stop}
      IF d_hi OPERATOR(pg_catalog.=) d_k THEN
        GET STACKED DIAGNOSTICS {diagnostics};
        d_index := d_k;
        RETURN NEXT;
        d_k := d_k OPERATOR(pg_catalog.+) 1;
        d_block := 1;
        d_calm := 0;
      ELSE
        d_block := d_block OPERATOR(pg_catalog./) 4;
        IF d_block OPERATOR(pg_catalog.<) 1 THEN d_block := 1; END IF;
      END IF;
    END;
  END LOOP;
END
"""

_NULL = type(None)


class _Function:
    """A function in pg_temp: how it is made, and how it is called."""

    def __init__(self, types: Sequence[str], body: str) -> None:
        arguments = ", ".join(f"d_{n} {type_}[]" for n, type_ in enumerate(types, 1))
        signature = (
            f"(d_block pg_catalog.int4, d_stop pg_catalog.text[], d_keep pg_catalog.text[], {arguments}) "
            f"RETURNS TABLE (d_index pg_catalog.int4, {_RETURNS}) LANGUAGE plpgsql AS "
        )
        self._name = "dbop_raw_" + hashlib.sha256((signature + body).encode()).hexdigest()[:16]
        # The quotes' tags depend on what they enclose, so nothing in it can have been made to end them.
        tag = f"$d_{self._name[-16:]}$"
        outer = f"$d_{self._name[-16:]}_do$"
        create = f"CREATE FUNCTION pg_temp.{self._name}{signature}{tag}{body}{tag}"
        self.ensure = (
            f"DO {outer}BEGIN IF pg_catalog.to_regproc('pg_temp.{self._name}') IS NULL THEN "
            f"EXECUTE {sql.literal(create)}; END IF; END{outer}"
        )
        """Makes it once a session: an earlier batch may have done so, or its transaction was rolled back, or
        a pooler gave us another session. Making it again each time would fill pg_proc with dead rows."""
        self.warm = False
        """Has it been called? The first call compiles it, and looks up the arrays' types."""

    def call(self, types: Sequence[str | None]) -> str:
        """The call; an array whose type is given is sent as one text, to be read as an array of that type."""
        casts = ("" if type_ is None else f"::pg_catalog.text::{type_}[]" for type_ in types)
        arrays = ", ".join(f"${n}{cast}" for n, cast in enumerate(casts, 4))
        return f"SELECT * FROM pg_temp.{self._name}($1, $2, $3, {arrays})"


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
    function: _Function
    block: int


class InServer:
    """The two ways to try rows in the server: one after another, and in blocks."""

    def __init__(
        self, types: Sequence[str], alone: str, blocks: str | None = None, *, text: bool = False
    ) -> None:
        self._types = types
        self._text = text
        self._alone = _Function(types, alone)
        self._blocks = None if blocks is None else _Function(types, blocks)
        self._codes: tuple[list[str], list[str]] | None = None
        self._codes_of: Mapping[str, Rule] | None = None

    @staticmethod
    async def for_statement(scope: Scope, statement: str) -> InServer:
        """For any one statement with parameters, executed with each row's values."""
        await scope.flush()
        prepared = await scope.conn.prepare(statement)
        types = prepared.get_parameters()
        if not types or any(type_.kind == "array" for type_ in types):
            # An array of arrays is one array of more dimensions in SQL: its rows can't differ in length.
            raise Unsupported
        names = [f"{sql.identifier(type_.schema)}.{sql.identifier(type_.name)}" for type_ in types]
        values = ", ".join(f"d_r.c{n}" for n in range(1, len(types) + 1))
        return InServer(names, _alone(len(types), f"EXECUTE {sql.literal(statement)} USING {values}"))

    @staticmethod
    def for_table(relation: str, columns: Sequence[Column], *, text: bool) -> InServer:
        """INSERT into a table's columns what COPY would write there.

        With `text`, cast from text as COPY parses it.
        """
        if not text and any(column.is_array for column in columns):
            raise Unsupported
        names = ", ".join(sql.identifier(column.name) for column in columns)
        casts = [f"::{column.type}" if text else "" for column in columns]
        # COPY writes the given value into an identity column, whatever the column's own rule.
        insert = f"INSERT INTO {relation} ({names}) OVERRIDING SYSTEM VALUE"
        guard = _guard(relation, columns) if text else ""

        def values(form: str) -> str:
            return ", ".join(form.format(n=n) + cast for n, cast in enumerate(casts, 1))

        # unnest() of several arrays is the parser's own word, and only unqualified; ROWS FROM says the same
        # with names that can't be hijacked.
        slices = ", ".join(f"pg_catalog.unnest(d_{n}[d_k:d_hi])" for n in range(1, len(columns) + 1))
        aliases = ", ".join(f"c{n}" for n in range(1, len(columns) + 1))
        blocks = _BLOCKS.format(
            guard=guard,
            one=f"{insert} VALUES ({values('d_{n}[d_k]')})",
            block=f"{insert} SELECT {values('d_u.c{n}')} FROM ROWS FROM ({slices}) AS d_u({aliases})",
            stop=_STOP,
            diagnostics=_DIAGNOSTICS,
        )
        types = ["pg_catalog.text" if text else column.type for column in columns]
        alone = _alone(len(columns), f"{insert} VALUES ({values('d_r.c{n}')})", guard)
        return InServer(types, alone, blocks, text=text)

    async def run(self, scope: Scope, *parts: Part) -> Tried:
        """Try the rows of all parts, one part after another; a failure's index is its place in all of them.

        The server gets a piece at a time: while it is at work on one, the next is written as arguments, and
        the errors of the one before are rebuilt.
        """
        if self._codes is None or self._codes_of is not scope.settings.verdicts:
            self._codes, self._codes_of = _stop_codes(scope.settings.verdicts), scope.settings.verdicts
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
            started = now()
            found, next_call = await overlap(scope.conn.fetch(*call), partial(prepare, following))
            seconds += now() - started
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
        """The query and its arguments. Raises `Unsupported` where the rows don't have the types' number."""
        values = list(zip(*piece.rows, strict=True))
        if len(values) != len(self._types):
            raise Unsupported
        columns = [self._array(type_, column) for type_, column in zip(self._types, values, strict=True)]
        query = piece.function.call([type_ for type_, _ in columns])
        stop, keep = self._codes or ([], [])
        return (query, piece.block, stop, keep, *(array for _, array in columns))

    def _array(self, type_: str, values: Sequence[Any]) -> tuple[str | None, Any]:
        """One column's values as an argument: one text where the driver would send the same, else a list.

        (The driver looks at each element of a list in Python; a text of all of them it sends as it is.)
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


# Types, as format_type() writes them, whose Python values stand in an array's text just as they are.
_INTEGERS = frozenset({"smallint", "integer", "bigint"})
_TEXTS = frozenset({"text", "character varying"})


def _alone(width: int, one: str, guard: str = "") -> str:
    """The body that executes `one` for each record `d_r`, whose fields are c1, c2 and so on."""
    numbers = range(1, width + 1)
    return _ALONE.format(
        guard=guard,
        arrays=", ".join(f"pg_catalog.unnest(d_{n})" for n in numbers),
        aliases=", ".join(f"c{n}" for n in numbers),
        one=one,
        stop=_STOP,
        diagnostics=_DIAGNOSTICS,
    )


def _guard(relation: str, columns: Sequence[Column]) -> str:
    """Raise where the columns are not of these types any more: a text cast to the old one may be changed.

    (A table that was altered, or the same batch on another database.) A code of the data's, so that it counts
    for these rows only, and the function is made anew for the next.
    """
    same = " OR ".join(
        f"(d_a.attname OPERATOR(pg_catalog.=) {sql.literal(column.name)} "
        f"AND d_a.atttypid OPERATOR(pg_catalog.=) '{column.oid}'::pg_catalog.oid)"
        for column in columns
    )
    return (
        f"\n  IF (SELECT pg_catalog.count(*) FROM pg_catalog.pg_attribute AS d_a WHERE NOT d_a.attisdropped "
        f"AND d_a.attrelid OPERATOR(pg_catalog.=) {sql.literal(relation)}::pg_catalog.regclass AND ({same})) "
        f"OPERATOR(pg_catalog.<>) {len(columns)} THEN RAISE SQLSTATE '22000'; END IF;"
    )


def _array_literal(values: Sequence[str | None]) -> str:
    """An array of texts as the server reads it (PostgreSQL, "Array Input and Output Syntax")."""
    together = "".join(filter(None, values))
    if '"' in together or "\\" in together:
        values = [None if value is None else _escape(value) for value in values]
    if None in values:
        return "{" + ",".join(["NULL" if value is None else f'"{value}"' for value in values]) + "}"
    return '{"' + '","'.join(cast("Sequence[str]", values)) + '"}' if values else "{}"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _stop_codes(overrides: Mapping[str, Rule] | None) -> tuple[list[str], list[str]]:
    """The codes and classes that are no row's fault, and the codes in such a class that are all the same.

    What a savepoint can repair stops it too: to try a row again is for the way of spans.
    """
    keys = {*RULES, *(overrides or ())}
    verdicts = {
        key: verdict_of(key if len(key) == _CODE else key + "000", overrides=overrides) for key in keys
    }
    classes = {key for key in keys if len(key) != _CODE}
    stop = {key for key in keys if verdicts[key].transient or not verdicts[key].item}
    keep = {key for key in keys - classes - stop if key[:2] in stop}
    return sorted(stop), sorted(keep)


_CODE = 5


def _failures(found: Sequence[Mapping[str, Any]], first: int) -> list[RowFailure]:
    return [RowFailure(first + row["d_index"] - 1, _error(row)) for row in found]


def _error(row: Mapping[str, Any]) -> Exception:
    """The error that the row would have raised, rebuilt from its fields."""
    fields = {"S": "ERROR", "V": "ERROR"}
    for (_, _, letter), value in zip(_FIELDS, tuple(row.values())[1:], strict=True):
        if value:
            fields[letter] = value
    error: Exception = asyncpg.PostgresError.new(fields)
    return error
