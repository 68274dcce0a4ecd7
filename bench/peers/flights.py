"""The real work: flights with their foreign keys, one row in six refused by one of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from bench import flights as source
from bench.peers.work import Row, Work

__all__ = ["archive", "flights_work"]

_FLOATS = frozenset({"lat", "lon"})
_TEXTS = frozenset(
    {
        *("carrier", "name", "faa", "dst", "tzone", "tailnum", "type", "manufacturer", "model", "engine"),
        *("origin", "dest"),
    }
)


def archive() -> source.Archive | None:
    """The data, if it was fetched (`python -m bench.flights` does that)."""
    path = source.demo_folder() / f"{source.PACKAGE}-{source.VERSION}.tar.gz"
    return source.Archive(path) if path.is_file() else None


def _reader(column: str) -> Callable[[str], Any]:
    if column in _TEXTS:
        return str
    if column == "time_hour":
        return datetime.fromisoformat
    return float if column in _FLOATS else int


def _typed(columns: Sequence[str], rows: Sequence[Sequence[str | None]]) -> list[Row]:
    """Rows of Python values, of the types that the tables' columns take."""
    readers = [_reader(column) for column in columns]
    return [
        tuple(None if value is None else read(value) for read, value in zip(readers, row, strict=True))
        for row in rows
    ]


def flights_work(found: source.Archive, limit: int) -> Work:
    """The first `limit` flights, and the airlines, airports and planes that they refer to."""
    flights = found.rows("flights")
    text = list(itertools.islice(flights, limit))
    parents = {}
    for table in source.PARENTS:
        rows = found.rows(table)
        parents[table] = (rows.columns, _typed(rows.columns, list(rows)))
    known = {
        table: {row[columns.index(key)] for row in parents[table][1]}
        for table, key, columns in (
            ("airlines", "carrier", parents["airlines"][0]),
            ("airports", "faa", parents["airports"][0]),
            ("planes", "tailnum", parents["planes"][0]),
        )
    }
    typed = _typed(flights.columns, text)
    at = {name: flights.columns.index(name) for name in ("carrier", "tailnum", "origin", "dest")}

    def fits(row: Row) -> bool:
        return (
            row[at["carrier"]] in known["airlines"]
            and row[at["origin"]] in known["airports"]
            and row[at["dest"]] in known["airports"]
            and (row[at["tailnum"]] is None or row[at["tailnum"]] in known["planes"])
        )

    good = [row for row in typed if fits(row)]
    return Work(
        name=f"flights, {100 * (1 - len(good) / max(1, len(typed))):.3g} % bad",
        table="flights",
        columns=tuple(flights.columns),
        create="DROP TABLE IF EXISTS flights, planes, airports, airlines; " + source.SCHEMA,
        rows=typed,
        good=good,
        text_rows=text,
        parents=parents,
    )
