"""asyncpg alone: a nested transaction a row, autocommit, and the limits that isolate nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from bench.peers.peer import Load, Once, Single, Way
from bench.peers.work import Row, Work

__all__ = ["CALL", "LOCK_MS", "LOCK_SECONDS", "PASSING", "SINGLES", "STATEMENT_MS", "WAYS", "attempt"]

Conn = Any

STATEMENT_MS, LOCK_MS, LOCK_SECONDS = 1425, 500, 0.5
CALL = "SELECT peer_write($1, $2)"
"""The one operation; its second parameter tells it to fail as a lock that is not free does."""
PASSING = (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError, asyncpg.SerializationError)


@asynccontextmanager
async def _connected(dsn: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    conn = await asyncpg.connect(dsn)
    try:
        yield conn
    finally:
        await conn.close()


@asynccontextmanager
async def nested(dsn: str, work: Work) -> AsyncIterator[Load]:
    """`async with conn.transaction()` a row, inside one for all."""
    async with _connected(dsn) as conn:

        async def load(rows: Sequence[Row]) -> int:
            failed = 0
            async with conn.transaction():
                for row in rows:
                    try:
                        async with conn.transaction():
                            await conn.execute(work.insert, *row)
                    except asyncpg.PostgresError:
                        failed += 1
            return failed

        yield load


@asynccontextmanager
async def autocommit(dsn: str, work: Work) -> AsyncIterator[Load]:
    """Each row is a transaction of its own."""
    async with _connected(dsn) as conn:

        async def load(rows: Sequence[Row]) -> int:
            failed = 0
            for row in rows:
                try:
                    await conn.execute(work.insert, *row)
                except asyncpg.PostgresError:
                    failed += 1
            return failed

        yield load


def _limit(
    write: Callable[[Conn, Work, Sequence[Row]], Awaitable[object]],
) -> Callable[[str, Work], Any]:
    @asynccontextmanager
    async def opened(dsn: str, work: Work) -> AsyncIterator[Load]:
        async with _connected(dsn) as conn:

            async def load(rows: Sequence[Row]) -> int:
                async with conn.transaction():
                    await write(conn, work, rows)
                return 0

            yield load

    return opened


async def _copy(conn: Conn, work: Work, rows: Sequence[Row]) -> None:
    await conn.copy_records_to_table(work.table, columns=work.columns, records=rows)


async def _executemany(conn: Conn, work: Work, rows: Sequence[Row]) -> None:
    await conn.executemany(work.insert, rows)


async def _one_by_one(conn: Conn, work: Work, rows: Sequence[Row]) -> None:
    for row in rows:
        await conn.execute(work.insert, *row)


WAYS = (
    Way(
        name="asyncpg COPY, good rows only",
        role="limit",
        note="copy_records_to_table of the good rows: no isolation",
        open=_limit(_copy),
        only_good=True,
    ),
    Way(
        name="asyncpg executemany, good rows only",
        role="limit",
        note="executemany of the good rows: no isolation",
        open=_limit(_executemany),
        only_good=True,
    ),
    Way(
        name="asyncpg execute a row, good rows only",
        role="limit",
        note="one execute for each good row, one transaction: no isolation",
        open=_limit(_one_by_one),
        only_good=True,
    ),
    Way(
        name="asyncpg nested transaction a row",
        role="peer",
        note="async with conn.transaction() for each row, inside one for all",
        open=nested,
    ),
    Way(
        name="asyncpg autocommit a row",
        role="peer",
        note="each row a transaction of its own: not atomic",
        open=autocommit,
    ),
)


# --- one operation


async def attempt(pool: Any, body: str, *, fail: bool) -> None:
    """One try by hand: a transaction, both timeouts, the operation."""
    async with pool.acquire() as conn, conn.transaction():
        await conn.execute(f"SET LOCAL statement_timeout = {STATEMENT_MS}")
        await conn.execute(f"SET LOCAL lock_timeout = {LOCK_MS}")
        await conn.execute(CALL, body, fail)


@asynccontextmanager
async def _by_hand(dsn: str) -> AsyncIterator[Once]:
    async with asyncpg.create_pool(dsn, min_size=1, max_size=1) as pool:

        async def once(body: str, failures: int) -> None:
            for started in range(4):
                try:
                    return await attempt(pool, body, fail=started < failures)
                except PASSING:
                    if started == 3:
                        raise
            return None

        yield once


@asynccontextmanager
async def _bare(dsn: str) -> AsyncIterator[Once]:
    async with asyncpg.create_pool(dsn, min_size=1, max_size=1) as pool:

        async def once(body: str, failures: int) -> None:
            del failures
            await pool.execute(CALL, body, False)  # noqa: FBT003 - a parameter of the statement

        yield once


SINGLES = (
    Single(
        name="asyncpg pool.execute",
        role="limit",
        note="autocommit, no timeouts, no retry",
        open=_bare,
        retries=False,
    ),
    Single(
        name="asyncpg by hand",
        role="peer",
        note="conn.transaction(), SET LOCAL twice, a loop of four tries",
        open=_by_hand,
    ),
)
