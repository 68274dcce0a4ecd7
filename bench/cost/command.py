"""The command line: `python -m bench cost --help`."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench.cost import batches
from bench.cost.chart import draw
from bench.cost.layers import measure_layers
from bench.cost.profiles import profiles
from bench.cost.report import CostReport
from bench.cost.wire import measure_wire
from bench.header import RESULTS, header
from bench.peers.slowline import round_trip, slow_line
from bench.place import database
from dbop_raw.testing import ServerError, ServerUnavailable

__all__ = ["QUICK", "Sizes", "main", "measure"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is measured."""

    rounds: int = 9
    calls: int = 1000
    """Calls a round, for one operation."""
    delay: float = 0.0006
    """Seconds asked of the slow line."""
    sizes: tuple[int, ...] = (100, 1_000, 10_000, 100_000, 1_000_000)
    """Items of the clean batches."""
    batch_rounds: int = 5
    repeats: int = 20
    """Of a small batch, a round."""
    bad: tuple[float, ...] = (0.0, 0.001, 0.01, 0.1, 0.5, 1.0)
    rows: int = 20_000
    """Items of the batches with bad ones."""
    workers: tuple[int, ...] = (1, 2, 4, 8)
    stream: int = 200_000
    """Items of an ingest."""
    chunk: int = 1_000


QUICK = Sizes(
    rounds=1,
    calls=30,
    sizes=(100, 1_000),
    batch_rounds=1,
    repeats=1,
    bad=(0.0, 0.1),
    rows=500,
    workers=(1, 2),
    stream=2_000,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; gives the exit code."""
    asked = _parser().parse_args(arguments)
    sizes = QUICK if asked.quick else Sizes()
    given = {name: getattr(asked, name) for name in ("rounds", "calls", "batch_rounds", "stream")}
    sizes = replace(sizes, **{name: value for name, value in given.items() if value is not None})
    if asked.largest is not None:
        sizes = replace(sizes, sizes=tuple(size for size in sizes.sizes if size <= asked.largest))
    try:
        with database(asked.dsn, "bench_cost") as dsn:
            report = asyncio.run(measure(dsn, sizes, embedded=asked.dsn is None, quick=asked.quick))
    except (ServerUnavailable, ServerError) as exc:
        print(f"bench cost: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench cost: stopped by Ctrl-C; nothing was written", file=sys.stderr)
        return 130
    print(report.markdown())
    out = asked.out or (None if asked.quick else RESULTS)
    if out is None:
        return 0
    report.write(out)
    chart = draw(report, out / "cost.png")
    print(f"written: cost.*, in {out.name}")
    if chart is None:
        print("no chart: matplotlib is not installed (pip install 'dbop-raw[bench]')", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    default = Sizes()
    made = argparse.ArgumentParser(
        prog="bench cost", description="What the layer itself costs.", allow_abbrev=False
    )
    made.add_argument("--dsn", help="postgresql:// URL; gets a database for the time. Default: embedded")
    made.add_argument("--rounds", type=int, help=f"of one operation; default: {default.rounds}")
    made.add_argument("--calls", type=int, help=f"of one operation, a round; default: {default.calls}")
    made.add_argument("--batch-rounds", type=int, help=f"default: {default.batch_rounds}")
    made.add_argument("--largest", type=int, help=f"batch, in items; default: {default.sizes[-1]}")
    made.add_argument("--stream", type=int, help=f"items of an ingest; default: {default.stream}")
    made.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works")
    made.add_argument("--out", type=Path, help="folder; default: bench/results, with --quick none")
    return made


def _say(what: str) -> None:
    print(f"  {what} …", file=sys.stderr, flush=True)


async def measure(dsn: str, sizes: Sizes, *, embedded: bool = True, quick: bool = False) -> CostReport:
    """All of it."""
    about = await header(dsn, ("dbop-raw", "asyncpg", "anyio"), asdict(sizes), embedded=embedded)
    _say("layers")
    layers, depths = await measure_layers(rounds=sizes.rounds, calls=sizes.calls)
    _say("one operation on a server")
    wire = await measure_wire(dsn, rounds=sizes.rounds, calls=sizes.calls)
    _say("one operation on a slow line")
    with slow_line(dsn, sizes.delay) as far:
        trips = {"direct": await round_trip(dsn), "slow": await round_trip(far)}
        slow_wire = await measure_wire(far, rounds=sizes.rounds, calls=max(5, sizes.calls // 10))
    _say("batches")
    items = await batches.items(dsn, sizes.sizes, rounds=sizes.batch_rounds, most_repeats=sizes.repeats)
    _say("batches with bad rows")
    failures = await batches.failures(dsn, sizes.bad, rows=sizes.rows, rounds=sizes.batch_rounds)
    _say("workers")
    workers = await batches.workers(
        dsn, sizes.workers, rows=sizes.stream, size=sizes.chunk, rounds=sizes.batch_rounds
    )
    _say("profile")
    return CostReport(
        header=about,
        layers=layers,
        depths=depths,
        round_trip=trips,
        wire=wire,
        slow_wire=slow_wire,
        items=items,
        failures=failures,
        workers=workers,
        profile=await profiles(sizes.calls),
        quick=quick,
    )
