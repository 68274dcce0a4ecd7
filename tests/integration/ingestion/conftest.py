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
    tasks = _running()
    async with engine_on(database) as engine:
        await engine.execute("TRUNCATE item; DROP TABLE IF EXISTS dbop_raw_ledger")
        yield engine
        assert engine.stats().in_use == 0, "a connection was not given back"
        assert engine.stats().waiting == 0
    assert _running() <= tasks, "a task was left running"


@pytest.fixture
async def unheard() -> AsyncIterator[list[dict[str, Any]]]:
    """What the event loop's exception handler is told."""
    said: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: said.append(context))
    yield said
    loop.set_exception_handler(None)


def _running() -> set[asyncio.Task[Any]]:
    """The tasks that are not of the test's own making."""
    return {task for task in asyncio.all_tasks() if "TestRunner" not in repr(task.get_coro())}
