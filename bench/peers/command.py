"""The command line: `python -m bench peers --help`."""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from bench.commandline import carry_out, parser
from bench.header import header
from bench.peers.chart import draw
from bench.peers.flights import archive, flights_work
from bench.peers.measure import measure_ways
from bench.peers.report import Case, PeersReport
from bench.peers.single import measure_singles
from bench.peers.slowline import round_trip, slow_line
from bench.peers.ways import PACKAGES, SINGLES, WAYS
from bench.peers.work import Work, two_columns
from bench.progress import Progress, progress_bar

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
    return carry_out(
        "peers",
        asked,
        lambda dsn: measure(dsn, sizes, embedded=asked.dsn is None, quick=asked.quick),
        draw,
    )


def _parser() -> argparse.ArgumentParser:
    default = Sizes()
    made = parser("peers", "The same work by other libraries, and by ours.")
    made.add_argument("--rows", type=int, help=f"of the two-column table; default: {default.rows}")
    made.add_argument("--chunk", type=int, help=f"rows a transaction; default: {default.chunk}")
    made.add_argument("--flights", type=int, help=f"rows of flights, 0 for none; default: {default.flights}")
    made.add_argument("--rounds", type=int, help=f"default: {default.rounds}")
    made.add_argument("--slow-rows", type=int, help=f"rows on the slow line; default: {default.slow_rows}")
    made.add_argument("--calls", type=int, help=f"of the one operation, a round; default: {default.calls}")
    return made


async def measure(dsn: str, sizes: Sizes, *, embedded: bool = True, quick: bool = False) -> PeersReport:
    """All of it."""
    about = await header(dsn, PACKAGES, asdict(sizes), embedded=embedded)
    near, far = partial(_case, dsn, sizes.chunk), partial(_case, dsn, sizes.chunk, line=FAR)
    with progress_bar(_steps(sizes)) as progress, slow_line(dsn, sizes.delay) as slow:
        cases = [await near(progress, sizes.rounds, two_columns(sizes.rows, bad)) for bad in sizes.bad]
        cases.append(await _flights(near, progress, sizes))
        trips = {NEAR: await round_trip(dsn), FAR: await round_trip(slow)}
        for bad in sizes.slow_bad:
            work = two_columns(sizes.slow_rows, bad)
            cases.append(await far(progress, sizes.slow_rounds, work, through=slow))
        singles = await measure_singles(
            dsn, slow, SINGLES, rounds=sizes.rounds, calls=sizes.calls, progress=progress
        )
    return PeersReport(about, trips, cases, singles, quick=quick)


def _steps(sizes: Sizes) -> int:
    """How many there will be, each as long as the others: one round of one way."""
    rounds = len(sizes.bad) * sizes.rounds + len(sizes.slow_bad) * sizes.slow_rounds
    rounds += sizes.flight_rounds if sizes.flights else 0
    return rounds * len(WAYS) + (1 + sizes.rounds) * len(SINGLES)


async def _case(
    dsn: str,
    chunk: int,
    progress: Progress,
    rounds: int,
    work: Work,
    *,
    line: str = NEAR,
    through: str | None = None,
) -> Case:
    measured = await measure_ways(
        dsn, work, WAYS, rounds=rounds, chunk=chunk, through=through, progress=progress
    )
    return Case(work.name, line, len(work.rows), measured)


async def _flights(case: Callable[..., Awaitable[Case]], progress: Progress, sizes: Sizes) -> Case:
    found = archive() if sizes.flights else None
    if found is None:
        why = (
            "left out by --flights 0"
            if not sizes.flights
            else "its data is not here: python -m bench.flights"
        )
        return Case("flights", NEAR, reason=why)
    return await case(progress, sizes.flight_rounds, flights_work(found, sizes.flights))
