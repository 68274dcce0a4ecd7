"""A batch beside the driver's own bulk call: over the number of items, of failures, and of workers."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from bench.figures import Figures, rotated
from bench.peers.work import Work, state_of, two_columns
from dbop_raw import Engine, batch, copy_into, copy_text, execute_many, ingest

__all__ = ["Pair", "failures", "items", "workers"]

Do = Callable[[], Awaitable[object]]


@dataclass(slots=True)
class Pair:
    """Ours beside the driver's own call, of the same rows (of the good ones only, where some are bad)."""

    name: str
    rows: int
    bare_seconds: Figures = field(default_factory=Figures)
    bare_cpu: Figures = field(default_factory=Figures)
    seconds: Figures = field(default_factory=Figures)
    cpu: Figures = field(default_factory=Figures)

    @property
    def python_share(self) -> float:
        """How much of our time is processor time that the driver's own call does not need."""
        return max(0.0, self.cpu.median - self.bare_cpu.median) / self.seconds.median

    @property
    def ratio(self) -> float:
        """Our time over the bare one."""
        return self.seconds.median / self.bare_seconds.median


async def items(dsn: str, sizes: Sequence[int], *, rounds: int, most_repeats: int = 20) -> list[Pair]:
    """Clean batches of each writer, from small to large."""
    pairs = []
    for size in sizes:
        work = two_columns(size, 0.0)
        for writer in ("copy_into", "copy_text", "execute_many"):
            # One run of a small batch says little.
            repeats = max(1, min(most_repeats, 10_000 // size))
            pairs.append(await _pair(dsn, work, writer, rounds=rounds, repeats=repeats))
    return pairs


async def failures(dsn: str, shares: Sequence[float], *, rows: int, rounds: int) -> list[Pair]:
    """`copy_into`, with more and more bad rows; bare: COPY of the good ones, in one call."""
    return [
        await _pair(dsn, two_columns(rows, share), "copy_into", rounds=rounds, repeats=1) for share in shares
    ]


async def workers(dsn: str, counts: Sequence[int], *, rows: int, size: int, rounds: int) -> list[Pair]:
    """`ingest` with so many workers; bare: so many tasks that COPY the same chunks."""
    work = two_columns(rows, 0.0)
    chunks = [work.rows[start : start + size] for start in range(0, rows, size)]
    pairs = []
    for count in counts:
        async with asyncpg.create_pool(dsn, min_size=count, max_size=count) as pool:
            engine, write = Engine(pool), batch(copy_into(work.table, columns=work.columns))

            async def ours(engine: Engine = engine, write: Any = write, count: int = count) -> None:
                await ingest(engine, work.rows, write, size=size, workers=count)

            async def bare(pool: asyncpg.Pool[Any] = pool, count: int = count) -> None:
                left = iter(chunks)
                await asyncio.gather(*(_copy_all(pool, work, left) for _ in range(count)))

            pair = Pair(f"{count} workers", rows)
            await _rounds(dsn, work, pair, bare, ours, rounds=rounds, repeats=1)
            pairs.append(pair)
    return pairs


async def _copy_all(pool: asyncpg.Pool[Any], work: Work, left: Any) -> None:
    for chunk in left:
        async with pool.acquire() as conn, conn.transaction():
            await conn.copy_records_to_table(work.table, columns=work.columns, records=chunk)


async def _pair(dsn: str, work: Work, writer: str, *, rounds: int, repeats: int) -> Pair:
    async with asyncpg.create_pool(dsn, min_size=1, max_size=1) as pool:
        engine = Engine(pool)
        write, rows = _ours(work, writer)

        async def ours() -> None:
            await engine.run(write(rows))

        async def bare() -> None:
            async with pool.acquire() as conn, conn.transaction():
                await _bare(conn, work, writer)

        pair = Pair(f"{writer}, {work.name}", len(work.rows))
        await _rounds(dsn, work, pair, bare, ours, rounds=rounds, repeats=repeats)
    return pair


def _ours(work: Work, writer: str) -> tuple[Any, Sequence[Any]]:
    if writer == "copy_into":
        return batch(copy_into(work.table, columns=work.columns)), work.rows
    if writer == "copy_text":
        return batch(copy_text(work.table, columns=work.columns)), work.text_rows
    return batch(execute_many(work.insert)), work.rows


async def _bare(conn: Any, work: Work, writer: str) -> None:
    """The driver's own call. For text, somebody has to join it: the plain way, without any escapes."""
    if writer == "copy_into":
        await conn.copy_records_to_table(work.table, columns=work.columns, records=work.good)
    elif writer == "copy_text":
        lines = ["\t".join(["\\N" if value is None else value for value in row]) for row in work.text_rows]
        text = memoryview(("\n".join(lines) + "\n").encode())
        await conn.copy_to_table(work.table, columns=work.columns, source=text, format="text")
    else:
        await conn.executemany(work.insert, work.good)


async def _rounds(dsn: str, work: Work, pair: Pair, bare: Do, ours: Do, *, rounds: int, repeats: int) -> None:
    """Interleaved; each run of ours is checked, and the table is emptied before each run, not counted."""
    sides = [(bare, pair.bare_seconds, pair.bare_cpu), (ours, pair.seconds, pair.cpu)]
    conn = await asyncpg.connect(dsn)
    try:
        expected = await work.prepare(conn)
        for turn in range(rounds):
            for do, seconds, cpu in rotated(sides, turn):
                took, used = 0.0, 0.0
                for _ in range(repeats):
                    await work.reset(conn)
                    elapsed, processor = await _once(do)
                    took, used = took + elapsed, used + processor
                seconds.samples.append(took / repeats)
                cpu.samples.append(used / repeats)
                state = await state_of(conn, work.table)
                if state != expected:
                    raise AssertionError(f"{pair.name}: the table has {state[0]} rows, not {expected[0]}")
    finally:
        await conn.close()


async def _once(do: Do) -> tuple[float, float]:
    gc.collect()
    cpu, started = time.process_time(), time.perf_counter()
    await do()
    return time.perf_counter() - started, time.process_time() - cpu
