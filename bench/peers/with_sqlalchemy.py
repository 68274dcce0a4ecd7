"""SQLAlchemy's asyncio engine over asyncpg: `begin_nested()` a row, as its page on SAVEPOINT shows."""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from bench.peers.bare import LOCK_MS, STATEMENT_MS
from bench.peers.peer import Load, Once, Single, Way
from bench.peers.work import Row, Work

__all__ = ["SINGLES", "WAYS"]

_NEEDS = ("sqlalchemy", "greenlet")


@asynccontextmanager
async def _engine(dsn: str) -> AsyncIterator[Any]:
    asyncio_part: Any = importlib.import_module("sqlalchemy.ext.asyncio")
    engine = asyncio_part.create_async_engine(
        "postgresql+asyncpg://" + dsn.split("://", 1)[1], pool_size=1, max_overflow=0
    )
    try:
        yield engine
    finally:
        await engine.dispose()


async def _table(engine: Any, name: str) -> Any:
    sa: Any = importlib.import_module("sqlalchemy")
    metadata = sa.MetaData()
    async with engine.connect() as conn:
        await conn.run_sync(lambda sync: metadata.reflect(sync, only=[name]))
    return metadata.tables[name]


@asynccontextmanager
async def _nested(dsn: str, work: Work) -> AsyncIterator[Load]:
    sa: Any = importlib.import_module("sqlalchemy")
    async with _engine(dsn) as engine:
        insert = sa.insert(await _table(engine, work.table))

        async def load(rows: Sequence[Row]) -> int:
            failed = 0
            async with engine.begin() as conn:
                for row in rows:
                    try:
                        async with conn.begin_nested():
                            await conn.execute(insert, dict(zip(work.columns, row, strict=True)))
                    except sa.exc.DBAPIError:
                        failed += 1
            return failed

        yield load


@asynccontextmanager
async def _single(dsn: str) -> AsyncIterator[Once]:
    sa: Any = importlib.import_module("sqlalchemy")
    call = sa.text("SELECT peer_write(:body, :fail)")
    limits = [
        sa.text(f"SET LOCAL statement_timeout = {STATEMENT_MS}"),
        sa.text(f"SET LOCAL lock_timeout = {LOCK_MS}"),
    ]
    async with _engine(dsn) as engine:

        async def attempt(body: str, *, fail: bool) -> None:
            async with engine.begin() as conn:
                for limit in limits:
                    await conn.execute(limit)
                await conn.execute(call, {"body": body, "fail": fail})

        async def once(body: str, failures: int) -> None:
            for started in range(4):
                try:
                    return await attempt(body, fail=started < failures)
                except sa.exc.DBAPIError as exc:
                    if started == 3 or getattr(exc.orig, "sqlstate", None) not in {"55P03", "40P01", "40001"}:
                        raise
            return None

        yield once


WAYS = (
    Way(
        name="SQLAlchemy async begin_nested() a row",
        role="peer",
        note="engine.begin(), then begin_nested() and a Core insert() for each row",
        open=_nested,
        needs=_NEEDS,
    ),
)
SINGLES = (
    Single(
        name="SQLAlchemy async",
        role="peer",
        note="engine.begin(), SET LOCAL twice, a loop of four tries",
        open=_single,
        needs=_NEEDS,
    ),
)
