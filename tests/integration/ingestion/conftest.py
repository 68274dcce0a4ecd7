"""A database with one table, and an engine that has to be idle when a test of `ingest` is over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from dbop_raw import Engine
from dbop_raw.testing import Server
from dbop_raw.testing.server import run_sql
from tests.support.ingesting import TABLES, engine_on


@pytest.fixture(scope="module")
def database(postgres_server: Server) -> Iterator[str]:
    dsn = postgres_server.create_database()
    run_sql(dsn, TABLES)
    yield dsn
    postgres_server.drop_database(dsn)


@pytest.fixture
async def engine(database: str) -> AsyncIterator[Engine]:
    async with engine_on(database) as engine:
        await engine.execute("TRUNCATE item; DROP TABLE IF EXISTS dbop_raw_ledger")
        tasks = _running()
        yield engine
        assert engine.stats().in_use == 0, "a connection was not given back"
        assert engine.stats().waiting == 0
        assert _running() <= tasks, "a task was left running"


def _running() -> set[asyncio.Task[Any]]:
    """The tasks that are neither of the test's own making, nor a connect of the engine's that nobody needed."""
    ours = ("TestRunner", "Capacity._ask")
    return {task for task in asyncio.all_tasks() if not any(one in repr(task.get_coro()) for one in ours)}
