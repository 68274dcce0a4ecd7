"""What `bench quick` does not show of `bench peers`: that wrong work gives no figures. Nothing is timed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from bench import connected
from bench.command import database
from bench.measure import NotMeasured, Way, measure
from bench.peers.many import WAYS, Load, write_once
from bench.peers.one import SINGLES
from bench.results import Result
from bench.single import FAILING, TRIPS, single_cases
from bench.work import Row, Work, two_columns

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def dsn() -> Iterator[str]:
    with database(None, "bench_peers") as (_, made):
        yield made


async def write(dsn: str, work: Work, way: Way) -> None:
    async with connected(dsn) as conn:
        await work.prepare(conn)
        assert (await write_once(conn, dsn, work, way, 25))["rows/s"] > 0


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
async def test_every_way_sets_aside_all_rows_where_all_but_one_are_bad(dsn: str, way: Way) -> None:
    try:
        way.require()
    except NotMeasured as exc:
        pytest.skip(str(exc))
    await write(dsn, two_columns(60, 1.0), way)


def way_that_writes(rows_of: Callable[[Sequence[Row]], Sequence[Row]], says: int) -> Way:
    """A way that writes what `rows_of` makes of the rows, and says that so many failed."""

    @asynccontextmanager
    async def opened(dsn: str, work: Work) -> AsyncIterator[Load]:
        async with connected(dsn) as conn:

            async def load(rows: Sequence[Row]) -> int:
                await work.copy(conn, rows_of(rows))
                return says

            yield load

    return Way("a liar", "", opened)


@pytest.mark.parametrize(
    ("rows_of", "says", "reason"),
    [
        (lambda rows: rows[1:], 0, "the table has 9 rows"),
        (lambda rows: [(row[0], "other") for row in rows], 0, "the table has 10 rows"),
        (lambda rows: rows, 1, "it says that 1 rows failed"),
    ],
)
async def test_a_way_that_does_not_do_the_work_has_no_figures(
    dsn: str, rows_of: Any, says: int, reason: str
) -> None:
    with pytest.raises(AssertionError, match=f"wrong: {reason}"):
        await write(dsn, two_columns(10, 0.0), way_that_writes(rows_of, says))


async def test_a_way_that_is_refused_has_no_figures(dsn: str) -> None:
    with pytest.raises(asyncpg.UniqueViolationError):
        await write(dsn, two_columns(10, 0.0), way_that_writes(lambda rows: [*rows, rows[0]], 0))


async def test_what_is_not_installed_says_so(dsn: str) -> None:
    way = Way("x", "", way_that_writes(list, 0).open, needs=("no-such-package",))
    with pytest.raises(NotMeasured, match="not installed: no-such-package"):
        await write(dsn, two_columns(10, 0.0), way)


async def test_ours_takes_the_round_trips_that_the_design_promises(dsn: str) -> None:
    ours = [way for way in SINGLES if way.name == "dbop_raw"]
    result = Result("peers", {})
    cases = single_cases(dsn, ours, rounds=1, calls={}, delay=0, fail=True)
    await measure([case for case in cases if TRIPS in case.name], result)
    # BEGIN with all it opens, the operation, COMMIT, and the pool's own reset.
    assert result.values(f"one operation: {TRIPS}", "dbop_raw", "round trips") == [4]
    # And where the first attempt fails: one to go back to the savepoint, one for the second attempt.
    assert result.values(f"one operation: {TRIPS}{FAILING}", "dbop_raw", "round trips") == [6]


@pytest.mark.parametrize("bad", [0.0, 0.01, 0.5, 1.0])
async def test_the_work_has_as_many_bad_rows_as_it_says_and_begins_empty(dsn: str, bad: float) -> None:
    work = two_columns(200, bad)
    assert len(work.rows) == len(work.text_rows) == 200
    assert len(work.good) == 200 - min(199, round(200 * bad))
    async with connected(dsn) as conn:
        await work.prepare(conn)
        assert work.expected[0] == len(work.good)
        assert await conn.fetchval(f"SELECT count(*) FROM {work.table}") == 0
