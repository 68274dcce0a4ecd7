"""Pools and engines for tests, whose connections are all back at the end of a test, or it fails."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import asyncpg

from dbop_raw import Engine
from dbop_raw.testing import FaultProxy, Server

__all__ = ["Holding", "behind", "engine_on", "pool_on"]


@asynccontextmanager
async def pool_on(
    dsn: str, *, min_size: int = 0, max_size: int, **options: Any
) -> AsyncIterator[asyncpg.Pool]:
    """Give a pool, and fail unless every connection is back at the end of the block."""
    pool = await asyncpg.create_pool(dsn, min_size=min_size, max_size=max_size, **options)
    try:
        yield pool
        with anyio.fail_after(5):
            await pool.close()
    finally:
        pool.terminate()


@asynccontextmanager
async def engine_on(dsn: str, *, max_size: int = 3, **options: Any) -> AsyncIterator[Engine]:
    """Give an engine with a pool of its own, which opens connections as they are needed.

    Args:
        dsn: Where to.
        max_size: How many connections at most.
        options: Any others of :meth:`Engine.open`.

    """
    async with Engine.open(dsn, **({"min_size": 0, "max_size": max_size} | options)) as engine:
        yield engine


class Holding:
    """Hold `count` connections of the pool, past the engine."""

    def __init__(self, pool: asyncpg.Pool, count: int) -> None:
        self.pool, self.count = pool, count
        self.held: list[Any] = []

    async def __aenter__(self) -> list[Any]:
        self.held = [await self.pool.acquire() for _ in range(self.count)]
        return self.held

    async def __aexit__(self, *_: object) -> None:
        for conn in self.held:
            await self.pool.release(conn)


@asynccontextmanager
async def behind(
    server: Server, dsn: str, **pool_options: Any
) -> AsyncIterator[tuple[FaultProxy, asyncpg.Pool]]:
    """Give a proxy before the server, and a pool of connections that go through it.

    Args:
        server: The server.
        dsn: A database of it.
        pool_options: For the pool, which has two connections at most otherwise.

    """
    async with FaultProxy(server.host, server.port) as proxy:
        pool = await asyncpg.create_pool(proxy.dsn(dsn), **({"min_size": 0, "max_size": 2} | pool_options))
        try:
            yield proxy, pool
            proxy.heal()
            with anyio.move_on_after(5):
                await pool.close()
        finally:
            pool.terminate()
