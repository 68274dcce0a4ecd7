"""A database with the tables of `tests.support.bodies`, and pools of it for the tests of engines."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import asyncpg
import pytest

from dbop_raw.testing import FaultProxy, Server
from dbop_raw.testing.server import run_sql
from tests.support.bodies import TABLES
from tests.support.doubt import World, world_on
from tests.support.dsn import without_tls
from tests.support.pools import pool_on
from tests.support.sessions import as_new


@pytest.fixture(scope="module")
def database(postgres_server: Server) -> Iterator[str]:
    dsn = postgres_server.create_database()
    run_sql(dsn, TABLES)
    yield without_tls(dsn)
    postgres_server.drop_database(dsn)


@pytest.fixture
async def dsn(database: str) -> str:
    """The database, with its tables as new, and with no session that an earlier test left."""
    await as_new(database)
    return database


@pytest.fixture
async def pool(dsn: str) -> AsyncIterator[asyncpg.Pool]:
    """Four connections at most; a test that keeps one fails."""
    async with pool_on(dsn, max_size=4) as pool:
        yield pool


@pytest.fixture
async def single(dsn: str) -> AsyncIterator[asyncpg.Pool]:
    """One connection, which is open."""
    async with pool_on(dsn, min_size=1, max_size=1) as pool:
        yield pool


@pytest.fixture
async def other(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """Another session."""
    conn = await asyncpg.connect(dsn)
    try:
        yield conn
    finally:
        conn.terminate()


@pytest.fixture
async def proxy(postgres_server: Server) -> AsyncIterator[FaultProxy]:
    """The network before the server."""
    async with FaultProxy(postgres_server.host, postgres_server.port) as proxy:
        yield proxy


@pytest.fixture
async def world(postgres_server: Server, dsn: str) -> AsyncIterator[World]:
    """Two connections behind a proxy, to lose the answer to a COMMIT on."""
    async with world_on(postgres_server, dsn) as world:
        yield world
