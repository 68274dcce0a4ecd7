"""Ways to do one operation with timeouts and retry: the limit that has neither, the peers, ours."""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import asyncpg

from bench.measure import Way
from bench.single import CALL, Once
from dbop_raw import Engine, RetryPolicy, chain, retry, timeout

_ATTEMPTS = 4
_LIMITS = ("SET LOCAL statement_timeout = 1425", "SET LOCAL lock_timeout = 500")
_LOOP = "SET LOCAL twice, a loop of four attempts"
_PAUSE = 0.001
"""Seconds: the longest between two attempts."""


def _passes(exc: BaseException) -> bool:
    """Whether it may do next time: a lock that was not free, a deadlock, a serialization failure."""
    return getattr(getattr(exc, "orig", exc), "sqlstate", None) in {"55P03", "40P01", "40001"}


async def _by_hand(attempt: Callable[[str, bool], Awaitable[object]], body: str, failures: int) -> None:
    """The loop that one writes where the library has no retry."""
    for started in range(_ATTEMPTS):
        try:
            await attempt(body, started < failures)
        except Exception as exc:
            if started == _ATTEMPTS - 1 or not _passes(exc):
                raise
        else:
            return


async def _attempt(pool: Any, body: str, fail: bool) -> None:
    async with pool.acquire() as conn, conn.transaction():
        for limit in _LIMITS:
            await conn.execute(limit)
        await conn.execute(CALL, body, fail)


def _asyncpg(make: Callable[[Any], Once]) -> Any:
    @asynccontextmanager
    async def opened(dsn: str) -> AsyncIterator[Once]:
        async with asyncpg.create_pool(dsn, min_size=1, max_size=1) as pool:
            yield make(pool)

    return opened


def _bare(pool: Any) -> Once:
    # The False is a parameter of the statement.
    return lambda body, _: pool.execute(CALL, body, False)  # noqa: FBT003


def _plain(pool: Any) -> Once:
    return partial(_by_hand, partial(_attempt, pool))


def _tenacity(pool: Any) -> Once:
    tenacity: Any = importlib.import_module("tenacity")
    policy = {
        "stop": tenacity.stop_after_attempt(_ATTEMPTS),
        "wait": tenacity.wait_random_exponential(multiplier=_PAUSE, max=_PAUSE),
        "retry": tenacity.retry_if_exception(_passes),
        "reraise": True,
    }

    async def once(body: str, failures: int) -> None:
        async for again in tenacity.AsyncRetrying(**policy):
            with again:
                await _attempt(pool, body, again.retry_state.attempt_number <= failures)

    return once


def _stamina(pool: Any) -> Once:
    stamina: Any = importlib.import_module("stamina")
    # Its instrumentation logs each retry where structlog is installed; here nothing is to be logged.
    stamina.instrumentation.set_on_retry_hooks([])
    policy = {
        "on": _passes,
        "attempts": _ATTEMPTS,
        "wait_initial": _PAUSE,
        "wait_max": _PAUSE,
        "wait_jitter": 0.0,
    }

    async def once(body: str, failures: int) -> None:
        async for again in stamina.retry_context(**policy):
            with again:
                await _attempt(pool, body, again.num <= failures)

    return once


def _dbop_core(pool: Any) -> Once:
    core: Any = importlib.import_module("dbop_core.core")
    adapter: Any = importlib.import_module("dbop_core.contrib.asyncpg_adapter")
    how = {
        "classifier": importlib.import_module("dbop_core.classify").dbapi_classifier,
        "policy": core.RetryPolicy(max_retries=_ATTEMPTS - 1, initial_delay=_PAUSE, max_delay=_PAUSE),
        "overall_timeout_s": 1.5,
    }
    # Its timeouts are whole seconds: half a second would be 0, which is none.
    limits = {"lock_timeout_s": 1, "stmt_timeout_s": 1}

    async def once(body: str, failures: int) -> None:
        started = 0
        async with pool.acquire() as conn:

            async def write() -> None:
                nonlocal started
                started += 1
                await conn.execute(CALL, body, started <= failures)

            await core.execute(
                write,
                attempt_scope_async=partial(adapter.attempt_scope_async, conn),
                pre_attempt=partial(adapter.apply_timeouts_async, conn, **limits),
                **how,
            )

    return once


@asynccontextmanager
async def _sqlalchemy(dsn: str) -> AsyncIterator[Once]:
    sa: Any = importlib.import_module("sqlalchemy")
    asyncio_part: Any = importlib.import_module("sqlalchemy.ext.asyncio")
    call, limits = sa.text("SELECT single_write(:body, :fail)"), [sa.text(limit) for limit in _LIMITS]
    url = "postgresql+asyncpg://" + dsn.split("://", 1)[1]
    engine = asyncio_part.create_async_engine(url, pool_size=1, max_overflow=0)

    async def attempt(body: str, fail: bool) -> None:
        async with engine.begin() as conn:
            for limit in limits:
                await conn.execute(limit)
            await conn.execute(call, {"body": body, "fail": fail})

    try:
        yield partial(_by_hand, attempt)
    finally:
        await engine.dispose()


@asynccontextmanager
async def _psycopg(dsn: str) -> AsyncIterator[Once]:
    pools: Any = importlib.import_module("psycopg_pool")
    async with pools.AsyncConnectionPool(dsn, min_size=1, max_size=1, open=False) as pool:

        async def attempt(body: str, fail: bool) -> None:
            async with pool.connection() as conn:
                for limit in _LIMITS:
                    await conn.execute(limit)
                await conn.execute("SELECT single_write(%s, %s)", (body, fail))

        yield partial(_by_hand, attempt)


@asynccontextmanager
async def _ours(dsn: str) -> AsyncIterator[Once]:
    policy = RetryPolicy(attempts=_ATTEMPTS, first_delay=_PAUSE, max_delay=_PAUSE)
    safely = chain(timeout(1.5, lock=0.5), retry(policy))
    async with Engine.open(dsn, min_size=1, max_size=1) as engine:

        async def once(body: str, failures: int) -> None:
            started = 0

            async def write(conn: Any) -> None:
                nonlocal started
                started += 1
                await conn.execute(CALL, body, started <= failures)

            await engine.run(safely(write))

        yield once


SINGLES = (
    Way("asyncpg pool.execute", "autocommit, no timeouts, no retry", _asyncpg(_bare), limit=True),
    Way("asyncpg by hand", f"conn.transaction(), {_LOOP}", _asyncpg(_plain)),
    Way(
        "tenacity around asyncpg",
        "AsyncRetrying around a transaction with SET LOCAL twice",
        _asyncpg(_tenacity),
        ("tenacity",),
    ),
    Way(
        "stamina around asyncpg",
        "retry_context around a transaction with SET LOCAL twice; its hooks are off",
        _asyncpg(_stamina),
        ("stamina",),
    ),
    Way("SQLAlchemy async", f"engine.begin(), {_LOOP}", _sqlalchemy, ("sqlalchemy", "greenlet")),
    Way("psycopg 3", f"AsyncConnectionPool.connection(), {_LOOP}", _psycopg, ("psycopg", "psycopg-pool")),
    Way(
        "dbop-core with asyncpg",
        "execute() with its attempt scope, timeouts of 1 s, 1.5 s an attempt, four attempts",
        _asyncpg(_dbop_core),
        ("dbop-core",),
    ),
    Way("dbop_raw", "engine.run(pipe(op, timeout(1.5, lock=0.5), retry(policy of four attempts)))", _ours),
)
