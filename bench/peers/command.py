"""The command line: `python -m bench peers --help`."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench.header import RESULTS, header
from bench.peers.chart import draw
from bench.peers.flights import archive, flights_work
from bench.peers.measure import measure_ways
from bench.peers.report import Case, PeersReport
from bench.peers.single import measure_singles
from bench.peers.slowline import round_trip, slow_line
from bench.peers.ways import PACKAGES, SINGLES, WAYS
from bench.peers.work import Work, two_columns
from bench.place import database
from dbop_raw.testing import ServerError, ServerUnavailable

__all__ = ["QUICK", "Sizes", "main", "measure"]

NEAR, FAR = "on a direct line", "on a slow line"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is measured."""

    rows: int = 10_000
    bad: tuple[float, ...] = (0.0, 0.001, 0.01, 0.1)
    chunk: int = 1_000
    """Rows a transaction."""
    rounds: int = 5
    flights: int = 20_000
    flight_rounds: int = 3
    slow_rows: int = 1_000
    slow_bad: tuple[float, ...] = (0.0, 0.01)
    slow_rounds: int = 3
    delay: float = 0.0006
    """Seconds asked of the slow line; about 0.4 ms more is what timers and the proxy add."""
    calls: int = 400
    """Operations a round of the one operation."""


QUICK = Sizes(
    rows=300,
    bad=(0.0, 0.01),
    flights=200,
    rounds=1,
    flight_rounds=1,
    slow_rows=60,
    slow_bad=(0.01,),
    slow_rounds=1,
    calls=8,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; gives the exit code."""
    asked = _parser().parse_args(arguments)
    sizes = QUICK if asked.quick else Sizes()
    given = {
        name: getattr(asked, name) for name in ("rows", "chunk", "flights", "rounds", "slow_rows", "calls")
    }
    sizes = replace(sizes, **{name: value for name, value in given.items() if value is not None})
    try:
        with database(asked.dsn, "bench_peers") as dsn:
            report = asyncio.run(measure(dsn, sizes, embedded=asked.dsn is None, quick=asked.quick))
    except (ServerUnavailable, ServerError) as exc:
        print(f"bench peers: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench peers: stopped by Ctrl-C; nothing was written", file=sys.stderr)
        return 130
    print(report.markdown())
    out = asked.out or (None if asked.quick else RESULTS)
    if out is None:
        return 0
    report.write(out)
    chart = draw(report, out / "peers.png")
    print(f"written: peers.*, in {out.name}")
    if chart is None:
        print("no chart: matplotlib is not installed (pip install 'dbop-raw[bench]')", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    default = Sizes()
    made = argparse.ArgumentParser(
        prog="bench peers", description="The same work by other libraries, and by ours.", allow_abbrev=False
    )
    made.add_argument("--dsn", help="postgresql:// URL; gets a database for the time. Default: embedded")
    made.add_argument("--rows", type=int, help=f"of the two-column table; default: {default.rows}")
    made.add_argument("--chunk", type=int, help=f"rows a transaction; default: {default.chunk}")
    made.add_argument("--flights", type=int, help=f"rows of flights, 0 for none; default: {default.flights}")
    made.add_argument("--rounds", type=int, help=f"default: {default.rounds}")
    made.add_argument("--slow-rows", type=int, help=f"rows on the slow line; default: {default.slow_rows}")
    made.add_argument("--calls", type=int, help=f"of the one operation, a round; default: {default.calls}")
    made.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works")
    made.add_argument("--out", type=Path, help="folder; default: bench/results, with --quick none")
    return made


async def measure(dsn: str, sizes: Sizes, *, embedded: bool = True, quick: bool = False) -> PeersReport:
    """All of it."""
    about = await header(dsn, PACKAGES, asdict(sizes), embedded=embedded)
    cases = [await _case(dsn, two_columns(sizes.rows, bad), NEAR, sizes, sizes.rounds) for bad in sizes.bad]
    cases.append(await _flights(dsn, sizes))
    with slow_line(dsn, sizes.delay) as far:
        trips = {NEAR: await round_trip(dsn), FAR: await round_trip(far)}
        for bad in sizes.slow_bad:
            work = two_columns(sizes.slow_rows, bad)
            cases.append(await _case(dsn, work, FAR, sizes, sizes.slow_rounds, through=far))
        singles = await measure_singles(dsn, far, SINGLES, rounds=sizes.rounds, calls=sizes.calls)
    return PeersReport(about, trips, cases, singles, quick=quick)


async def _case(
    dsn: str, work: Work, line: str, sizes: Sizes, rounds: int, *, through: str | None = None
) -> Case:
    measured = await measure_ways(dsn, work, WAYS, rounds=rounds, chunk=sizes.chunk, through=through)
    return Case(work.name, line, len(work.rows), measured)


async def _flights(dsn: str, sizes: Sizes) -> Case:
    found = archive() if sizes.flights else None
    if found is None:
        why = (
            "left out by --flights 0"
            if not sizes.flights
            else "its data is not here: python -m bench.flights"
        )
        return Case("flights", NEAR, reason=why)
    return await _case(dsn, flights_work(found, sizes.flights), NEAR, sizes, sizes.flight_rounds)
