"""A batch beside the driver's own bulk call: over the number of items, of failures, and of workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import asyncpg

from bench import connected
from bench.command import Run
from bench.measure import Call, Case, Contender
from bench.work import Conn, Work, chunks_of, two_columns
from dbop_raw import Engine, batch, copy_into, copy_text, execute_many, ingest

BARE, OURS = "asyncpg", "dbop_raw"
Pool = Any
Pair = Callable[[Pool, Work], tuple[Call, Call]]
"""The driver's own way and ours, to write the same rows: bare the good ones only, where some are bad."""


async def _copy_text(conn: Conn, work: Work) -> None:
    """For the bare call somebody has to join the text: the plain way, without any escapes."""
    lines = ["\t".join(["\\N" if value is None else value for value in row]) for row in work.text_rows]
    text = memoryview(("\n".join(lines) + "\n").encode())
    await conn.copy_to_table(work.table, columns=work.columns, source=text, format="text")


WRITERS: Mapping[str, tuple[Callable[[Conn, Work], Awaitable[object]], Callable[[Work], Any]]] = {
    "copy_into": (
        lambda conn, work: work.copy(conn),
        lambda work: copy_into(work.table, columns=work.columns),
    ),
    "copy_text": (_copy_text, lambda work: copy_text(work.table, columns=work.columns)),
    "execute_many": (
        lambda conn, work: conn.executemany(work.insert, work.good),
        lambda work: execute_many(work.insert),
    ),
}
"""For each writer, the driver's own call beside it."""


def _written(writer: str, pool: Pool, work: Work) -> tuple[Call, Call]:
    write, make = WRITERS[writer]
    engine, ours = Engine(pool), batch(make(work))
    rows: Sequence[Any] = work.text_rows if writer == "copy_text" else work.rows

    async def bare() -> None:
        async with pool.acquire() as conn, conn.transaction():
            await write(conn, work)

    return bare, lambda: engine.run(ours(rows))


def _ingested(count: int, size: int, pool: Pool, work: Work) -> tuple[Call, Call]:
    engine, write = Engine(pool), batch(copy_into(work.table, columns=work.columns))

    async def copy_some(left: Iterator[Sequence[Any]]) -> None:
        for chunk in left:
            async with pool.acquire() as conn, conn.transaction():
                await work.copy(conn, chunk)

    async def bare() -> None:
        left = iter(chunks_of(work.rows, size))
        await asyncio.gather(*(copy_some(left) for _ in range(count)))

    return bare, lambda: ingest(engine, work.rows, write, size=size, workers=count)


def _case(
    run: Run, name: str, make: Callable[[], Work], pair: Pair, *, connections: int = 1, repeats: int = 1
) -> Case:
    @asynccontextmanager
    async def opened() -> AsyncIterator[Mapping[str, Contender]]:
        work = make()
        pool = asyncpg.create_pool(run.dsn, min_size=connections, max_size=connections)
        async with pool, connected(run.dsn) as conn:
            await work.prepare(conn)
            calls = zip((BARE, OURS), pair(pool, work), strict=True)
            yield {side: partial(work.written, conn, call, repeats=repeats) for side, call in calls}

    return Case(name=name, rounds=run.sizes.batch_rounds, open=opened, seconds=10)


def batch_cases(run: Run) -> Iterator[Case]:
    """Clean batches of each writer, from small to large; then with more and more bad rows."""
    sizes = run.sizes
    size = 100
    while size <= sizes.largest:
        for writer in WRITERS:
            # One run of a small batch says little.
            repeats = max(1, min(sizes.repeats, 10_000 // size))
            make = partial(two_columns, size, 0.0)
            yield _case(run, f"clean {writer}: {size:,}", make, partial(_written, writer), repeats=repeats)
        size *= 10
    for share in sizes.bad:
        make = partial(two_columns, sizes.rows, share)
        yield _case(run, f"failures: {100 * share:.3g} % bad", make, partial(_written, "copy_into"))


def worker_cases(run: Run) -> Iterator[Case]:
    """`ingest` with so many workers, beside so many tasks that COPY the same chunks by hand."""
    sizes = run.sizes
    for count in sizes.workers:
        make, pair = partial(two_columns, sizes.stream, 0.0), partial(_ingested, count, sizes.chunk)
        yield _case(run, f"workers: {count}", make, pair, connections=count)
