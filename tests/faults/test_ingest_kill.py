"""An ingest's process is killed at random moments, and run again each time: nothing lost, nothing doubled."""

from __future__ import annotations

import inspect
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from dbop_raw.testing.server import run_sql
from tests.support.servers import own_server

pytestmark = pytest.mark.anyio

# The number of kills; in the short mode as many as the time allows.
KILLS = 20
SHORT_SECONDS = 25.0
ROWS = 40_000


def fate(n: int) -> str | None:
    """What becomes of the source's item `n`: None, or what rejects it: a SQLSTATE, or the client."""
    if n % 97 == 5:
        return "23502"
    if n % 211 == 3:
        return "client"
    # The key of the row before it, if that is in the same chunk and a good one.
    return "23505" if n % 501 == 2 and n % 100 and fate(n - 1) is None else None


PROGRAM = (
    inspect.getsource(fate)
    + """
import asyncio, sys
from dbop_raw import Engine, JsonlRejects, Ledger, batch, copy_into, ingest

dsn, rejects, rows = sys.argv[1], sys.argv[2], int(sys.argv[3])


def source():
    bad = {"23502": lambda n: (n, None), "client": lambda n: (n, 7), "23505": lambda n: (n - 1, "again")}
    for n in range(rows):
        yield bad.get(fate(n), lambda n: (n, str(n)))(n)


async def main():
    async with Engine.open(dsn, min_size=4, max_size=4, ssl=False) as engine:
        print("begun", flush=True)
        report = await ingest(
            engine,
            source(),
            batch(copy_into("t", columns=("id", "body"))),
            size=100,
            workers=4,
            rejects=JsonlRejects(rejects),
            ledger=Ledger("kills"),
            progress=lambda report: print("at", report.chunks, flush=True),
        )
        print("done", report.read, report.written, report.rejected, report.skipped, flush=True)


asyncio.run(main())
"""
)


@pytest.fixture
def database() -> Iterator[str]:
    with own_server() as server:
        dsn = server.create_database()
        run_sql(dsn, "CREATE TABLE t (id integer PRIMARY KEY, body text NOT NULL)")
        yield dsn
        server.drop_database(dsn)


def run(dsn: str, rejects: Path, kill: tuple[int, float] | None) -> str | None:
    """Run it; what it said at its end, or None when it was killed before.

    `kill`: after so many chunks, and then so many seconds.
    """
    command = [sys.executable, "-c", PROGRAM, dsn, str(rejects), str(ROWS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "begun\n", process.stderr.read()
        for line in process.stdout:
            if line.startswith("done"):
                process.wait(30)
                return line
            if kill is not None and int(line.split()[1]) >= kill[0]:
                time.sleep(kill[1])
                process.kill()
                return None
        raise AssertionError(process.stderr.read())


async def test_the_table_of_an_ingest_that_is_killed_equals_the_source_and_no_reject_is_missing(
    database: str, tmp_path: Path, rng: random.Random, scale: float
) -> None:
    rejects = tmp_path / "rejects.jsonl"
    started = time.monotonic()
    kills, last = 0, None
    chunks: list[int] = []
    while last is None and kills < KILLS and time.monotonic() - started < SHORT_SECONDS * scale:
        # By chunks, so that a busy machine gets on as well; and by the clock, so that it hits anything.
        last = run(database, rejects, (rng.randrange(15), rng.uniform(0.0, 0.03)))
        kills += last is None
        if last is None:
            there = "SELECT to_regclass('dbop_raw_ledger') IS NOT NULL"
            chunks.append(
                run_sql(database, "SELECT count(*) FROM dbop_raw_ledger") if run_sql(database, there) else 0
            )
    if last is None:
        last = run(database, rejects, None)
    assert last is not None
    _, read, _, _, skipped = last.split()
    print(  # noqa: T201 - figures
        f"{kills} kills, chunks in the ledger after each {chunks}; the last run skipped {skipped} of "
        f"{ROWS // 100} chunks; {time.monotonic() - started:.1f} s"
    )
    assert kills >= KILLS // 2, "it was done before it was killed often enough"
    assert chunks == sorted(chunks)
    assert 0 < int(skipped) < ROWS // 100, "no kill in the middle of the work"
    assert int(read) == ROWS

    connection = await asyncpg.connect(database)
    try:
        there_now = {row["id"]: row["body"] for row in await connection.fetch("SELECT id, body FROM t")}
        assert await connection.fetchval("SELECT count(*) FROM dbop_raw_ledger") == ROWS // 100
    finally:
        await connection.close()
    told: dict[int, str | None] = {}
    times: Counter[int] = Counter()
    cut_short = 0
    for line in rejects.read_text(encoding="utf-8").splitlines():
        try:
            one = json.loads(line)
        except ValueError:
            cut_short += 1  # by a kill in the middle of its write; its chunk was not committed
            continue
        times[one["index"]] += 1
        told[one["index"]] = one["sqlstate"] or "client"
    print(f"{sum(times.values()) - len(times)} rejects twice, {cut_short} cut short")  # noqa: T201 - figures
    assert there_now == {n: str(n) for n in range(ROWS) if fate(n) is None}
    assert told == {n: fate(n) for n in range(ROWS) if fate(n) is not None}
    assert cut_short <= kills
