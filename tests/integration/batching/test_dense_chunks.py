"""A chunk with many bad rows stays cheap.

After any other chunk, for wide tables, for large rows. Counted, not timed.

A batch that tries rows in the server takes a handful of round trips whatever the number of rows, however many
are bad; one that looks for bad rows by halving takes several for each.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from dbop_raw import Batch, Engine
from dbop_raw.testing import FaultProxy, Server
from dbop_raw.testing.server import run_sql
from dbop_raw.testing.wire import ClientFramer
from tests.support.batching import ROW_WRITERS, as_items, make_batch, told
from tests.support.dsn import without_tls

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

SIZE = 300
FEW_ROUND_TRIPS = 30
MIB = 1024 * 1024
# A function takes 100 arguments at most (FUNC_MAX_ARGS), and three of ours may be among them.
WIDTHS = (97, 98, 101, 300)


@pytest.fixture(scope="module")
def database(postgres_server: Server) -> Iterator[str]:
    dsn = postgres_server.create_database()
    run_sql(dsn, "CREATE TABLE item (id int PRIMARY KEY, must int NOT NULL)")
    run_sql(dsn, "CREATE TABLE big (id int PRIMARY KEY, must int NOT NULL, body text)")
    for width in WIDTHS:
        columns = ", ".join(f"c{n} int" for n in range(width - 2))
        run_sql(dsn, f"CREATE TABLE wide_{width} (id int PRIMARY KEY, must int NOT NULL, {columns})")
    yield dsn
    postgres_server.drop_database(dsn)


@pytest.fixture
async def proxy(postgres_server: Server) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(postgres_server.host, postgres_server.port) as proxy:
        yield proxy


@pytest.fixture
async def engine(proxy: FaultProxy, database: str) -> AsyncIterator[Engine]:
    async with Engine.open(without_tls(proxy.dsn(database)), min_size=1, max_size=1) as engine:
        await engine.execute("TRUNCATE item, big")
        yield engine


def items(writer: str, start: int = 0, count: int = SIZE, bad_one_in: int = 3) -> list[Any]:
    rows = [(start + n, None if n % bad_one_in == 1 else n) for n in range(count)]
    return as_items(writer, rows)


BAD = [(n, "23502") for n in range(SIZE) if n % 3 == 1]


async def warmed(engine: Engine, writer: str) -> Batch[Any, Any]:
    """A batch that has learned that many rows are bad, and made what it needs for that."""
    write = make_batch(writer, "item", ("id", "must"))
    for start in (10_000, 20_000):
        assert told(await engine.run(write(items(writer, start)))) == BAD
    return write


@pytest.mark.parametrize("writer", ROW_WRITERS)
async def test_a_dense_chunk_takes_few_round_trips(engine: Engine, proxy: FaultProxy, writer: str) -> None:
    write = await warmed(engine, writer)
    proxy.reset_counts()
    assert told(await engine.run(write(items(writer)))) == BAD
    assert proxy.round_trips <= FEW_ROUND_TRIPS


# Chunks that the server can't be given for a trial of their rows.
ODD_CHUNKS: dict[str, Any] = {
    "rows too long": lambda row: (*row, "more"),
    "rows too short": lambda row: row[:1],
    "empty rows": lambda _: (),
    "rows of all widths": lambda row: row * (0, 2, 3)[int(row[0]) % 3],
    "values of another type": lambda _: (object(), object()),
    "numbers": lambda _: 7,
    "texts": lambda _: "ab",
    "mappings": lambda _: {"some": 1, "thing": 2},
    "values too large": lambda _: (2**70, 2**70),
    "unhashable values": lambda _: ([1], [2]),
    "text that is none": lambda _: ("\ud800", "\ud800"),
    "null bytes": lambda _: ("a\0", "b\0"),
}


@pytest.mark.parametrize("size", [2, 60])
@pytest.mark.parametrize("kind", ODD_CHUNKS)
@pytest.mark.parametrize("writer", ROW_WRITERS)
async def test_a_chunk_of_misfits_does_not_make_later_ones_dear(
    engine: Engine, proxy: FaultProxy, writer: str, kind: str, size: int
) -> None:
    """It costs its own items, once; what comes after it is tried in the server as before."""
    write = await warmed(engine, writer)
    odd = [ODD_CHUNKS[kind](row) for row in items(writer, 50_000, size, 10_000)]
    result = await engine.run(write(odd))
    assert [failed.index for failed in result.failed] == list(range(size))
    # One more chunk to come back by, if it has to be learned anew.
    assert told(await engine.run(write(items(writer, 60_000)))) == BAD
    proxy.reset_counts()
    assert told(await engine.run(write(items(writer)))) == BAD
    assert proxy.round_trips <= FEW_ROUND_TRIPS


@pytest.mark.parametrize("writer", ROW_WRITERS)
async def test_a_database_where_it_can_not_be_done_does_not_make_another_one_dear(
    engine: Engine, proxy: FaultProxy, database: str, writer: str
) -> None:
    """One batch object, two engines; on one of them nothing temporary may be made."""
    write = await warmed(engine, writer)
    role = "dense_" + database.rpartition("/")[2]
    run_sql(database, f"CREATE ROLE {role}")
    try:
        run_sql(database, f"REVOKE TEMP ON DATABASE {database.rpartition('/')[2]} FROM PUBLIC")
        run_sql(database, f"GRANT ALL ON item TO {role}")
        async with Engine.open(database, min_size=0, max_size=1, server_settings={"role": role}) as poor:
            assert told(await poor.run(write(items(writer, 50_000)))) == BAD
        assert told(await engine.run(write(items(writer, 60_000)))) == BAD
        proxy.reset_counts()
        assert told(await engine.run(write(items(writer)))) == BAD
        assert proxy.round_trips <= FEW_ROUND_TRIPS
    finally:
        run_sql(database, f"DROP OWNED BY {role}")
        run_sql(database, f"DROP ROLE {role}")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("writer", ROW_WRITERS)
async def test_a_dense_chunk_of_a_wide_table_takes_few_round_trips(
    engine: Engine, proxy: FaultProxy, writer: str, width: int
) -> None:
    """A table may have up to 1,600 columns."""
    columns = ("id", "must", *(f"c{n}" for n in range(width - 2)))
    table = f"wide_{width}"
    await engine.execute(f"TRUNCATE {table}")
    write = make_batch(writer, table, columns)
    for start in (10_000, 20_000, 0):
        rows: list[Any] = [
            (start + n, None if n % 3 == 1 else n, *range(n, n + width - 2)) for n in range(SIZE)
        ]
        proxy.reset_counts()
        assert told(await engine.run(write(as_items(writer, rows)))) == BAD
    assert proxy.round_trips <= FEW_ROUND_TRIPS
    # Each value is in its own column.
    last = f"c{width - 3}"
    assert await engine.fetchval(f"SELECT count(*) FROM {table} WHERE {last} <> id % 1000 + {width - 3}") == 0
    assert await engine.fetchval(f"SELECT count(*) FROM {table}") == 3 * SIZE * 2 // 3


# -------------------------------------------------------------------------------------- bounded in bytes, too


class Scales:
    """A relay before the server that weighs what the client sends."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.largest: Counter[str] = Counter()
        """The largest message of each type, in bytes."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._server.host, self._server.port)
        framer = ClientFramer()

        async def forth() -> None:
            while data := await reader.read(MIB):
                for frame in framer.feed(data):
                    self.largest[frame.type] = max(self.largest[frame.type], len(frame.raw))
                back.write(data)
                await back.drain()
            back.close()

        async def home() -> None:
            while data := await there.read(MIB):
                writer.write(data)
                await writer.drain()
            writer.close()

        with contextlib.suppress(OSError):
            await asyncio.gather(forth(), home())


@pytest.fixture
async def scales(postgres_server: Server) -> AsyncIterator[tuple[Scales, int]]:
    """And the port where it listens."""
    scales = Scales(postgres_server)
    relay = await asyncio.start_server(scales.serve, "127.0.0.1", 0)
    yield scales, relay.sockets[0].getsockname()[1]
    relay.close()


@pytest.mark.parametrize("known", [False, True], ids=["nothing known", "many were bad"])
@pytest.mark.parametrize("writer", ROW_WRITERS)
async def test_no_message_grows_with_the_number_of_large_rows(
    engine: Engine, scales: tuple[Scales, int], database: str, writer: str, known: bool
) -> None:
    """The server takes no message of 1 GB: pieces of a chunk are bounded in bytes too.

    Here 40 rows of 1 MiB, of which a third is bad: no message holds more than 16 MiB and a row.
    """
    write = make_batch(writer, "big", ("id", "must", "body"))

    def rows(count: int, body: str) -> list[Any]:
        made = [(n, None if n % 3 == 1 else n, body) for n in range(count)]
        return as_items(writer, made)

    if known:
        for _ in range(2):
            await engine.run(write(rows(1000, "x")))
            await engine.execute("TRUNCATE big")
    measured, port = scales
    async with Engine.open(
        database, host="127.0.0.1", port=port, ssl=False, min_size=0, max_size=1
    ) as weighed:
        result = await weighed.run(write(rows(40, "x" * MIB)))
    assert told(result) == [(n, "23502") for n in range(40) if n % 3 == 1]
    assert await engine.fetchval("SELECT count(*) FROM big WHERE length(body) = $1", MIB) == 27
    too_large = {kind: size for kind, size in measured.largest.items() if size > 17 * MIB + 4096}
    assert too_large == {}
    assert sum(measured.largest.values()) > 0


# ---------------------------------------------------------------------------------------------- prepared once


@pytest.mark.parametrize("bad_one_in", [3, 100])
@pytest.mark.parametrize("writer", ROW_WRITERS)
async def test_statements_are_prepared_once_a_connection_and_not_at_each_step(
    engine: Engine, proxy: FaultProxy, writer: str, bad_one_in: int
) -> None:
    """From the third chunk on, nothing is parsed that was parsed before: neither the user's SQL nor ours."""
    write = make_batch(writer, "item", ("id", "must"))
    for start in (10_000, 20_000, 30_000):
        await engine.run(write(items(writer, start, bad_one_in=bad_one_in)))
    proxy.reset_counts()
    for start in (40_000, 50_000, 60_000, 0):
        result = await engine.run(write(items(writer, start, bad_one_in=bad_one_in)))
        assert len(result.failed) == len([n for n in range(SIZE) if n % bad_one_in == 1])
    parsed = Counter(message.sql for message in proxy.messages if message.type == "P")
    assert parsed == {}
