"""`python -m bench peers`: the same work by every library that one might take instead, and by ours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from bench.command import Benchmark, Run, size
from bench.measure import Case, NotMeasured
from bench.peers.many import LIMIT, WAYS, many_case
from bench.peers.one import SINGLES
from bench.report import Section
from bench.single import DIRECT, SLOW, round_trip_case, single_cases
from bench.work import Work, archive, flights_work, named, two_columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    rows: int = size(10_000, "of two columns", quick=300)
    bad: tuple[float, ...] = size((0.0, 0.001, 0.01, 0.1), quick=(0.0, 0.01))
    chunk: int = size(1_000, "rows a transaction")
    rounds: int = size(5, quick=1)
    flights: int = size(20_000, "rows of flights, 0 for none", quick=200, least=0)
    flight_rounds: int = size(3, quick=1)
    slow_rows: int = size(1_000, "rows on the slow line", quick=60)
    slow_bad: tuple[float, ...] = size((0.0, 0.01), quick=(0.01,))
    slow_rounds: int = size(3, quick=1)
    delay: float = size(0.0006, "seconds asked of the slow line; timers and the proxy add about 0.4 ms")
    calls: int = size(400, "of one operation, a round; on the slow line a quarter of them", quick=8)


def _many(run: Run) -> Iterator[Case]:
    sizes = run.sizes
    case = partial(many_case, dsn=run.dsn, chunk=sizes.chunk)
    for share in sizes.bad:
        make = partial(two_columns, sizes.rows, share)
        yield case(f"{DIRECT}: {named('two columns', share)}", make=make, rounds=sizes.rounds)
    if sizes.flights:
        yield case(
            f"{DIRECT}: {_flights_named(run)}", make=partial(_flights, run), rounds=sizes.flight_rounds
        )
    for share in sizes.slow_bad:
        make = partial(two_columns, sizes.slow_rows, share)
        yield case(
            f"{SLOW}: {named('two columns', share)}", make=make, rounds=sizes.slow_rounds, delay=sizes.delay
        )


def _flights(run: Run) -> Work:
    return flights_work(archive(), run.sizes.flights)


def _flights_named(run: Run) -> str:
    try:
        work = _flights(run)
    except NotMeasured:
        return "flights"
    return named("flights", len(work.bad) / len(work.rows))


def _one(run: Run) -> list[Case]:
    sizes = run.sizes
    calls = {DIRECT: sizes.calls, SLOW: max(2, sizes.calls // 4)}
    cases = single_cases(run.dsn, SINGLES, rounds=sizes.rounds, calls=calls, delay=sizes.delay, fail=True)
    return [round_trip_case(run.dsn, sizes.delay), *cases]


_SINGLE = """\
An INSERT by a function, `statement_timeout` and `lock_timeout` set for it, at most four attempts, on a
connection of a pool, given back. Where it says so, the first attempt fails with 55P03; pauses between
attempts are at most 1 ms. Times are medians of calls, with `synchronous_commit` off for all."""
_rates = partial(
    Section,
    text=f"Each with its ratio to *{LIMIT}*, which isolates nothing. A rate counts bad rows too.",
    units=("rows/s",),
    base=LIMIT,
    chart="rows/s",
)

BENCHMARK = Benchmark(
    name="peers",
    title="The same work by others, and by ours",
    sizes=Sizes(),
    packages=("dbop-raw", "asyncpg", *dict.fromkeys(name for one in (*WAYS, *SINGLES) for name in one.needs)),
    parts={"many": _many, "one": _one},
    sections={
        **{line: _rates(title=f"Rows a second, on the {line}") for line in (DIRECT, SLOW)},
        "round trip": Section(title="A round trip: `SELECT 1`", units=("s",)),
        "one operation": Section(
            title="One operation with timeouts and retry", text=_SINGLE, units=("round trips", "s")
        ),
        "notes": Section(
            title="How each was used",
            text="\n".join(f"- {one.name}: {one.note}" for one in (*WAYS, *SINGLES)),
        ),
    },
)
main = BENCHMARK.main
