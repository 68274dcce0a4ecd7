"""One operation with timeouts and retry: round trips on the wire, and time."""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import asyncpg

from bench.figures import Figures, rotated
from bench.peers.measure import said
from bench.peers.peer import Once, Single, missing
from bench.progress import Progress, silent
from dbop_raw.testing import FaultProxy

__all__ = ["SingleMeasured", "measure_singles"]

_SCHEMA = """
DROP TABLE IF EXISTS peer_single;
CREATE TABLE peer_single (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, body text NOT NULL);
CREATE OR REPLACE FUNCTION peer_write(body text, fail boolean) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF fail THEN RAISE EXCEPTION 'as if a lock was not free' USING ERRCODE = 'lock_not_available'; END IF;
    INSERT INTO peer_single (body) VALUES (peer_write.body);
END $$;
"""
_FLUSH = (
    "DO $$ BEGIN EXECUTE "
    "format('ALTER DATABASE %I SET synchronous_commit TO {value}', current_database()); END $$"
)


@dataclass(slots=True)
class SingleMeasured:
    """One way to do one operation."""

    way: Single
    trips: float = 0.0
    """Round trips from acquire to release, where nothing fails."""
    trips_repaired: float | None = None
    """The same where the first try meets a lock that is not free; None for a way without retry."""
    near: Figures = field(default_factory=Figures)
    """Seconds, where nothing fails, on a direct line."""
    far: Figures = field(default_factory=Figures)
    """Seconds over the slow line."""
    repaired: Figures = field(default_factory=Figures)
    """Seconds over the slow line where the first try fails; pauses between tries are at most 1 ms."""
    reason: str | None = None


async def measure_singles(
    dsn: str,
    far: str,
    ways: Sequence[Single],
    *,
    rounds: int,
    calls: int,
    progress: Progress = silent,
) -> list[SingleMeasured]:
    """All `ways`. `far`: the DSN of the slow line. `calls`: operations a round."""
    measured = [SingleMeasured(way, reason=missing(way.needs)) for way in ways]
    conn = await asyncpg.connect(dsn)
    try:
        await conn.execute(_SCHEMA)
        # For all alike: waiting for the disk would hide what the client's side costs.
        await conn.execute(_FLUSH.format(value="off"))
        for one in measured:
            progress(0, f"round trips: {one.way.name}")
            await _guarded(one, _count(conn, dsn, one))
            progress(1, "")
        for turn in range(rounds):
            for one in rotated(measured, turn):
                progress(0, f"one operation: {one.way.name}")
                await _guarded(one, _time(conn, dsn, far, one, calls))
                progress(1, "")
    finally:
        await conn.execute(_FLUSH.format(value="on"))
        await conn.close()
    return measured


async def _guarded(one: SingleMeasured, work: Coroutine[Any, Any, None]) -> None:
    """Await `work`; what goes wrong is the way's reason to have no figures."""
    if one.reason is not None:
        work.close()
        return
    try:
        await work
    except Exception as exc:  # noqa: BLE001 - reported in its row
        one.reason = f"failed: {said(exc)}"


@asynccontextmanager
async def _checked(conn: asyncpg.Connection[Any], calls: int) -> AsyncIterator[None]:
    """Each call must have written exactly one row."""
    await conn.execute("TRUNCATE peer_single")
    yield
    written = await conn.fetchval("SELECT count(*) FROM peer_single")
    if written != calls:
        raise AssertionError(f"{calls} operations wrote {written} rows")


async def _count(conn: asyncpg.Connection[Any], dsn: str, one: SingleMeasured) -> None:
    """Round trips, counted by a proxy once the driver has prepared its statements (6 calls)."""
    parts = urlsplit(dsn)
    warm, calls = 6, 5
    failures = (0, 1) if one.way.retries else (0,)
    async with (
        _checked(conn, len(failures) * calls + warm),
        FaultProxy(parts.hostname or "", parts.port or 5432) as proxy,
        one.way.open(proxy.dsn(dsn)) as once,
    ):
        await _repeat(once, warm, 0)
        found = []
        for failing in failures:
            proxy.reset_counts()
            await _repeat(once, calls, failing)
            # What a client sends when it gives a connection back may still be on its way.
            await asyncio.sleep(0.02)
            found.append(proxy.round_trips / calls)
    one.trips = found[0]
    one.trips_repaired = found[1] if len(found) > 1 else None


async def _repeat(once: Once, calls: int, failures: int) -> list[float]:
    took = []
    for number in range(calls):
        started = time.perf_counter()
        await once(f"body {number}", failures)
        took.append(time.perf_counter() - started)
    return took


async def _time(conn: asyncpg.Connection[Any], dsn: str, far: str, one: SingleMeasured, calls: int) -> None:
    over_far = max(2, calls // 4)
    for line, failures, number, figures in (
        (dsn, 0, calls, one.near),
        (far, 0, over_far, one.far),
        (far, 1, over_far, one.repaired),
    ):
        if failures and not one.way.retries:
            continue
        warm = 6
        async with _checked(conn, number + warm), one.way.open(line) as once:
            await _repeat(once, warm, 0)
            gc.collect()
            took = await _repeat(once, number, failures)
        figures.samples.append(statistics.median(took))
