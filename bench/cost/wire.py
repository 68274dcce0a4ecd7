"""One operation on a real server: ours beside the same by hand over asyncpg."""

from __future__ import annotations

import gc
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from bench.figures import Figures, rotated
from dbop_raw import Engine, Event, RetryPolicy, pipe, retry, timeout

__all__ = ["BY_HAND", "OURS", "Timed", "measure_wire", "speedup"]

Call = Callable[[], Awaitable[object]]
BY_HAND = "by hand: transaction(), transaction(), SET, SET, op"
"""The same guarantees the plain way: BEGIN, SAVEPOINT, SET, SET, op, RELEASE, COMMIT, reset."""
OURS = "run + timeout + retry"
_INSERT = "INSERT INTO cost_single (body) VALUES ($1)"
_POLICY = RetryPolicy(attempts=4)


@dataclass(slots=True)
class Timed:
    """One way to run the operation."""

    name: str
    trips: int
    """Round trips, acquire to release (the pool's reset query is one)."""
    call: Call
    seconds: Figures = field(default_factory=Figures)
    """The mean of a round."""
    cpu: Figures = field(default_factory=Figures)
    """Seconds of this process's processor time a call."""


async def _op(conn: Any) -> None:
    await conn.execute(_INSERT, "x")


def _ignored(event: Event) -> None:
    """An observer that does nothing."""


def _plain(pool: asyncpg.Pool[Any]) -> Mapping[str, tuple[int, Call]]:
    async def transaction() -> None:
        async with pool.acquire() as conn, conn.transaction():
            await _op(conn)

    async def by_hand() -> None:
        async with pool.acquire() as conn, conn.transaction(), conn.transaction():
            await conn.execute("SET LOCAL statement_timeout = 1425")
            await conn.execute("SET LOCAL lock_timeout = 500")
            await _op(conn)

    return {
        "asyncpg: pool.execute": (2, lambda: pool.execute(_INSERT, "x")),
        "asyncpg: transaction()": (4, transaction),
        BY_HAND: (8, by_hand),
    }


def _ours(pool: asyncpg.Pool[Any]) -> Mapping[str, tuple[int, Call]]:
    engine, observed = Engine(pool), Engine(pool, observer=_ignored)
    safe = pipe(_op, timeout(1.5, lock=0.5), retry(_POLICY))
    return {
        "run, autocommit": (2, lambda: engine.run(_op, autocommit=True)),
        "run": (4, lambda: engine.run(_op)),
        OURS: (4, lambda: engine.run(safe)),
        f"{OURS}, observer on": (4, lambda: observed.run(safe)),
    }


def speedup(ways: Sequence[Timed]) -> float:
    """Time by hand over ours."""
    by_name = {one.name: one.seconds.median for one in ways}
    return by_name[BY_HAND] / by_name[OURS]


async def measure_wire(dsn: str, *, rounds: int, calls: int) -> list[Timed]:
    """Interleaved rounds of `calls` calls each. No waiting for the disk: it would hide the difference."""
    async with asyncpg.create_pool(
        dsn, min_size=1, max_size=1, server_settings={"synchronous_commit": "off"}
    ) as pool:
        await pool.execute(
            "DROP TABLE IF EXISTS cost_single; "
            "CREATE TABLE cost_single "
            "(id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, body text NOT NULL)"
        )
        ways = [Timed(name, *way) for name, way in {**_plain(pool), **_ours(pool)}.items()]
        for turn in range(rounds):
            for way in rotated(ways, turn):
                await _round(way, calls)
        written = await pool.fetchval("SELECT count(*) FROM cost_single")
    expected = rounds * len(ways) * (calls + _WARM)
    if written != expected:
        raise AssertionError(f"{expected} operations wrote {written} rows")
    return ways


_WARM = 5


async def _round(way: Timed, calls: int) -> None:
    for _ in range(_WARM):
        await way.call()
    gc.collect()
    cpu, started = time.process_time(), time.perf_counter()
    for _ in range(calls):
        await way.call()
    way.seconds.samples.append((time.perf_counter() - started) / calls)
    way.cpu.samples.append((time.process_time() - cpu) / calls)
