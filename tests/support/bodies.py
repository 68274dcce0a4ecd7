"""Bodies of operations, and the tables that they write: what the tests of engines run.

``t (n integer PRIMARY KEY)`` is empty when a test begins; ``counter (n, hits)`` has the rows 1 and 2 without
hits; ``late (n)`` is empty, and unique only at COMMIT.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg

from dbop_raw import operation

__all__ = ["AS_NEW", "TABLES", "Body", "Starts", "add", "hit", "hits", "insert", "rows", "sleep", "then"]

TABLES = """
DO $$ BEGIN
    CREATE TABLE t (n integer PRIMARY KEY);
    CREATE TABLE counter (n integer PRIMARY KEY, hits integer NOT NULL DEFAULT 0);
    CREATE TABLE late (n integer CONSTRAINT only_once UNIQUE DEFERRABLE INITIALLY DEFERRED);
END $$
"""
AS_NEW = "TRUNCATE t, counter, late; INSERT INTO counter (n) VALUES (1), (2)"

Body = Callable[..., Awaitable[Any]]


async def insert(conn: Any, n: int = 1) -> int:
    """Write the row `n` of ``t``."""
    await conn.execute("INSERT INTO t VALUES ($1)", n)
    return n


add = operation(insert)
"""The same as an operation: ``add(1)``."""


async def rows(pool: asyncpg.Pool) -> list[int]:
    """Return the committed rows of ``t``, in order."""
    return [row["n"] for row in await pool.fetch("SELECT n FROM t ORDER BY n")]


async def hit(conn: Any, n: int = 1) -> None:
    """Count one for the row `n` of ``counter``, which locks it."""
    await conn.execute("UPDATE counter SET hits = hits + 1 WHERE n = $1", n)


async def hits(pool: asyncpg.Pool, n: int = 1) -> int:
    """Return what is counted for the row `n` of ``counter``."""
    found: int = await pool.fetchval("SELECT hits FROM counter WHERE n = $1", n)
    return found


async def sleep(conn: Any, seconds: float = 30.0) -> None:
    """Let the server sleep."""
    await conn.execute("SELECT pg_sleep($1)", seconds)


def then(*bodies: Body) -> Body:
    """Return a body that runs these, one after another."""

    async def one_after_another(conn: Any) -> None:
        for body in bodies:
            await body(conn)

    return one_after_another


class Starts:
    """A body that calls another one, and keeps in which transaction and on which connection each start was.

    Attributes:
        transactions: The time at which the transaction of each start began, which tells it from others.
        backends: The server's process of each start.

    """

    def __init__(self, body: Body) -> None:
        self.transactions: list[str] = []
        self.backends: list[int] = []
        self._body = body

    async def __call__(self, conn: Any) -> Any:
        if conn.is_in_transaction():
            self.transactions.append(await conn.fetchval("SELECT now()::text"))
        # Known without a statement: under autocommit one that is done would not be done again.
        self.backends.append(conn.get_server_pid())
        return await self._body(conn)
