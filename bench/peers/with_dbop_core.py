"""dbop-core with its asyncpg adapter: `execute` with an attempt scope, inside an outer transaction."""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import asyncpg

from bench.peers.bare import CALL
from bench.peers.peer import Load, Once, Single, Way
from bench.peers.work import Row, Work

__all__ = ["SINGLES", "WAYS"]

_NEEDS = ("dbop-core",)


def _parts() -> tuple[Any, Any, Any]:
    """The runner, its classifier, its adapter for asyncpg."""
    core = importlib.import_module("dbop_core.core")
    adapter = importlib.import_module("dbop_core.contrib.asyncpg_adapter")
    return core, importlib.import_module("dbop_core.classify").dbapi_classifier, adapter


@asynccontextmanager
async def _rows(dsn: str, work: Work) -> AsyncIterator[Load]:
    core, classifier, adapter = _parts()
    policy = core.RetryPolicy(max_retries=3)
    conn = await asyncpg.connect(dsn)

    async def insert(row: Row) -> None:
        await conn.execute(work.insert, *row)

    scope = partial(adapter.attempt_scope_async, conn)

    async def load(rows: Sequence[Row]) -> int:
        failed = 0
        async with conn.transaction():
            for row in rows:
                try:
                    await core.execute(
                        insert, args=(row,), classifier=classifier, attempt_scope_async=scope, policy=policy
                    )
                except asyncpg.PostgresError:
                    failed += 1
        return failed

    try:
        yield load
    finally:
        await conn.close()


@asynccontextmanager
async def _single(dsn: str) -> AsyncIterator[Once]:
    core, classifier, adapter = _parts()
    policy = core.RetryPolicy(max_retries=3, initial_delay=0.001, max_delay=0.001)

    async with asyncpg.create_pool(dsn, min_size=1, max_size=1) as pool:

        async def once(body: str, failures: int) -> None:
            started = 0
            async with pool.acquire() as conn:

                async def write() -> None:
                    nonlocal started
                    started += 1
                    await conn.execute(CALL, body, started <= failures)

                await core.execute(
                    write,
                    classifier=classifier,
                    attempt_scope_async=partial(adapter.attempt_scope_async, conn),
                    # Its timeouts are whole seconds: half a second would be 0, which is none.
                    pre_attempt=partial(
                        adapter.apply_timeouts_async, conn, lock_timeout_s=1, stmt_timeout_s=1
                    ),
                    policy=policy,
                    overall_timeout_s=1.5,
                )

        yield once


WAYS = (
    Way(
        name="dbop-core with asyncpg, a row",
        role="peer",
        note="execute() with its attempt scope for each row, inside one transaction for all",
        open=_rows,
        needs=_NEEDS,
    ),
)
SINGLES = (
    Single(
        name="dbop-core with asyncpg",
        role="peer",
        note="execute() with its attempt scope, timeouts of 1 s, 1.5 s a try, four tries",
        open=_single,
        needs=_NEEDS,
    ),
)
