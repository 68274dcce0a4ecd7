"""What the tests of the engine share: an observer, bodies that fail on purpose, a pool behind a proxy."""

# ruff: noqa: ASYNC110 - what the server or the pool has done, only asking again can tell

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import asyncpg

from dbop_raw import Event, RetryPolicy
from dbop_raw.testing import FaultProxy, Message, Server

__all__ = [
    "QUICK",
    "Seen",
    "answer_to_commit",
    "backend",
    "behind",
    "insert",
    "raising",
    "rows",
    "sleep",
    "until",
    "without_tls",
]

QUICK = RetryPolicy(attempts=3, first_delay=0.001, max_delay=0.01)


def without_tls(dsn: str) -> str:
    """Without asyncpg's question for TLS: cut off in the middle, it leaves an error that nobody retrieves."""
    return f"{dsn}{'&' if '?' in dsn else '?'}sslmode=disable"


class Seen:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if type(event) is kind]


async def until(happened: Callable[[], Any], seconds: float = 10.0) -> None:
    """Wait until it has happened; the bound is for a test that would hang."""
    with anyio.fail_after(seconds):
        while not happened():
            await anyio.sleep(0.002)


# --- bodies


async def insert(conn: Any, n: int = 1) -> int:
    await conn.execute("INSERT INTO t VALUES ($1)", n)
    return n


async def sleep(conn: Any, seconds: float = 30.0) -> None:
    await conn.execute("SELECT pg_sleep($1)", seconds)


async def backend(conn: Any) -> int:
    pid: int = await conn.fetchval("SELECT pg_backend_pid()")
    return pid


def raising(code: str) -> Callable[[Any], Awaitable[Any]]:
    """A body that gets a server's ERROR with a code of our choice, on a connection that is well."""

    async def raises(conn: Any) -> None:
        await conn.execute(f"DO $$ BEGIN RAISE EXCEPTION 'of the test' USING ERRCODE = '{code}'; END $$")

    return raises


# --- the database, seen from outside


async def rows(pool: asyncpg.Pool) -> list[int]:
    return [row["n"] for row in await pool.fetch("SELECT n FROM t ORDER BY n")]


# --- a line that can be broken


@contextlib.asynccontextmanager
async def behind(
    server: Server, dsn: str, **pool_options: Any
) -> AsyncIterator[tuple[FaultProxy, asyncpg.Pool]]:
    """Give a proxy before the server, and a pool of connections that go through it."""
    async with FaultProxy(server.host, server.port) as proxy:
        options = {"min_size": 0, "max_size": 2} | pool_options
        pool = await asyncpg.create_pool(proxy.dsn(dsn), **options)
        try:
            yield proxy, pool
            proxy.heal()
            with anyio.move_on_after(5):
                await pool.close()
        finally:
            pool.terminate()


def answer_to_commit(message: Message) -> bool:
    return message.sender == "server" and message.type == "C" and message.body.startswith(b"COMMIT")
