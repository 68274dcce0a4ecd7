"""The workload: each way to write that the library has, run under faults and entered in the books."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import anyio

from dbop_raw import (
    BatchResult,
    Engine,
    Operation,
    RetryPolicy,
    batch,
    copy_into,
    each,
    execute_many,
    ingest,
    operation,
    pipe,
    retry,
    savepoint,
    timeout,
)
from tests.support.soak.checker import Books, Group, Row

__all__ = ["INSERT", "JOBS", "How", "Job", "add"]

INSERT = "INSERT INTO t VALUES ($1, $2)"


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """What a job is run with: as the options of `Engine.run`, and a `timeout` a try; seconds."""

    retry: RetryPolicy | None = None
    resolve: bool = False
    deadline: float | None = None
    timeout: float | None = None


Job = Callable[[Engine, Books, How, random.Random], Awaitable[None]]
"""Writes some new rows and enters in the books what became of them; raises what the run raised."""


@operation
async def add(conn: Any, row: Row) -> int:
    """One row; gives its id."""
    await conn.execute(INSERT, *row)
    return row[0]


def _wrapped(op: Operation[Any], how: How) -> Operation[Any]:
    op = op if how.timeout is None else pipe(op, timeout(how.timeout))
    return op if how.retry is None else pipe(op, retry(how.retry))


async def _run(engine: Engine, op: Any, how: How) -> Any:
    return await engine.run(op, retry=how.retry, deadline=how.deadline, resolve_commit=how.resolve)


async def single(engine: Engine, books: Books, how: How, rng: random.Random) -> None:
    """One row, with a timeout and a retry where `how` has them."""
    del rng
    group = books.group()
    with books.judging(group, deadline=how.deadline):
        got = await _run(engine, _wrapped(add(group.rows[0]), how), how)
        if got != group.good[0]:
            books.surprises.append(f"single gave {got}, not {group.good[0]}")


async def nested(engine: Engine, books: Books, how: How, rng: random.Random) -> None:
    """Two rows, and between them a savepoint that fails and is rolled back."""
    del rng
    group = books.group(good=2, bad=[1])
    first, bad, last = group.rows

    async def body(conn: Any) -> None:
        await add(first)(conn)
        try:
            await savepoint(add(bad))(conn)
        except Exception as exc:
            if getattr(exc, "sqlstate", None) != "23514":
                raise
        await add(last)(conn)

    with books.judging(group, deadline=how.deadline):
        await _run(engine, body, how)


async def _batch(
    engine: Engine, books: Books, how: How, group: Group, write: Callable[[Sequence[Row]], Operation[Any]]
) -> None:
    with books.judging(group, deadline=how.deadline):
        result: BatchResult[Row, Any] = await _run(engine, write(group.rows), how)
        books.failed_are(group, [failed.index for failed in result.failed])


async def copied(engine: Engine, books: Books, how: How, rng: random.Random) -> None:
    """A batch by COPY with a bad row."""
    write = batch(copy_into("t", columns=("id", "body")), retry=how.retry)
    await _batch(engine, books, how, books.group(good=7, bad=[rng.randrange(8)]), write)


async def each_one(engine: Engine, books: Books, how: How, rng: random.Random) -> None:
    """A batch of operations, one of which fails."""
    write = batch(each(add), retry=how.retry)
    await _batch(engine, books, how, books.group(good=4, bad=[rng.randrange(5)]), write)


async def many(engine: Engine, books: Books, how: How, rng: random.Random) -> None:
    """A batch of parameters, two of which are refused."""
    bad = sorted(rng.sample(range(8), 2))
    await _batch(
        engine, books, how, books.group(good=6, bad=bad), batch(execute_many(INSERT), retry=how.retry)
    )


async def ingested(engine: Engine, books: Books, how: How, rng: random.Random) -> None:
    """A stream in three chunks, by two workers; it always looks up its COMMITs."""
    groups = [books.group(good=4, bad=[rng.randrange(5)]) for _ in range(3)]
    rows = [row for group in groups for row in group.rows]
    write = batch(copy_into("t", columns=("id", "body")), retry=how.retry)

    def bounded(items: Sequence[Sequence[Any]]) -> Operation[Any]:
        return write(items) if how.timeout is None else pipe(write(items), timeout(how.timeout))

    with books.judging(*groups, settled=False):
        policy = how.retry or RetryPolicy(attempts=1)
        report = await ingest(engine, rows, bounded, size=5, workers=2, retry=policy)
        if (report.written, report.rejected, report.finished) != (12, 3, True):
            books.surprises.append(f"ingest of 12 good and 3 bad rows told {report}")


async def plain(engine: Engine, books: Books, how: How, rng: random.Random) -> None:
    """Plain code in `engine.transaction()`: no retry."""
    del rng
    group = books.group(good=3)
    with books.judging(group, deadline=how.deadline):
        async with engine.transaction(deadline=how.deadline) as conn:
            for row in group.rows:
                await conn.execute(INSERT, *row)


async def direct(engine: Engine, books: Books, how: How, rng: random.Random) -> None:
    """One autocommitted statement: an error says nothing of its row."""
    del rng
    group = books.group()
    with books.judging(group, settled=False), anyio.fail_after(how.deadline):
        await engine.execute(INSERT, *group.rows[0])


JOBS: dict[str, Job] = {
    "single": single,
    "nested": nested,
    "copied": copied,
    "each": each_one,
    "many": many,
    "ingest": ingested,
    "plain": plain,
    "direct": direct,
}
"""All jobs, by name."""
