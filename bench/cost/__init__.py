"""`python -m bench cost`: what the layer itself costs, in time, processor time and memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import asyncpg

from bench.command import Benchmark, Run, size
from bench.cost.batches import BARE, OURS, WRITERS, batch_cases, worker_cases
from bench.cost.layers import ignored, layer_cases, profile_case
from bench.measure import Case, Way
from bench.report import Section
from bench.results import Result, name_of
from bench.single import DIRECT, INSERT, SLOW, Once, round_trip_case, single_cases
from dbop_raw import Engine, RetryPolicy, pipe, retry, timeout

BY_HAND = "by hand: transaction(), transaction(), SET, SET, op"
"""The same guarantees the plain way: BEGIN, SAVEPOINT, SET, SET, op, RELEASE, COMMIT, reset."""
FUSED = "run + timeout + retry"
WANTED = 1.5
"""How much faster than the same SQL by hand the fused operation is wanted to be."""
SHARE_BOUND, SHARE_FROM = 15, 1000
"""Python's share of a clean batch's time, %, has to stay below this, from so many items on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    rounds: int = size(9, "of one operation", quick=1)
    calls: int = size(1_000, "of one operation, a round; on the slow line a tenth of them", quick=30)
    delay: float = size(0.0006, "seconds asked of the slow line")
    largest: int = size(
        1_000_000, "items of a clean batch; the smallest has 100, then ten times more", quick=1_000
    )
    batch_rounds: int = size(5, quick=1)
    repeats: int = size(20, "of a small batch, a round", quick=1)
    bad: tuple[float, ...] = size((0.0, 0.001, 0.01, 0.1, 0.5, 1.0), quick=(0.0, 0.1))
    rows: int = size(20_000, "items of a batch with bad ones", quick=500)
    workers: tuple[int, ...] = size((1, 2, 4, 8), quick=(1, 2))
    stream: int = size(200_000, "items of an ingest", quick=2_000)
    chunk: int = size(1_000, "items of a chunk of it")


# --- one operation on a server


async def _op(conn: Any) -> None:
    await conn.execute(INSERT, "x")


async def _transaction(pool: Any) -> None:
    async with pool.acquire() as conn, conn.transaction():
        await _op(conn)


async def _by_hand(pool: Any) -> None:
    async with pool.acquire() as conn, conn.transaction(), conn.transaction():
        await conn.execute("SET LOCAL statement_timeout = 1425")
        await conn.execute("SET LOCAL lock_timeout = 500")
        await _op(conn)


def _single(name: str, call: Callable[..., Awaitable[object]], **options: Any) -> Way:
    """A way that is called with a pool; with an `observer`, or any other option, with an engine on it."""

    @asynccontextmanager
    async def opened(dsn: str) -> AsyncIterator[Once]:
        async with asyncpg.create_pool(dsn, min_size=1, max_size=1) as pool:
            given = Engine(pool, **options) if options else pool
            yield lambda *_: call(given)

    return Way(name, "", opened)


_safe = pipe(_op, timeout(1.5, lock=0.5), retry(RetryPolicy(attempts=4)))
SINGLES = (
    _single("asyncpg: pool.execute", lambda pool: pool.execute(INSERT, "x")),
    _single("asyncpg: transaction()", _transaction),
    _single(BY_HAND, _by_hand),
    _single("run, autocommit", lambda engine: engine.run(_op, autocommit=True), observer=None),
    _single("run", lambda engine: engine.run(_op), observer=None),
    _single(FUSED, lambda engine: engine.run(_safe), observer=None),
    _single(f"{FUSED}, observer on", lambda engine: engine.run(_safe), observer=ignored),
)


def _one(run: Run) -> list[Case]:
    sizes = run.sizes
    calls = {DIRECT: sizes.calls, SLOW: max(5, sizes.calls // 10)}
    cases = single_cases(run.dsn, SINGLES, rounds=sizes.rounds, calls=calls, delay=sizes.delay, fail=False)
    return [round_trip_case(run.dsn, sizes.delay), *cases]


# --- what it says


def derive(result: Result) -> None:
    """Add how much faster ours is than by hand, and what is Python's share of a batch's time.

    The share is that of our time which is processor time that the driver's own call does not need.
    """
    for line in (DIRECT, SLOW) if result.cases("one operation") else ():
        by_hand, ours = (result.median(f"one operation: {line}", one, "mean s") for one in (BY_HAND, FUSED))
        result.figure(f"{FUSED}, times as fast as by hand, {line}", "≥", WANTED, [by_hand / ours])
    shares = []
    for section in (*CLEAN, "failures", "workers"):
        for case in result.cases(section):
            ours, bare = (result.median(case, side, "s") for side in (OURS, BARE))
            more = result.median(case, OURS, "cpu s") - result.median(case, BARE, "cpu s")
            share = 100 * (max(0.0, more) / ours)
            result.add(case, OURS, None, {"times bare": ours / bare, "% Python": share})
            if section in CLEAN and int(name_of(case).replace(",", "")) >= SHARE_FROM:
                shares.append(share)
    if shares:
        name = f"% Python of a clean batch's time, the largest from {SHARE_FROM:,} items on"
        result.figure(name, "≤", SHARE_BOUND, [max(shares)])


CLEAN = {f"clean {writer}": f"Batches by {writer}, over the number of items" for writer in WRITERS}
_pairs = partial(Section, units=("rows/s", "times bare", "% Python"), by_case=True)
_BESIDE = (
    "Beside the driver's own bulk call in a transaction; bare `copy_text` joins the text without escapes."
)

BENCHMARK = Benchmark(
    name="cost",
    title="What the layer itself costs",
    sizes=Sizes(),
    packages=("dbop-raw", "asyncpg", "anyio"),
    parts={
        "layers": layer_cases,
        "one": _one,
        "batches": batch_cases,
        "workers": worker_cases,
        "profile": profile_case,
    },
    sections={
        "layers": Section(
            title="Layers, on a connection that answers at once: time, peak of memory, blocks kept a call",
            text="A timer that was cancelled keeps about 3 blocks till its time has come.",
            units=("cpu s", "bytes", "blocks"),
        ),
        "depth": Section(
            title="Depth of the pipeline: timeout, retry and savepoint nested in turn",
            units=("cpu s", "bytes", "blocks"),
        ),
        "round trip": Section(title="A round trip: `SELECT 1`", units=("s",)),
        "one operation": Section(
            title="One operation on a server",
            text="An INSERT, acquire to release, one after another, `synchronous_commit` off for all.",
            units=("round trips", "mean s", "cpu s"),
            chart="mean s",
        ),
        **{name: _pairs(title=title, text=_BESIDE, chart="% Python") for name, title in CLEAN.items()},
        "failures": _pairs(
            title="Batches by copy_into, over the share of bad items",
            text="Bare is COPY of the good rows alone.",
            chart="rows/s",
        ),
        "workers": _pairs(
            title="Ingest with copy_into, over the number of workers",
            text="Bare are so many tasks that COPY the same chunks by hand.",
            chart="rows/s",
        ),
    },
    derive=derive,
)
main = BENCHMARK.main
