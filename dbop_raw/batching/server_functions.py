"""The functions that try rows in the server, one by one: what they are made of, and how they are called.

Each stands in the session's `pg_temp`, takes one array a column, and returns the errors of the rows that
failed. They need the TEMP privilege and PL/pgSQL. Their text is made from the templates in `sql/`; what they
are for stands in `inserver.py`.

They stay as long as the session does, for to make them each time would fill the catalogs. So none depends
on what is the user's: a value of a type of his travels as text, and is cast where it is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dbop_raw.batching.sql import read
from dbop_raw.batching.writers.protocol import Unsupported
from dbop_raw.driver import sql
from dbop_raw.driver.connection import Connection
from dbop_raw.driver.remembered import has_binary_codec, has_own_codec
from dbop_raw.session.scope import Scope

__all__ = [
    "Arguments",
    "Column",
    "ServerFunction",
    "check_own_codecs",
    "inserts",
    "statement_executions",
]


# Types below are the server's own: they are never dropped, and what depends on them is nowhere kept
# (PostgreSQL, "System Catalog Initial Data", OID assignment).
_FIRST_OF_USERS = 16384
_TEXT = "pg_catalog.text"
# The types that our own arguments and results go through.
_OWN_TYPES = (25, 1009, 23)
# A function takes 100 arguments at most (FUNC_MAX_ARGS), and four of them are our own.
_MOST_ARGUMENTS = 96


@dataclass(frozen=True, slots=True)
class Column:
    """A table's column, or a statement's parameter, as the functions need it."""

    name: str
    """Empty for a parameter."""
    oid: int
    """The number of its own type, a domain perhaps."""
    base: int
    """The same without domains."""
    type: str
    """How SQL writes that, without a length.

    A cast to `varchar(3)`, or to a domain over it, would cut silently; the assignment to the column raises.
    """
    kind: str
    """`pg_type.typtype` of `base`: b for a base type, e for an enum, c for a composite …"""
    is_array: bool
    casts_otherwise: bool
    """May a cast from text give another value than the type's own input function?"""

    @staticmethod
    async def of_table(scope: Scope, relation: str, columns: Sequence[str]) -> list[Column]:
        """Read the types of a table's columns.

        Args:
            scope: Where to ask.
            relation: The table's name, quoted.
            columns: The columns' names, not quoted.

        Raises:
            Unsupported: One is not there. COPY will say so better.
        """
        found = {column.name: column for column in await _read_columns(scope, "columns_of_table", relation)}
        if not all(name in found for name in columns):
            raise Unsupported
        return [found[name] for name in columns]

    @staticmethod
    async def of_parameters(scope: Scope, types: Sequence[int]) -> list[Column]:
        """Read the types of a statement's parameters, given by their numbers."""
        return await _read_columns(scope, "parameters", "{" + ",".join(map(str, types)) + "}")

    def way(self, conn: Connection, *, copied: bool) -> Literal["array", "text"]:
        """Say how values that the driver would send one by one travel: in an array of the type, or of texts.

        Only in ways that give the server the very value that the driver would give it: through no codec of
        the user's, and with no type of the user's among a function's arguments.

        Args:
            conn: Whose codecs count.
            copied: Would the driver send them by COPY, which is always binary?

        Raises:
            Unsupported: There is no such way.
        """
        if self.is_array or has_own_codec(conn, self.oid) or has_own_codec(conn, self.base):
            raise Unsupported
        binary = has_binary_codec(conn, self.base)
        if binary and self.base < _FIRST_OF_USERS:
            return "array"
        # The driver sends an enum's label as it is; and of what it knows no binary form of, the text.
        as_text = self.kind == "e" or (self.kind == "b" and not binary and not copied)
        if as_text and not self.casts_otherwise:
            return "text"
        raise Unsupported


async def _read_columns(scope: Scope, source: str, argument: str) -> list[Column]:
    check_own_codecs(scope.conn)
    await scope.flush()
    rows = await scope.conn.fetch(read("column_types").format(source=read(source)), argument)
    return [Column(*row.values()) for row in rows]


def check_own_codecs(conn: Connection) -> None:
    """Raise `Unsupported` where what is our own would go through a codec of the user's."""
    if any(has_own_codec(conn, oid) for oid in _OWN_TYPES):
        raise Unsupported


class Arguments:
    """How the columns' values are given to a function: an array each, or, of many columns, an array a type.

    Args:
        types: The types of the columns' elements, as SQL writes them.
    """

    def __init__(self, types: Sequence[str]) -> None:
        self.merged = len(types) > _MOST_ARGUMENTS
        self.types = [*dict.fromkeys(types)] if self.merged else [*types]
        """Of the arrays' elements."""
        self.columns = [
            [place for place, of_column in enumerate(types) if of_column == type_] for type_ in self.types
        ]
        """Which columns each array holds, one after another."""
        if not self.merged:
            self.columns = [[place] for place in range(len(types))]
        self._arrays = [""] * len(types)
        for number, places in enumerate(self.columns, 1):
            for nth, place in enumerate(places):
                self._arrays[place] = self._part(number, nth) if self.merged else f"d_{number}"

    @staticmethod
    def _part(number: int, nth: int) -> str:
        """The values of the nth column in an array, from 0."""
        start = f"{nth} OPERATOR(pg_catalog.*) d_count OPERATOR(pg_catalog.+) 1"
        return f"d_{number}[{start}:{nth + 1} OPERATOR(pg_catalog.*) d_count]"

    @property
    def declared(self) -> str:
        """As the function's arguments."""
        return ", ".join(f"d_{n} {type_}[]" for n, type_ in enumerate(self.types, 1))

    @property
    def unnested(self) -> str:
        """All columns, for `ROWS FROM (…)`."""
        # unnest() of several arrays is the parser's own word, and only unqualified; ROWS FROM says the same
        # with names that can't be hijacked.
        return ", ".join(f"pg_catalog.unnest({array})" for array in self._arrays)


class ServerFunction:
    """A function in pg_temp: how it is made, and how it is called.

    Args:
        arguments: What it is given.
        body: Its PL/pgSQL.
    """

    def __init__(self, arguments: Arguments, body: str) -> None:
        self.arguments = arguments
        template = read("function")
        unnamed = template.format(name="", arguments=arguments.declared, body=body, tag="")
        # The name and the quotes' tags depend on what they enclose. So a name means one text in all sessions,
        # and nothing in the text can have been made to end the quotes.
        digest = hashlib.sha256(unnamed.encode()).hexdigest()[:16]
        self._name = f"dbop_raw_{digest}"
        create = template.format(
            name=self._name, arguments=arguments.declared, body=body, tag=f"$d_{digest}$"
        )
        self.ensure = read("ensure_function").format(
            name=self._name, create=sql.literal(create), tag=f"$d_{digest}_do$"
        )
        """SQL that makes it where the session has none."""
        self.warm = False
        """Has it been called? The first call compiles it, and looks up the arrays' types."""

    def call(self, types: Sequence[str | None]) -> str:
        """Return the query that calls it; an array whose type is given is one text, read as such an array."""
        casts = ("" if type_ is None else f"::{_TEXT}::{type_}[]" for type_ in types)
        arrays = ", ".join(f"${n}{cast}" for n, cast in enumerate(casts, 5))
        return f"SELECT * FROM pg_temp.{self._name}($1, $2, $3, $4, {arrays})"


def statement_executions(columns: Sequence[Column], ways: Sequence[str], statement: str) -> ServerFunction:
    """Make the function that executes `statement` with each row's values, one row after another.

    Args:
        columns: The statement's parameters.
        ways: How each travels, as `Column.way` says.
        statement: The user's SQL.
    """
    values = ", ".join(_value(f"d_row.c{n}", *of) for n, of in enumerate(zip(columns, ways, strict=True), 1))
    arguments = Arguments(_array_types(columns, ways))
    body = _rows_alone(arguments, len(columns), f"EXECUTE {sql.literal(statement)} USING {values}")
    return ServerFunction(arguments, body)


def inserts(
    relation: str, columns: Sequence[Column], ways: Sequence[str]
) -> tuple[ServerFunction, ServerFunction | None]:
    """Make the functions that insert what COPY would write.

    Args:
        relation: The table's name, quoted.
        columns: The columns to write.
        ways: How the values of each travel, as `Column.way` says.

    Returns:
        The function that tries one row after another; and the one that tries blocks, if the columns are not
        too many for that.
    """
    count = len(columns)
    arguments = Arguments(_array_types(columns, ways))
    # COPY writes the given value into an identity column, whatever the column's own rule.
    insert = (
        f"INSERT INTO {relation} ({', '.join(sql.identifier(column.name) for column in columns)}) "
        "OVERRIDING SYSTEM VALUE"
    )
    guard = _unchanged(relation, columns)

    def values(form: str) -> str:
        of_columns = enumerate(zip(columns, ways, strict=True), 1)
        return ", ".join(_value(form.format(n=n), column, way) for n, (column, way) in of_columns)

    alone = ServerFunction(
        arguments,
        _rows_alone(arguments, count, f"{insert} VALUES ({values('d_row.c{n}')})", guard, _COUNT_ROW),
    )
    if arguments.merged:
        return alone, None
    slices = ", ".join(f"pg_catalog.unnest(d_{n}[d_first:d_last])" for n in range(1, count + 1))
    blocks = read("rows_in_blocks").format(
        guard=guard,
        write_row=f"{insert} VALUES ({values('d_{n}[d_first]')})",
        write_block=(
            f"{insert} SELECT {values('d_rows.c{n}')} FROM ROWS FROM ({slices}) AS d_rows({_names(count)})"
        ),
        stop_or_go_on=read("stop_or_go_on"),
        read_error=read("read_error"),
        read_dropped=read("read_dropped"),
    )
    return alone, ServerFunction(arguments, blocks)


def _unchanged(relation: str, columns: Sequence[Column]) -> str:
    same = " OR ".join(
        f"(d_a.attname OPERATOR(pg_catalog.=) {sql.literal(column.name)} "
        f"AND d_a.atttypid OPERATOR(pg_catalog.=) '{column.oid}'::pg_catalog.oid)"
        for column in columns
    )
    return read("table_unchanged").format(relation=sql.literal(relation), same=same, number=len(columns))


# INSERT … VALUES writes one row, or none where a trigger dropped it.
_COUNT_ROW = "IF NOT FOUND THEN d_dropped := d_dropped OPERATOR(pg_catalog.+) 1; END IF;"


def _array_types(columns: Sequence[Column], ways: Sequence[str]) -> list[str]:
    return [_TEXT if way == "text" else column.type for column, way in zip(columns, ways, strict=True)]


def _value(place: str, column: Column, way: str) -> str:
    return f"{place}::{column.type}" if way == "text" else place


def _rows_alone(
    arguments: Arguments, width: int, write_row: str, guard: str = "", count_row: str = ""
) -> str:
    return read("rows_alone").format(
        guard=guard,
        arrays=arguments.unnested,
        names=_names(width),
        write_row=write_row,
        count_row=count_row,
        stop_or_go_on=read("stop_or_go_on"),
        read_error=read("read_error"),
        read_dropped=read("read_dropped"),
    )


def _names(width: int) -> str:
    return ", ".join(f"c{n}" for n in range(1, width + 1))
