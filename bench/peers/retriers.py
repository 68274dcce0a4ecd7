"""tenacity and stamina around asyncpg: the whole transaction again."""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from bench.peers.bare import PASSING, attempt
from bench.peers.peer import Once, Single

__all__ = ["SINGLES"]


@asynccontextmanager
async def _tenacity(dsn: str) -> AsyncIterator[Once]:
    tenacity: Any = importlib.import_module("tenacity")
    policy = {
        "stop": tenacity.stop_after_attempt(4),
        "wait": tenacity.wait_random_exponential(multiplier=0.001, max=0.001),
        "retry": tenacity.retry_if_exception_type(PASSING),
        "reraise": True,
    }
    async with asyncpg.create_pool(dsn, min_size=1, max_size=1) as pool:

        async def once(body: str, failures: int) -> None:
            async for again in tenacity.AsyncRetrying(**policy):
                with again:
                    started = again.retry_state.attempt_number - 1
                    await attempt(pool, body, fail=started < failures)

        yield once


@asynccontextmanager
async def _stamina(dsn: str) -> AsyncIterator[Once]:
    stamina: Any = importlib.import_module("stamina")
    # Its instrumentation logs each retry where structlog is installed; here nothing is to be logged.
    stamina.instrumentation.set_on_retry_hooks([])
    policy = {"on": PASSING, "attempts": 4, "wait_initial": 0.001, "wait_max": 0.001, "wait_jitter": 0.0}
    async with asyncpg.create_pool(dsn, min_size=1, max_size=1) as pool:

        async def once(body: str, failures: int) -> None:
            async for again in stamina.retry_context(**policy):
                with again:
                    await attempt(pool, body, fail=again.num - 1 < failures)

        yield once


SINGLES = (
    Single(
        name="tenacity around asyncpg",
        role="peer",
        note="AsyncRetrying around a transaction with SET LOCAL twice",
        open=_tenacity,
        needs=("tenacity",),
    ),
    Single(
        name="stamina around asyncpg",
        role="peer",
        note="retry_context around a transaction with SET LOCAL twice; its hooks are off",
        open=_stamina,
        needs=("stamina",),
    ),
)
