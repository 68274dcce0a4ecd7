"""An engine of one connection behind a proxy that counts round trips, on a table of events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from dbop_raw import Engine, batch, copy_into, execute_many, operation
from dbop_raw.testing import FaultProxy, Server

__all__ = ["EVENTS", "INSERT", "add_event", "counted", "warm"]

EVENTS = "CREATE TABLE events (id int PRIMARY KEY, body text NOT NULL)"
INSERT = "INSERT INTO events (id, body) VALUES ($1, $2)"


@operation
async def add_event(conn: Any, row: tuple[int, str]) -> int:
    """Insert one event and return its id."""
    found: int = await conn.fetchval(INSERT + " RETURNING id", *row)
    return found


async def _no_reset(_: Any) -> None:
    """Instead of asyncpg's reset query, which is one more round trip at each release."""


@asynccontextmanager
async def counted(
    server: Server, dsn: str, *, reset: bool = False
) -> AsyncIterator[tuple[Engine, FaultProxy]]:
    """Give an engine of one connection, which is open already, and the proxy that it goes through.

    Args:
        server: Where the proxy leads to.
        dsn: A database there.
        reset: With the pool's own reset query.
    """
    options: dict[str, Any] = {} if reset else {"reset": _no_reset}
    async with (
        FaultProxy(server.host, server.port) as proxy,
        Engine.open(proxy.dsn(dsn), min_size=1, max_size=1, **options) as engine,
    ):
        await engine.fetchval("SELECT 1")
        yield engine, proxy


async def warm(engine: Engine) -> None:
    """Let the driver prepare its statements, and look the table up: it does so once a connection."""
    await engine.run(add_event((-1, "warm")))
    await engine.run(batch(execute_many(INSERT))([(-3, "warm"), (-2, "warm")]))
    await engine.run(batch(copy_into("events", columns=("id", "body")))([(-4, "warm")]))
