"""`python -m bench peers` in tiny sizes: its tables are right and its report is whole. Nothing is timed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from bench.peers import command
from bench.peers.measure import measure_ways
from bench.peers.peer import Load, Way, missing
from bench.peers.report import LIMIT
from bench.peers.single import measure_singles
from bench.peers.ways import SINGLES, WAYS
from bench.peers.work import Row, Work, state_of, two_columns
from bench.place import database
from bench.quick import faults_of_peers

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def dsn() -> Iterator[str]:
    with database(None, "bench_peers") as made:
        yield made


@pytest.mark.parametrize("bad", [0.0, 0.05, 1.0])
async def test_every_way_leaves_exactly_the_good_rows(dsn: str, bad: float) -> None:
    measured = await measure_ways(dsn, two_columns(60, bad), WAYS, rounds=1, chunk=25)
    for one in measured:
        assert one.reason == missing(one.way.needs), one.way.name
        assert len(one.rate.samples) == (0 if one.reason else 1), one.way.name


def way_that_writes(rows_of: Any, says: int) -> Way:
    """A way that writes what `rows_of` makes of the rows, and says that so many failed."""

    @asynccontextmanager
    async def opened(dsn: str, work: Work) -> AsyncIterator[Load]:
        conn = await asyncpg.connect(dsn)

        async def load(rows: Sequence[Row]) -> int:
            await conn.copy_records_to_table(work.table, records=rows_of(rows))
            return says

        try:
            yield load
        finally:
            await conn.close()

    return Way(name="a liar", role="peer", note="", open=opened)


@pytest.mark.parametrize(
    ("rows_of", "says", "reason"),
    [
        (lambda rows: rows[1:], 0, "wrong: the table has 9 rows"),
        (lambda rows: [(row[0], "other") for row in rows], 0, "wrong: the table has 10 rows"),
        (lambda rows: rows, 1, "wrong: it says that 1 rows failed"),
        (lambda rows: [*rows, rows[0]], 0, "failed: UniqueViolationError"),
    ],
)
async def test_a_way_that_does_not_do_the_work_has_no_figures(
    dsn: str, rows_of: Any, says: int, reason: str
) -> None:
    way = way_that_writes(rows_of, says)
    (measured,) = await measure_ways(dsn, two_columns(10, 0.0), [way], rounds=2, chunk=100)
    assert measured.reason is not None
    assert measured.reason.startswith(reason)
    assert measured.rate.samples == []


async def test_what_is_not_installed_says_so(dsn: str) -> None:
    way = Way(name="x", role="peer", note="", open=way_that_writes(list, 0).open, needs=("no-such-package",))
    (measured,) = await measure_ways(dsn, two_columns(10, 0.0), [way], rounds=1, chunk=100)
    assert measured.reason is not None
    assert measured.reason.startswith("not installed: no-such-package")


async def test_one_operation_is_done_once_and_its_round_trips_counted(dsn: str) -> None:
    for one in await measure_singles(dsn, dsn, SINGLES, rounds=1, calls=4):
        assert one.reason == missing(one.way.needs), one.way.name
        if one.reason is None:
            assert one.trips >= 1, one.way.name
            assert (one.trips_repaired is None) is not one.way.retries, one.way.name


async def test_ours_takes_the_round_trips_that_the_design_promises(dsn: str) -> None:
    ours = [way for way in SINGLES if way.role == "ours"]
    (measured,) = await measure_singles(dsn, dsn, ours, rounds=1, calls=4)
    # BEGIN with all it opens, the operation, COMMIT, and the pool's own reset.
    assert measured.trips == 4
    # And where the first try fails: one to go back to the savepoint, one for the second try.
    assert measured.trips_repaired == 6


@pytest.mark.parametrize("bad", [0.0, 0.01, 0.5, 1.0])
async def test_the_work_is_what_it_says(dsn: str, bad: float) -> None:
    work = two_columns(200, bad)
    assert len(work.rows) == len(work.text_rows) == 200
    assert len(work.good) == 200 - min(199, round(200 * bad))
    conn = await asyncpg.connect(dsn)
    try:
        count, _ = await work.prepare(conn)
        assert count == len(work.good)
        assert (await state_of(conn, work.table))[0] == 0
    finally:
        await conn.close()


async def test_the_report_is_whole(dsn: str, tmp_path: Path) -> None:
    report = await command.measure(dsn, command.QUICK, quick=True)
    markdown, data = report.write(tmp_path)
    found = json.loads(data.read_text(encoding="utf-8"))
    assert list(faults_of_peers(found)) == []
    assert found["quick"] is True
    names = [way["name"] for way in found["cases"][0]["ways"]]
    assert names == [way.name for way in WAYS]
    assert [way["name"] for way in found["one_operation"]] == [way.name for way in SINGLES]
    assert next(way for way in found["cases"][0]["ways"] if way["name"] == LIMIT)["ratio_to_limit"] == 1
    text = markdown.read_text(encoding="utf-8")
    assert "these figures mean nothing" in text
    assert all(name in text for name in names)
    assert dsn.rpartition("@")[2] not in text
