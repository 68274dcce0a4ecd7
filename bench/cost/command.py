"""The command line: `python -m bench cost --help`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench.commandline import carry_out, parser
from bench.cost import batches
from bench.cost.chart import draw
from bench.cost.layers import measure_layers
from bench.cost.profiles import profiles
from bench.cost.report import CostReport
from bench.cost.wire import measure_wire
from bench.header import header
from bench.peers.slowline import round_trip, slow_line
from bench.progress import Progress, progress_bar

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
    return carry_out(
        "cost",
        asked,
        lambda dsn: measure(dsn, sizes, embedded=asked.dsn is None, quick=asked.quick),
        draw,
    )


def _parser() -> argparse.ArgumentParser:
    default = Sizes()
    made = parser("cost", "What the layer itself costs.")
    made.add_argument("--rounds", type=int, help=f"of one operation; default: {default.rounds}")
    made.add_argument("--calls", type=int, help=f"of one operation, a round; default: {default.calls}")
    made.add_argument("--batch-rounds", type=int, help=f"default: {default.batch_rounds}")
    made.add_argument("--largest", type=int, help=f"batch, in items; default: {default.sizes[-1]}")
    made.add_argument("--stream", type=int, help=f"items of an ingest; default: {default.stream}")
    return made


# What is measured, in this order, and about how many seconds each takes of all: for the time that is left.
_PLAN = {
    "layers": 20,
    "one operation on a server": 30,
    "one operation on a slow line": 30,
    "batches": 150,
    "batches with bad rows": 60,
    "workers": 60,
    "profile": 10,
}


def _in_turn(progress: Progress) -> Callable[[], None]:
    """To be called when one begins, and when the last one ends."""
    left = iter([*_PLAN, ""])
    done = iter([0, *_PLAN.values()])
    return lambda: progress(next(done), next(left))


async def measure(dsn: str, sizes: Sizes, *, embedded: bool = True, quick: bool = False) -> CostReport:
    """All of it."""
    about = await header(dsn, ("dbop-raw", "asyncpg", "anyio"), asdict(sizes), embedded=embedded)
    with progress_bar(sum(_PLAN.values())) as progress:
        return await _measure(dsn, sizes, about, _in_turn(progress), quick=quick)


async def _measure(
    dsn: str, sizes: Sizes, about: Mapping[str, Any], begin: Callable[[], None], *, quick: bool
) -> CostReport:
    begin()
    layers, depths = await measure_layers(rounds=sizes.rounds, calls=sizes.calls)
    begin()
    wire = await measure_wire(dsn, rounds=sizes.rounds, calls=sizes.calls)
    begin()
    with slow_line(dsn, sizes.delay) as far:
        trips = {"direct": await round_trip(dsn), "slow": await round_trip(far)}
        slow_wire = await measure_wire(far, rounds=sizes.rounds, calls=max(5, sizes.calls // 10))
    begin()
    items = await batches.items(dsn, sizes.sizes, rounds=sizes.batch_rounds, most_repeats=sizes.repeats)
    begin()
    failures = await batches.failures(dsn, sizes.bad, rows=sizes.rows, rounds=sizes.batch_rounds)
    begin()
    workers = await batches.workers(
        dsn, sizes.workers, rows=sizes.stream, size=sizes.chunk, rounds=sizes.batch_rounds
    )
    begin()
    profile = await profiles(sizes.calls)
    begin()
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
        profile=profile,
        quick=quick,
    )
