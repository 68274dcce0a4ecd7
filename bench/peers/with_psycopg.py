"""psycopg 3, its asyncio side: nested transactions, and the same in pipeline mode."""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from bench.peers.bare import LOCK_MS, STATEMENT_MS
from bench.peers.peer import Load, Once, Single, Way
from bench.peers.work import Row, Work

__all__ = ["SINGLES", "WAYS"]

_NEEDS = ("psycopg",)


def _insert(work: Work) -> str:
    holes = ", ".join(["%s"] * len(work.columns))
    return f"INSERT INTO {work.relation} ({work.column_list}) VALUES ({holes})"


@asynccontextmanager
async def _rows(dsn: str, work: Work, *, pipeline: bool) -> AsyncIterator[Load]:
    psycopg: Any = importlib.import_module("psycopg")
    insert = _insert(work)
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:

        async def load(rows: Sequence[Row]) -> int:
            failed = 0
            async with AsyncExitStack() as stack:
                if pipeline:
                    await stack.enter_async_context(conn.pipeline())
                await stack.enter_async_context(conn.transaction())
                cursor = await stack.enter_async_context(conn.cursor())
                for row in rows:
                    try:
                        async with conn.transaction():
                            await cursor.execute(insert, row)
                    except psycopg.Error:
                        failed += 1
            return failed

        yield load


@asynccontextmanager
async def _nested(dsn: str, work: Work) -> AsyncIterator[Load]:
    async with _rows(dsn, work, pipeline=False) as load:
        yield load


@asynccontextmanager
async def _pipeline(dsn: str, work: Work) -> AsyncIterator[Load]:
    async with _rows(dsn, work, pipeline=True) as load:
        yield load


@asynccontextmanager
async def _single(dsn: str) -> AsyncIterator[Once]:
    psycopg: Any = importlib.import_module("psycopg")
    pools: Any = importlib.import_module("psycopg_pool")
    passing = (
        psycopg.errors.LockNotAvailable,
        psycopg.errors.DeadlockDetected,
        psycopg.errors.SerializationFailure,
    )
    async with pools.AsyncConnectionPool(dsn, min_size=1, max_size=1, open=False) as pool:

        async def attempt(body: str, *, fail: bool) -> None:
            async with pool.connection() as conn:
                await conn.execute(f"SET LOCAL statement_timeout = {STATEMENT_MS}")
                await conn.execute(f"SET LOCAL lock_timeout = {LOCK_MS}")
                await conn.execute("SELECT peer_write(%s, %s)", (body, fail))

        async def once(body: str, failures: int) -> None:
            for started in range(4):
                try:
                    return await attempt(body, fail=started < failures)
                except passing:
                    if started == 3:
                        raise
            return None

        yield once


WAYS = (
    Way(
        name="psycopg 3 nested transaction a row",
        role="peer",
        note="AsyncConnection, conn.transaction() for each row, inside one for all",
        open=_nested,
        needs=_NEEDS,
    ),
    Way(
        name="psycopg 3 pipeline, nested transaction a row",
        role="peer",
        note="the same inside conn.pipeline()",
        open=_pipeline,
        needs=_NEEDS,
    ),
)
SINGLES = (
    Single(
        name="psycopg 3",
        role="peer",
        note="AsyncConnectionPool.connection(), SET LOCAL twice, a loop of four tries",
        open=_single,
        needs=("psycopg", "psycopg-pool"),
    ),
)
