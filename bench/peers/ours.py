"""dbop_raw: a batch with each of its writers, and one operation in its pipeline."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from bench.peers.bare import CALL, LOCK_SECONDS
from bench.peers.peer import Load, Once, Single, Way
from bench.peers.work import Row, Work
from dbop_raw import (
    Engine,
    RetryPolicy,
    batch,
    chain,
    copy_into,
    copy_text,
    each,
    execute_many,
    operation,
    retry,
    timeout,
)

__all__ = ["SINGLES", "WAYS"]


def _each(work: Work) -> Any:
    @operation
    async def insert(conn: Any, row: Row) -> None:
        await conn.execute(work.insert, *row)

    return each(insert)


def _way(name: str, note: str, writer: Callable[[Work], Any], *, text: bool = False) -> Way:
    @asynccontextmanager
    async def opened(dsn: str, work: Work) -> AsyncIterator[Load]:
        # A new batch each time: it has learned nothing before.
        write: Any = batch(writer(work))
        async with Engine.open(dsn, min_size=1, max_size=1) as engine:

            async def load(rows: Sequence[Row]) -> int:
                result = await engine.run(write(rows))
                return len(result.failed)

            yield load

    return Way(name=name, role="ours", note=note, open=opened, text=text)


@asynccontextmanager
async def _single(dsn: str) -> AsyncIterator[Once]:
    policy = RetryPolicy(attempts=4, first_delay=0.001, max_delay=0.001)
    safely = chain(timeout(1.5, lock=LOCK_SECONDS), retry(policy))
    async with Engine.open(dsn, min_size=1, max_size=1) as engine:

        async def once(body: str, failures: int) -> None:
            started = 0

            async def write(conn: Any) -> None:
                nonlocal started
                started += 1
                await conn.execute(CALL, body, started <= failures)

            await engine.run(safely(write))

        yield once


WAYS = (
    _way("dbop_raw each", "batch(each(insert)): any operation an item", _each),
    _way("dbop_raw execute_many", "batch(execute_many(sql))", lambda work: execute_many(work.insert)),
    _way(
        "dbop_raw copy_into",
        "batch(copy_into(table, columns=…))",
        lambda work: copy_into(work.table, columns=work.columns),
    ),
    _way(
        "dbop_raw copy_text",
        "batch(copy_text(table, columns=…)): the rows are text",
        lambda work: copy_text(work.table, columns=work.columns),
        text=True,
    ),
)
SINGLES = (
    Single(
        name="dbop_raw",
        role="ours",
        note="engine.run(pipe(op, timeout(1.5, lock=0.5), retry(policy of four tries)))",
        open=_single,
    ),
)
