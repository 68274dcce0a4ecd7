"""The work that every contender is given: a table, rows, and which of the rows are bad."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from bench import flights
from bench.measure import Call, NotMeasured, timed
from dbop_raw.driver import sql

Conn = Any
Row = tuple[Any, ...]
State = tuple[int, str]
"""How many rows a table has, and the sum of their hashes: equal for equal rows in any order."""


@dataclass(slots=True, kw_only=True)
class Work:
    """Rows for one table, some of which its constraints refuse."""

    table: str
    columns: tuple[str, ...]
    create: str
    """SQL that makes the table, and what it refers to."""
    rows: Sequence[Row] = field(repr=False)
    text_rows: Sequence[Sequence[str | None]] = field(repr=False)
    """`rows` as a CSV would give them."""
    bad: Collection[int] = field(repr=False)
    """Where in `rows` the bad ones are."""
    parents: Mapping[str, tuple[Sequence[str], Sequence[Row]]] = field(default_factory=dict, repr=False)
    """What to fill before: columns and rows by table."""
    good: Sequence[Row] = field(init=False, repr=False)
    expected: State = (0, "0")
    """What must be in the table in the end."""

    def __post_init__(self) -> None:
        self.good = [row for place, row in enumerate(self.rows) if place not in self.bad]

    @property
    def insert(self) -> str:
        """The INSERT of one row, with a parameter for each column."""
        holes = ", ".join(f"${place}" for place in range(1, len(self.columns) + 1))
        return f"INSERT INTO {sql.identifier(self.table)} ({self.column_list}) VALUES ({holes})"

    @property
    def column_list(self) -> str:
        return ", ".join(map(sql.identifier, self.columns))

    async def prepare(self, conn: Conn) -> None:
        """Make the tables, and see what this one must be like after the work."""
        await conn.execute(self.create)
        for table, (columns, rows) in self.parents.items():
            await conn.copy_records_to_table(table, columns=columns, records=rows)
        await self.copy(conn)
        self.expected = await self._state(conn)
        await self.reset(conn)

    async def reset(self, conn: Conn) -> None:
        await conn.execute(f"TRUNCATE {sql.identifier(self.table)}")

    async def copy(self, conn: Conn, rows: Sequence[Row] | None = None) -> None:
        """COPY of good rows, of all by default: the limit of all writers, which isolates nothing."""
        records = self.good if rows is None else rows
        await conn.copy_records_to_table(self.table, columns=self.columns, records=records)

    async def check(self, conn: Conn) -> None:
        """Raise `AssertionError` unless the table holds exactly the good rows."""
        there, _ = state = await self._state(conn)
        if state != self.expected:
            raise AssertionError(
                f"wrong: the table has {there} rows, other than the {self.expected[0]} good ones"
            )

    async def written(
        self, conn: Conn, write: Call, *, count: int | None = None, repeats: int = 1
    ) -> dict[str, float]:
        """How long it takes to `write` all rows, or `count`, into the empty table, checked at the end."""
        took = used = 0.0
        for _ in range(repeats):
            await self.reset(conn)
            found = await timed(write)
            took, used = took + found["s"] / repeats, used + found["cpu s"] / repeats
        await self.check(conn)
        return {"rows/s": (len(self.rows) if count is None else count) / took, "s": took, "cpu s": used}

    async def _state(self, conn: Conn) -> State:
        row = await conn.fetchrow(
            "SELECT count(*), coalesce(sum(hashtextextended(t::text, 0)::numeric), 0)::text "
            f"FROM {sql.identifier(self.table)} AS t"
        )
        return row[0], row[1]


def named(what: str, share: float) -> str:
    """A case's name, of rows of which so large a share is bad."""
    return f"{what}, {100 * share:.3g} % bad"


def chunks_of(rows: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@functools.lru_cache(maxsize=1)
def two_columns(total: int, bad_share: float, *, seed: int = 1) -> Work:
    """`total` rows of a number and a text.

    `bad_share` of them, spread at random and never the first, are bad: some have NULL where none may be, the
    others the key of a good row before them.
    """
    rng = random.Random(seed)
    bad = set(rng.sample(range(1, total), min(total - 1, round(bad_share * total))))
    rows: list[Row] = []
    good: list[Row] = []
    for index in range(total):
        row: Row
        if index not in bad:
            row = (index, f"event {index} {rng.randrange(10**9)}")
            good.append(row)
        elif len(rows) % 2 or not good:
            row = (index, None)
        else:
            row = (rng.choice(good)[0], "a key that is there already")
        rows.append(row)
    return Work(
        table="peer_events",
        columns=("id", "body"),
        create="DROP TABLE IF EXISTS peer_events; "
        "CREATE TABLE peer_events (id bigint PRIMARY KEY, body text NOT NULL)",
        rows=rows,
        text_rows=[[None if value is None else str(value) for value in row] for row in rows],
        bad=bad,
    )


# --- flights, with their foreign keys

_FLOATS = {"lat", "lon"}
_TEXTS = set("carrier name faa dst tzone tailnum type manufacturer model engine origin dest".split())  # noqa: SIM905
_KEYS = {"carrier": "airlines", "origin": "airports", "dest": "airports", "tailnum": "planes"}


def archive() -> flights.Archive:
    """The real data, which is fetched once; `NotMeasured` where it can't be."""
    try:
        return flights.fetch(flights.demo_folder())
    except flights.Unfetchable as exc:
        raise NotMeasured(f"not measured: {exc}") from exc


def flights_work(found: flights.Archive, limit: int | None = None, every: int = 1) -> Work:
    """The first `limit` flights, of these every so many-th, and what they refer to; one in six is bad."""
    source = found.rows("flights")
    columns = tuple(source.columns)
    text = list(itertools.islice(source, 0, limit, every))
    parents = {}
    for table in flights.PARENTS:
        rows = found.rows(table)
        parents[table] = (rows.columns, _typed(rows.columns, list(rows)))
    # The key is the first column of each.
    keys = {table: {row[0] for row in rows} for table, (_, rows) in parents.items()}
    # The one that may be NULL.
    keys["planes"].add(None)
    at = [(columns.index(column), keys[table]) for column, table in _KEYS.items()]
    bad = {place for place, row in enumerate(text) if any(row[column] not in known for column, known in at)}
    return Work(
        table="flights",
        columns=columns,
        create=flights.CREATE,
        rows=_typed(columns, text),
        text_rows=text,
        bad=bad,
        parents=parents,
    )


def _typed(columns: Sequence[str], rows: Sequence[Sequence[str | None]]) -> list[Row]:
    """Rows of Python values, of the types that the tables' columns take."""
    readers = [_reader(column) for column in columns]
    return [
        tuple(None if value is None else read(value) for read, value in zip(readers, row, strict=True))
        for row in rows
    ]


def _reader(column: str) -> Callable[[str], Any]:
    if column in _TEXTS:
        return str
    if column == "time_hour":
        return datetime.fromisoformat
    return float if column in _FLOATS else int
