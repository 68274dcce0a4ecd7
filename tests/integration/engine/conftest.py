"""A database for each module of the engine's tests, emptied before each test, and pools on it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import anyio
import asyncpg
import pytest

from dbop_raw.testing import Server
from dbop_raw.testing.server import run_sql
from tests.support.engines import without_tls


@pytest.fixture(scope="module")
def dsn(postgres_server: Server) -> Iterator[str]:
    """Give a database with the table `t`, and one whose constraint is checked only at COMMIT."""
    dsn = postgres_server.create_database()
    run_sql(dsn, "CREATE TABLE t (n integer PRIMARY KEY)")
    run_sql(dsn, "CREATE TABLE late (n integer UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    yield without_tls(dsn)
    postgres_server.drop_database(dsn)


@pytest.fixture
async def watcher(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """Give a session that is nobody's; it has ended what an earlier test left, and emptied the tables."""
    conn = await asyncpg.connect(dsn)
    try:
        await conn.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
        await conn.execute("TRUNCATE t, late")
        yield conn
    finally:
        conn.terminate()


@pytest.fixture
async def pool(dsn: str, watcher: asyncpg.Connection) -> AsyncIterator[asyncpg.Pool]:
    """Give a pool of four connections; a test that keeps one fails here."""
    del watcher  # for the order
    async for pool in _pool(dsn, max_size=4):
        yield pool


@pytest.fixture
async def single(dsn: str, watcher: asyncpg.Connection) -> AsyncIterator[asyncpg.Pool]:
    """Give a pool of one connection; a test that keeps it fails here."""
    del watcher  # for the order
    async for pool in _pool(dsn, max_size=1):
        yield pool


async def _pool(dsn: str, *, max_size: int) -> AsyncIterator[asyncpg.Pool]:
    pool = await asyncpg.create_pool(dsn, min_size=0, max_size=max_size)
    try:
        yield pool
        with anyio.fail_after(5):
            await pool.close()
    finally:
        pool.terminate()
