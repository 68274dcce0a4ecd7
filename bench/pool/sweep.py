"""All sizes, in rounds: each measures every size once, with the engine and without, in its own order."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bench.pool.histogram import Histogram
from bench.pool.measure import KINDS, Cell, Kind, Measured, measure
from bench.pool.model import Fit, fit
from bench.pool.options import Options
from bench.pool.recommend import Advice, SizePoint, recommend
from bench.pool.sampler import ServerSide, summarise
from bench.pool.workloads import Workload
from bench.progress import Progress

__all__ = ["Row", "Sweep", "conclude", "plan", "planned_seconds", "sweep"]

# Beyond warm-up and window: connecting, clearing, the last requests. For the time that is left.
BESIDES = 0.4
# From this share of one core on, the client is what limits the throughput.
CLIENT_BUSY = 0.9


# Not slotted: the histograms of all rounds are added up once.
@dataclass(frozen=True)
class Row:
    """One cell, all its rounds."""

    cell: Cell
    rounds: tuple[Measured, ...]

    @property
    def throughputs(self) -> tuple[float, ...]:
        """Requests a second, by round."""
        return tuple(one.throughput for one in self.rounds)

    @property
    def throughput(self) -> float:
        """Requests a second, over all rounds."""
        return sum(one.completed for one in self.rounds) / sum(one.seconds for one in self.rounds)

    @cached_property
    def latencies(self) -> Histogram:
        """Of all rounds."""
        return Histogram.of_all(one.latencies for one in self.rounds)

    @cached_property
    def waits(self) -> Histogram:
        """Of all rounds."""
        return Histogram.of_all(one.waits for one in self.rounds)

    @property
    def wait_share(self) -> float:
        """Share of those who asked for a connection that had to wait, more than 0.1 ms."""
        asked = sum(one.asked for one in self.rounds)
        return sum(one.queued for one in self.rounds) / asked if asked else 0.0

    @property
    def failed(self) -> float:
        """Share of the requests that failed, were shed, or were not finished."""
        failed = sum(one.failed for one in self.rounds)
        every = failed + sum(len(one.latencies) for one in self.rounds)
        return failed / every if every else 0.0

    @cached_property
    def server(self) -> ServerSide:
        """What the server did, on average."""
        return summarise(look for one in self.rounds for look in one.samples)

    def mean(self, name: str) -> float:
        """Of a number of each round: `hold`, `in_use`, `queue`, `client_cpu`."""
        return float(sum(getattr(one, name) for one in self.rounds)) / len(self.rounds)


@dataclass(frozen=True, slots=True)
class Sweep:
    """What all the measurements say."""

    rows: tuple[Row, ...]
    fit: Fit | None
    unfitted: str
    """Why there is no fit; empty where there is one."""
    advice: Advice

    def of(self, kind: Kind) -> tuple[Row, ...]:
        """The rows of one kind, by size."""
        return tuple(row for row in self.rows if row.cell.kind == kind)


def plan(options: Options) -> list[list[Cell]]:
    """The cells of each round, in the order in which they are measured: shuffled anew, by the seed."""
    rng = random.Random(f"{options.seed} order")
    rounds = []
    for _ in range(options.rounds):
        cells = [Cell(size, kind) for size in options.sizes for kind in KINDS]
        rng.shuffle(cells)
        rounds.append(cells)
    return rounds


def planned_seconds(options: Options) -> float:
    """Of one measurement, about."""
    return options.warmup + options.seconds + BESIDES


async def sweep(dsn: str, options: Options, workload: Workload, watcher: Any, progress: Progress) -> Sweep:
    """Measure all of it."""
    found: dict[Cell, list[Measured]] = {}
    for number, cells in enumerate(plan(options), 1):
        for cell in cells:
            progress(0.0, f"round {number} of {options.rounds}, {cell.kind}, size {cell.size}")
            one = await measure(dsn, options, workload, cell, round_number=number, watcher=watcher)
            found.setdefault(cell, []).append(one)
            progress(planned_seconds(options), "")
    cells = [Cell(size, kind) for kind in KINDS for size in options.sizes]
    return conclude([Row(cell, tuple(found[cell])) for cell in cells], options)


def conclude(rows: Sequence[Row], options: Options) -> Sweep:
    """Fit the model and recommend a size, from the engine's rows."""
    ours = [row for row in rows if row.cell.kind == "dbop_raw"]
    unfitted, law = "", None
    if options.rate is not None:
        unfitted = "in an open loop the throughput is the rate that was asked for, not what the pool could do"
    else:
        pairs = [(row.cell.size, value) for row in ours for value in row.throughputs]
        law = fit([size for size, _ in pairs], [value for _, value in pairs], seed=options.seed)
        if law is None:
            unfitted = "it needs four sizes with a throughput above 0, and a curve that fits them"
    cores = options.cores or os.cpu_count() or 1
    advice = recommend([_point(row) for row in ours], cores=cores, limit=_limit(ours))
    return Sweep(tuple(rows), law, unfitted, advice)


def _point(row: Row) -> SizePoint:
    p99 = tuple(one.latencies.at(99) for one in row.rounds)
    return SizePoint(row.cell.size, row.throughputs, p99, row.waits.at(99), row.failed)


def _limit(rows: Sequence[Row]) -> str:
    busiest = max(row.mean("client_cpu") for row in rows)
    if busiest < CLIENT_BUSY:
        return ""
    return (
        f"The client was the limit: its one Python process used {busiest:.0%} of a core, so this is the size "
        "for one such process; the server may have room for more of them."
    )
