"""What a row may be: a sequence, an asyncpg Record, or a mapping by column name where the writer has columns.

Anything else costs its own item, by name: nothing is ever written from a dict's keys or a set's order.
"""

from __future__ import annotations

import collections
import types
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import asyncpg
import pytest

from dbop_raw import Batch, Engine
from dbop_raw.testing import Server
from dbop_raw.testing.server import run_sql
from tests.support.batching import COPY_WRITERS, ROW_WRITERS, make_batch, told

pytestmark = pytest.mark.anyio

COLUMNS = ("id", "body")


@pytest.fixture(scope="module")
def database(postgres_server: Server) -> Iterator[str]:
    dsn = postgres_server.create_database()
    run_sql(dsn, "CREATE TABLE item (id text PRIMARY KEY, body text CHECK (body <> 'no'))")
    yield dsn
    postgres_server.drop_database(dsn)


@pytest.fixture
async def engine(database: str) -> AsyncIterator[Engine]:
    async with Engine.open(database, min_size=0, max_size=1) as engine:
        await engine.execute("TRUNCATE item")
        yield engine


async def stored(engine: Engine) -> list[tuple[str, str | None]]:
    return [(row["id"], row["body"]) for row in await engine.fetch("SELECT id, body FROM item ORDER BY id")]


async def taught(engine: Engine, writer: str) -> Batch[Any, Any]:
    """A batch to which many rows were bad: it tries them in the server."""
    write = make_batch(writer, "item", COLUMNS)
    await engine.run(write([(f"{n:03}", "no" if n % 2 else "x") for n in range(100)]))
    await engine.execute("TRUNCATE item")
    return write


ANEW = [pytest.param(False, id="nothing known"), pytest.param(True, id="many were bad")]

MAPPINGS: dict[str, Callable[[str, str | None], Any]] = {
    "dict": lambda key, body: {"id": key, "body": body},
    "dict in another order": lambda key, body: {"body": body, "id": key},
    "OrderedDict": lambda key, body: collections.OrderedDict(body=body, id=key),
    "mapping proxy": lambda key, body: types.MappingProxyType({"body": body, "id": key}),
    "ChainMap": lambda key, body: collections.ChainMap({"body": body}, {"id": key}),
}


@pytest.mark.parametrize("known", ANEW)
@pytest.mark.parametrize("kind", MAPPINGS)
@pytest.mark.parametrize("writer", COPY_WRITERS)
async def test_a_mapping_is_written_by_column_name(
    engine: Engine, writer: str, kind: str, known: bool
) -> None:
    write = await taught(engine, writer) if known else make_batch(writer, "item", COLUMNS)
    rows = [MAPPINGS[kind](f"{n:03}", None if n % 5 == 1 else f"body {n}") for n in range(20)]
    rows[3] = MAPPINGS[kind]("003", "no")
    result = await engine.run(write(rows))
    assert told(result) == [(3, "23514")]
    assert result.failed[0].item is rows[3]
    assert await stored(engine) == [
        (f"{n:03}", None if n % 5 == 1 else f"body {n}") for n in range(20) if n != 3
    ]


@pytest.mark.parametrize("known", ANEW)
@pytest.mark.parametrize("writer", COPY_WRITERS)
async def test_mappings_sequences_and_records_may_be_mixed(engine: Engine, writer: str, known: bool) -> None:
    write = await taught(engine, writer) if known else make_batch(writer, "item", COLUMNS)
    record = await engine.fetchrow("SELECT '2' AS id, NULL::text AS body")
    rows = [{"body": "x", "id": "0"}, ("1", "y"), record, ["3", "z"], {"id": "4", "body": "no"}]
    result = await engine.run(write(rows))
    assert told(result) == [(4, "23514")]
    assert await stored(engine) == [("0", "x"), ("1", "y"), ("2", None), ("3", "z")]


@pytest.mark.parametrize("known", ANEW)
@pytest.mark.parametrize("writer", COPY_WRITERS)
async def test_a_mapping_without_a_column_costs_its_item_and_names_the_column(
    engine: Engine, writer: str, known: bool
) -> None:
    write = await taught(engine, writer) if known else make_batch(writer, "item", COLUMNS)
    rows: list[Any] = [{"id": str(n), "body": "x"} for n in range(10)]
    rows[4] = {"id": "4", "text": "x"}
    result = await engine.run(write(rows))
    assert [failed.index for failed in result.failed] == [4]
    assert "body" in str(result.failed[0].error)
    assert isinstance(result.failed[0].error, (TypeError, ValueError, KeyError))
    assert len(await stored(engine)) == 9


# What has no place for its values: no names, no order, or no values at all.
NO_ROWS: dict[str, Any] = {
    "a str": "ab",
    "bytes": b"ab",
    "a bytearray": bytearray(b"ab"),
    "a memoryview": memoryview(b"ab"),
    "a set": {"8", "9"},
    "a frozenset": frozenset({"8", "9"}),
    "keys": {"8": 1, "9": 2}.keys(),
    "a number": 7,
    "None": None,
    "an object": object(),
    "a generator": (value for value in ("8", "9")),
}


@pytest.mark.parametrize("known", ANEW)
@pytest.mark.parametrize(
    ("writer", "kind"),
    # The others have names for a dict's values.
    [*((writer, kind) for writer in ROW_WRITERS for kind in NO_ROWS), ("execute_many", "a dict")],
)
async def test_what_is_no_row_costs_its_item_a_type_error(
    engine: Engine, writer: str, kind: str, known: bool
) -> None:
    """Whatever its length: two values, as many as there are columns."""
    write = await taught(engine, writer) if known else make_batch(writer, "item", COLUMNS)
    rows: list[Any] = [(str(n), "x") for n in range(10)]
    rows[4] = {"8": 1, "9": 2} if kind == "a dict" else NO_ROWS[kind]
    result = await engine.run(write(rows))
    assert [failed.index for failed in result.failed] == [4]
    assert isinstance(result.failed[0].error, TypeError)
    assert type(rows[4]).__name__ in str(result.failed[0].error)
    assert result.failed[0].item is rows[4]
    assert await stored(engine) == [(str(n), "x") for n in range(10) if n != 4]


@pytest.mark.parametrize("known", ANEW)
@pytest.mark.parametrize("kind", ["a str", "a set", "a dict"])
@pytest.mark.parametrize("writer", ROW_WRITERS)
async def test_a_batch_of_nothing_but_no_rows_writes_nothing(
    engine: Engine, writer: str, kind: str, known: bool
) -> None:
    write = await taught(engine, writer) if known else make_batch(writer, "item", COLUMNS)
    one: Any = {"8": 1, "9": 2} if kind == "a dict" else NO_ROWS[kind]
    result = await engine.run(write([one] * 10))
    assert [failed.index for failed in result.failed] == list(range(10))
    assert await stored(engine) == []
    if kind != "a dict" or writer == "execute_many":
        assert {type(failed.error) for failed in result.failed} == {TypeError}


async def records(engine: Engine, bodies: Sequence[str | None]) -> list[asyncpg.Record]:
    found: list[asyncpg.Record] = await engine.fetch(
        "SELECT lpad((at - 1)::text, 3, '0') AS id, body "
        "FROM unnest($1::text[]) WITH ORDINALITY AS u(body, at)",
        list(bodies),
    )
    return found


@pytest.mark.parametrize("known", ANEW)
@pytest.mark.parametrize("writer", ROW_WRITERS)
async def test_records_of_the_driver_are_rows(engine: Engine, writer: str, known: bool) -> None:
    """With a NULL, with what needs escaping, and beside a row of another width, which costs itself only."""
    write = await taught(engine, writer) if known else make_batch(writer, "item", COLUMNS)
    bodies = ["x", None, "tab\tnew\nline \\ back", "no", "", None, "\\N"] * 20
    rows: list[Any] = await records(engine, bodies)
    result = await engine.run(write(rows))
    assert told(result) == [(n, "23514") for n, body in enumerate(bodies) if body == "no"]
    expected = [(f"{n:03}", body) for n, body in enumerate(bodies) if body != "no"]
    assert await stored(engine) == expected
    await engine.execute("TRUNCATE item")
    rows[7] = ("7", "x", "more")
    result = await engine.run(write(rows))
    assert [failed.index for failed in result.failed] == sorted(
        {7, *(n for n, b in enumerate(bodies) if b == "no")}
    )
    assert await stored(engine) == [row for row in expected if row[0] != "007"]


class Lazy(Sequence[Any]):
    """A sequence of the user's own, without list's methods beyond those of a Sequence."""

    def __init__(self, *values: Any) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, at: Any) -> Any:
        return self._values[at]


@pytest.mark.parametrize("known", ANEW)
@pytest.mark.parametrize("writer", ROW_WRITERS)
async def test_any_sequence_is_a_row(engine: Engine, writer: str, known: bool) -> None:
    pair = collections.namedtuple("pair", ["body", "id"])  # noqa: PYI024 - by place, whatever it is called
    write = await taught(engine, writer) if known else make_batch(writer, "item", COLUMNS)
    rows: list[Any] = [
        Lazy("0", None),
        pair("1", "x"),
        collections.deque(["2", "y"]),
        collections.UserList(["3", None]),
        Lazy("4", "no"),
    ]
    result = await engine.run(write(rows))
    assert told(result) == [(4, "23514")]
    assert await stored(engine) == [("0", None), ("1", "x"), ("2", "y"), ("3", None)]
