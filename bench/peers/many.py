"""Ways to write many rows of which some are bad: the limits that isolate nothing, the peers, ours.

Each library is used as its own documentation says, and imported when its way is opened: it may be missing.
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from functools import partial
from typing import Any

import asyncpg

from bench import connected
from bench.line import line_to
from bench.measure import Case, Contender, Way
from bench.work import Conn, Row, Work, chunks_of
from dbop_raw import Engine, batch, copy_into, copy_text, each, execute_many, operation
from dbop_raw.driver import sql

Load = Callable[[Sequence[Any]], Awaitable[int]]
"""Writes rows in one transaction, sets bad ones aside, and gives their number."""


async def _one_by_one(
    rows: Sequence[Row],
    begin: Callable[[], AbstractAsyncContextManager[Any]],
    write: Callable[[Any, Row], Awaitable[object]],
    refused: type[Exception],
) -> int:
    failed = 0
    async with begin() as transaction:
        for row in rows:
            try:
                await write(transaction, row)
            except refused:
                failed += 1
    return failed


def _asyncpg(make: Callable[[Conn, Work], Load]) -> Callable[[str, Work], AbstractAsyncContextManager[Load]]:
    @asynccontextmanager
    async def opened(dsn: str, work: Work) -> AsyncIterator[Load]:
        async with connected(dsn) as conn:
            yield make(conn, work)

    return opened


def _limit(name: str, note: str, write: Callable[[Conn, Work, Sequence[Row]], Awaitable[object]]) -> Way:
    def make(conn: Conn, work: Work) -> Load:
        async def load(rows: Sequence[Row]) -> int:
            async with conn.transaction():
                await write(conn, work, rows)
            return 0

        return load

    return Way(f"{name}, good rows only", f"{note}: no isolation", _asyncpg(make), limit=True)


async def _execute_each(conn: Conn, work: Work, rows: Sequence[Row]) -> None:
    for row in rows:
        await conn.execute(work.insert, *row)


def _nested(conn: Conn, work: Work) -> Load:
    async def write(_: object, row: Row) -> None:
        async with conn.transaction():
            await conn.execute(work.insert, *row)

    return partial(_one_by_one, begin=conn.transaction, write=write, refused=asyncpg.PostgresError)


def _autocommit(conn: Conn, work: Work) -> Load:
    def write(_: object, row: Row) -> Awaitable[object]:
        done: Awaitable[object] = conn.execute(work.insert, *row)
        return done

    return partial(_one_by_one, begin=nullcontext, write=write, refused=asyncpg.PostgresError)


def _dbop_core(conn: Conn, work: Work) -> Load:
    core: Any = importlib.import_module("dbop_core.core")
    adapter: Any = importlib.import_module("dbop_core.contrib.asyncpg_adapter")
    how = {
        "classifier": importlib.import_module("dbop_core.classify").dbapi_classifier,
        "attempt_scope_async": partial(adapter.attempt_scope_async, conn),
        "policy": core.RetryPolicy(max_retries=3),
    }

    async def insert(row: Row) -> None:
        await conn.execute(work.insert, *row)

    async def write(_: object, row: Row) -> None:
        await core.execute(insert, args=(row,), **how)

    return partial(_one_by_one, begin=conn.transaction, write=write, refused=asyncpg.PostgresError)


@asynccontextmanager
async def _sqlalchemy(dsn: str, work: Work) -> AsyncIterator[Load]:
    sa: Any = importlib.import_module("sqlalchemy")
    asyncio_part: Any = importlib.import_module("sqlalchemy.ext.asyncio")
    url = "postgresql+asyncpg://" + dsn.split("://", 1)[1]
    engine = asyncio_part.create_async_engine(url, pool_size=1, max_overflow=0)
    try:
        metadata = sa.MetaData()
        async with engine.connect() as conn:
            await conn.run_sync(lambda sync: metadata.reflect(sync, only=[work.table]))
        insert = sa.insert(metadata.tables[work.table])

        async def write(conn: Any, row: Row) -> None:
            async with conn.begin_nested():
                await conn.execute(insert, dict(zip(work.columns, row, strict=True)))

        yield partial(_one_by_one, begin=engine.begin, write=write, refused=sa.exc.DBAPIError)
    finally:
        await engine.dispose()


@asynccontextmanager
async def _psycopg(dsn: str, work: Work, *, pipeline: bool) -> AsyncIterator[Load]:
    psycopg: Any = importlib.import_module("psycopg")
    holes = ", ".join(["%s"] * len(work.columns))
    insert = f"INSERT INTO {sql.identifier(work.table)} ({work.column_list}) VALUES ({holes})"
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:

        @asynccontextmanager
        async def begin() -> AsyncIterator[Any]:
            async with AsyncExitStack() as stack:
                if pipeline:
                    await stack.enter_async_context(conn.pipeline())
                await stack.enter_async_context(conn.transaction())
                yield await stack.enter_async_context(conn.cursor())

        async def write(cursor: Any, row: Row) -> None:
            async with conn.transaction():
                await cursor.execute(insert, row)

        yield partial(_one_by_one, begin=begin, write=write, refused=psycopg.Error)


def _ours(name: str, note: str, writer: Callable[[Work], Any], *, text: bool = False) -> Way:
    @asynccontextmanager
    async def opened(dsn: str, work: Work) -> AsyncIterator[Load]:
        # A new batch each time: it has learned nothing before.
        write: Any = batch(writer(work))
        async with Engine.open(dsn, min_size=1, max_size=1) as engine:

            async def load(rows: Sequence[Row]) -> int:
                result = await engine.run(write(rows))
                return len(result.failed)

            yield load

    return Way(f"dbop_raw {name}", note, opened, text=text)


def _to_table(writer: Callable[..., Any]) -> Callable[[Work], Any]:
    return lambda work: writer(work.table, columns=work.columns)


def _each(work: Work) -> Any:
    @operation
    async def insert(conn: Any, row: Row) -> None:
        await conn.execute(work.insert, *row)

    return each(insert)


LIMIT = "asyncpg COPY, good rows only"
"""What all rates are held against: nothing is isolated, so nobody can be as fast."""
_INSIDE = "for each row, inside one for all"
WAYS = (
    _limit(
        "asyncpg COPY",
        "copy_records_to_table of the good rows",
        lambda conn, work, rows: work.copy(conn, rows),
    ),
    _limit(
        "asyncpg executemany",
        "executemany of the good rows",
        lambda conn, work, rows: conn.executemany(work.insert, rows),
    ),
    _limit("asyncpg execute a row", "one execute for each good row, one transaction", _execute_each),
    Way("asyncpg nested transaction a row", f"async with conn.transaction() {_INSIDE}", _asyncpg(_nested)),
    Way("asyncpg autocommit a row", "each row a transaction of its own: not atomic", _asyncpg(_autocommit)),
    Way(
        "SQLAlchemy async begin_nested() a row",
        "engine.begin(), then begin_nested() and a Core insert() for each row",
        _sqlalchemy,
        ("sqlalchemy", "greenlet"),
    ),
    Way(
        "dbop-core with asyncpg, a row",
        "execute() with its attempt scope for each row, inside one transaction for all",
        _asyncpg(_dbop_core),
        ("dbop-core",),
    ),
    Way(
        "psycopg 3 nested transaction a row",
        f"AsyncConnection, conn.transaction() {_INSIDE}",
        partial(_psycopg, pipeline=False),
        ("psycopg",),
    ),
    Way(
        "psycopg 3 pipeline, nested transaction a row",
        "the same inside conn.pipeline()",
        partial(_psycopg, pipeline=True),
        ("psycopg",),
    ),
    _ours("each", "batch(each(insert)): any operation an item", _each),
    _ours("execute_many", "batch(execute_many(sql))", lambda work: execute_many(work.insert)),
    _ours("copy_into", "batch(copy_into(table, columns=…))", _to_table(copy_into)),
    _ours(
        "copy_text", "batch(copy_text(table, columns=…)): the rows are text", _to_table(copy_text), text=True
    ),
)


def many_case(
    name: str, dsn: str, make: Callable[[], Work], *, delay: float = 0, chunk: int, rounds: int
) -> Case:
    """All ways at one work, in transactions of `chunk` rows, on a line that is late by `delay` seconds."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[Mapping[str, Contender]]:
        work = make()
        with line_to(dsn, delay) as through:
            async with connected(dsn) as conn:
                await work.prepare(conn)
                yield {way.name: partial(write_once, conn, through, work, way, chunk) for way in WAYS}

    return Case(name=name, rounds=rounds, open=opened, seconds=40 * rounds)


async def write_once(conn: Conn, dsn: str, work: Work, way: Way, chunk: int) -> Mapping[str, float]:
    """One round of one way: connecting is not counted. The table is emptied and checked through `conn`."""
    way.require()
    # A rate counts bad rows too, so that the ways can be compared; the limits are given the good ones.
    rows: Sequence[Any] = work.good if way.limit else work.text_rows if way.text else work.rows
    failed = 0

    async def write() -> None:
        nonlocal failed
        for part in chunks_of(rows, chunk):
            failed += await load(part)

    async with way.open(dsn, work) as load:
        found = await work.written(conn, write, count=len(rows))
    bad = 0 if way.limit else len(work.bad)
    if failed != bad:
        raise AssertionError(f"wrong: it says that {failed} rows failed, but {bad} are bad")
    return found
