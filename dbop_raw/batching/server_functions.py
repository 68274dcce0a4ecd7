"""The functions that try rows in the server, one by one: what they are made of, and how they are called.

Each stands in the session's `pg_temp`, takes one array a column, and returns the errors of the rows that
failed. They need the TEMP privilege and PL/pgSQL. Their text is made from the templates in `sql/`; what they
are for stands in `inserver.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from dbop_raw.batching.sql import read
from dbop_raw.batching.writers.protocol import Unsupported
from dbop_raw.driver import sql
from dbop_raw.session.scope import Scope

__all__ = ["Column", "ServerFunction", "inserts", "statement_executions"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table as the functions need it."""

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
        """Read the types of a table's columns.

        Args:
            scope: Where to ask.
            relation: The table's name, quoted.
            columns: The columns' names, not quoted.

        Raises:
            Unsupported: One is not there. COPY will say so better.
        """
        await scope.flush()
        rows = await scope.conn.fetch(read("column_types"), relation)
        found = {row["name"]: Column(row["name"], row["type"], row["is_array"], row["oid"]) for row in rows}
        if not all(name in found for name in columns):
            raise Unsupported
        return [found[name] for name in columns]


class ServerFunction:
    """A function in pg_temp: how it is made, and how it is called.

    Args:
        types: The types of the columns, as SQL writes them.
        body: Its PL/pgSQL.
    """

    def __init__(self, types: Sequence[str], body: str) -> None:
        arguments = ", ".join(f"d_{n} {type_}[]" for n, type_ in enumerate(types, 1))
        template = read("function")
        unnamed = template.format(name="", arguments=arguments, body=body, tag="")
        # The name and the quotes' tags depend on what they enclose. So a name means one text in all sessions,
        # and nothing in the text can have been made to end the quotes.
        digest = hashlib.sha256(unnamed.encode()).hexdigest()[:16]
        self._name = f"dbop_raw_{digest}"
        create = template.format(name=self._name, arguments=arguments, body=body, tag=f"$d_{digest}$")
        self.ensure = read("ensure_function").format(
            name=self._name, create=sql.literal(create), tag=f"$d_{digest}_do$"
        )
        """SQL that makes it where the session has none."""
        self.warm = False
        """Has it been called? The first call compiles it, and looks up the arrays' types."""

    def call(self, types: Sequence[str | None]) -> str:
        """Return the query that calls it; an array whose type is given is one text, read as such an array."""
        casts = ("" if type_ is None else f"::pg_catalog.text::{type_}[]" for type_ in types)
        arrays = ", ".join(f"${n}{cast}" for n, cast in enumerate(casts, 4))
        return f"SELECT * FROM pg_temp.{self._name}($1, $2, $3, {arrays})"


def statement_executions(types: Sequence[str], statement: str) -> ServerFunction:
    """Make the function that executes `statement` with each row's values, one row after another."""
    values = ", ".join(f"d_row.c{n}" for n in range(1, len(types) + 1))
    return ServerFunction(types, _rows_alone(len(types), f"EXECUTE {sql.literal(statement)} USING {values}"))


def inserts(
    relation: str, columns: Sequence[Column], *, text: bool
) -> tuple[list[str], ServerFunction, ServerFunction]:
    """Make the functions that insert what COPY would write.

    Args:
        relation: The table's name, quoted.
        columns: The columns to write.
        text: The values are texts, to be cast as COPY parses them.

    Returns:
        The types of the arrays, the function that tries one row after another, and the one that tries blocks.
    """
    numbers = range(1, len(columns) + 1)
    casts = [f"::{column.type}" if text else "" for column in columns]
    # COPY writes the given value into an identity column, whatever the column's own rule.
    insert = (
        f"INSERT INTO {relation} ({', '.join(sql.identifier(column.name) for column in columns)}) "
        "OVERRIDING SYSTEM VALUE"
    )
    guard = _columns_unchanged(relation, columns) if text else ""

    def values(form: str) -> str:
        return ", ".join(form.format(n=n) + cast for n, cast in zip(numbers, casts, strict=True))

    slices = ", ".join(f"pg_catalog.unnest(d_{n}[d_first:d_last])" for n in numbers)
    blocks = read("rows_in_blocks").format(
        guard=guard,
        write_row=f"{insert} VALUES ({values('d_{n}[d_first]')})",
        write_block=(
            f"{insert} SELECT {values('d_rows.c{n}')} FROM ROWS FROM ({slices}) AS d_rows({_names(numbers)})"
        ),
        stop_or_go_on=read("stop_or_go_on"),
        read_error=read("read_error"),
    )
    types = ["pg_catalog.text" if text else column.type for column in columns]
    alone = _rows_alone(len(columns), f"{insert} VALUES ({values('d_row.c{n}')})", guard)
    return types, ServerFunction(types, alone), ServerFunction(types, blocks)


def _rows_alone(width: int, write_row: str, guard: str = "") -> str:
    numbers = range(1, width + 1)
    # unnest() of several arrays is the parser's own word, and only unqualified; ROWS FROM says the same with
    # names that can't be hijacked.
    return read("rows_alone").format(
        guard=guard,
        arrays=", ".join(f"pg_catalog.unnest(d_{n})" for n in numbers),
        names=_names(numbers),
        write_row=write_row,
        stop_or_go_on=read("stop_or_go_on"),
        read_error=read("read_error"),
    )


def _names(numbers: range) -> str:
    return ", ".join(f"c{n}" for n in numbers)


def _columns_unchanged(relation: str, columns: Sequence[Column]) -> str:
    same = " OR ".join(
        f"(d_a.attname OPERATOR(pg_catalog.=) {sql.literal(column.name)} "
        f"AND d_a.atttypid OPERATOR(pg_catalog.=) '{column.oid}'::pg_catalog.oid)"
        for column in columns
    )
    return read("columns_unchanged").format(relation=sql.literal(relation), same=same, number=len(columns))
