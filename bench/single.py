"""One operation, again and again: round trips on the wire, and time over a direct and a slow line."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from bench import connected
from bench.line import line_to, round_trip
from bench.measure import Case, Contender, Way, timed
from dbop_raw.testing import FaultProxy

Once = Callable[[str, int], Awaitable[object]]
"""Does one operation: writes a text; its first so many attempts meet a lock that is not free (55P03)."""

DIRECT, SLOW, TRIPS = "direct line", "slow line", "round trips"
FAILING = ", first attempt fails"
INSERT = "INSERT INTO single (body) VALUES ($1)"
CALL = "SELECT single_write($1, $2)"
"""The operation where attempts are to fail: its second parameter tells it to."""
_SCHEMA = """
DROP TABLE IF EXISTS single;
CREATE TABLE single (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, body text NOT NULL);
CREATE OR REPLACE FUNCTION single_write(body text, fail boolean) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF fail THEN RAISE EXCEPTION 'as if a lock was not free' USING ERRCODE = 'lock_not_available'; END IF;
    INSERT INTO single (body) VALUES (single_write.body);
END $$;
"""
_COMMITS = "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I {}', current_database()); END $$"
# Calls before those that count: after five, asyncpg and psycopg have prepared their statements.
_WARM = 6
_COUNTED = 5


def round_trip_case(dsn: str, delay: float) -> Case:
    """How long a round trip takes on each line."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[Mapping[str, Contender]]:
        with line_to(dsn, delay) as far:
            yield {DIRECT: partial(round_trip, dsn), SLOW: partial(round_trip, far)}

    return Case(name="round trip", rounds=1, open=opened)


def single_cases(
    dsn: str, ways: Sequence[Way], *, rounds: int, calls: Mapping[str, int], delay: float, fail: bool
) -> list[Case]:
    """Round trips, and time on each line, of `calls` operations; `fail`: also of some that fail at first."""

    def case(line: str, failures: int) -> Case:
        contenders = [one for one in ways if not (one.limit and failures)]

        @asynccontextmanager
        async def opened() -> AsyncIterator[Mapping[str, Contender]]:
            with line_to(dsn, delay if line == SLOW else 0) as through:
                async with connected(dsn) as conn:
                    await conn.execute(_SCHEMA)
                    # For all alike: waiting for the disk would hide what the client's side costs.
                    await conn.execute(_COMMITS.format("SET synchronous_commit TO off"))
                    if line == TRIPS:
                        yield {one.name: partial(_count, conn, dsn, one, failures) for one in contenders}
                    else:
                        number = calls[line]
                        yield {
                            one.name: partial(_time, conn, through, one, number, failures)
                            for one in contenders
                        }
                    await conn.execute(_COMMITS.format("RESET synchronous_commit"))

        name = f"one operation: {line}{FAILING if failures else ''}"
        return Case(name=name, rounds=1 if line == TRIPS else rounds, open=opened, seconds=20)

    cases = [case(line, 0) for line in (TRIPS, DIRECT, SLOW)]
    return [*cases, case(TRIPS, 1), case(SLOW, 1)] if fail else cases


@asynccontextmanager
async def _checked(conn: Any, calls: int) -> AsyncIterator[None]:
    """Each call must have written exactly one row."""
    await conn.execute("TRUNCATE single")
    yield
    written = await conn.fetchval("SELECT count(*) FROM single")
    if written != calls:
        raise AssertionError(f"wrong: {calls} operations wrote {written} rows")


async def _count(conn: Any, dsn: str, one: Way, failures: int) -> Mapping[str, float]:
    one.require()
    parts = urlsplit(dsn)
    async with (
        _checked(conn, _WARM + _COUNTED),
        FaultProxy(parts.hostname or "", parts.port or 5432) as proxy,
        one.open(proxy.dsn(dsn)) as once,
    ):
        await _repeat(once, _WARM, 0)
        proxy.reset_counts()
        await _repeat(once, _COUNTED, failures)
        # What a client sends when it gives a connection back may still be on its way.
        await asyncio.sleep(0.02)
        return {"round trips": proxy.round_trips / _COUNTED}


async def _time(conn: Any, dsn: str, one: Way, calls: int, failures: int) -> Mapping[str, float]:
    one.require()
    took: list[float] = []

    async def work() -> None:
        took.extend(await _repeat(once, calls, failures))

    async with _checked(conn, _WARM + calls), one.open(dsn) as once:
        await _repeat(once, _WARM, 0)
        whole = await timed(work)
    return {"s": statistics.median(took), "mean s": whole["s"] / calls, "cpu s": whole["cpu s"] / calls}


async def _repeat(once: Once, calls: int, failures: int) -> list[float]:
    took = []
    for number in range(calls):
        started = time.perf_counter()
        await once(f"body {number}", failures)
        took.append(time.perf_counter() - started)
    return took
