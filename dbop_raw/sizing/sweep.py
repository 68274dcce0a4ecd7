"""All that is measured, in rounds: each measures every cell once, in an order of its own.

The cells are the sizes, with the engine and without; or, for the spike, a pool that is full from the start
and one that grows on demand, which has its connections to open while the burst waits.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from dbop_raw.sizing.measure import KINDS, Cell, Kind, Means, Measured, measure, summarise
from dbop_raw.sizing.model import Fit, Spread, fit, percentiles
from dbop_raw.sizing.options import Options
from dbop_raw.sizing.recommend import Advice, SizePoint, recommend
from dbop_raw.sizing.workloads import Workload

__all__ = ["Progress", "Row", "Sweep", "conclude", "plan", "planned_seconds", "spike_sentence", "sweep"]

Progress = Callable[[float, str], None]
"""Told of the seconds that the last step was planned to take, and of what comes next."""

# Beyond warm-up and window: connecting, clearing, the last requests; and a burst. For the time that is left.
_BESIDES, _BURST_SECONDS = 0.4, 1.0
# From this share of one core on, the client is what limits the throughput.
_CLIENT_BUSY = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One cell, over all its rounds; times in seconds, shares from 0 to 1."""

    cell: Cell
    throughput: float
    """Requests a second."""
    latency: Spread
    wait: Spread
    """For a connection, of all that asked for one."""
    wait_share: float
    failed_share: float
    """Of the requests: those that failed, were shed, or were not finished."""
    hold: float
    """That a request held its connection, on average."""
    in_use_by_little: float
    """Connections, as throughput times the mean hold."""
    client_cpu: float
    seen: Means
    """Of what the samples saw."""
    rounds: tuple[Measured, ...]

    @staticmethod
    def of(cell: Cell, rounds: Sequence[Measured]) -> Row:
        """Add up, or average, what the rounds found."""
        latencies = np.concatenate([one.load.latencies for one in rounds])
        failed = sum(one.load.failed for one in rounds)
        throughput, hold = fmean(one.throughput for one in rounds), fmean(one.hold for one in rounds)
        return Row(
            cell=cell,
            throughput=throughput,
            latency=Spread.of(latencies),
            wait=Spread.of(np.concatenate([one.waits for one in rounds])),
            wait_share=sum(one.queued for one in rounds) / max(1, sum(one.asked for one in rounds)),
            failed_share=failed / max(1, failed + len(latencies)),
            hold=hold,
            in_use_by_little=throughput * hold,
            client_cpu=fmean(one.client_cpu for one in rounds),
            seen=summarise(look for one in rounds for look in one.samples),
            rounds=tuple(rounds),
        )

    @property
    def throughputs(self) -> tuple[float, ...]:
        """Requests a second, by round."""
        return tuple(one.throughput for one in self.rounds)

    @property
    def p99s(self) -> tuple[float, ...]:
        """Seconds, by round."""
        return tuple(percentiles(one.load.latencies, (99,))[0] for one in self.rounds)


def plan(options: Options) -> list[list[Cell]]:
    """The cells of each round, in the order in which they are measured: shuffled anew, by the seed."""
    rng = random.Random(f"{options.seed} order")
    cells = _cells(options)
    return [rng.sample(cells, len(cells)) for _ in range(options.rounds)]


def _cells(options: Options) -> list[Cell]:
    if options.spike:
        size = options.sizes[-1]
        return [Cell(size, "dbop_raw", least) for least in dict.fromkeys((1, size))]
    return [Cell(size, kind) for kind in KINDS for size in options.sizes]


def planned_seconds(options: Options) -> float:
    """Of the whole, about."""
    one = options.warmup + options.seconds + _BESIDES
    if options.spike:
        one = _BURST_SECONDS + 2 * options.connect_delay
    return one * options.rounds * len(_cells(options))


async def sweep(
    dsn: str, options: Options, workload: Workload, watcher: Any, progress: Progress
) -> list[Row]:
    """Measure it all; `watcher` is the connection that `ready` gave."""
    found: dict[Cell, list[Measured]] = {cell: [] for cell in _cells(options)}
    step = planned_seconds(options) / options.rounds / len(found)
    for number, cells in enumerate(plan(options), 1):
        for cell in cells:
            least = "" if cell.least is None else f", min_size {cell.least}"
            progress(0.0, f"round {number} of {options.rounds}, {cell.kind}, size {cell.size}{least}")
            one = await measure(dsn, options, workload, cell, round_number=number, watcher=watcher)
            found[cell].append(one)
            progress(step, "")
    return [Row.of(cell, rounds) for cell, rounds in found.items()]


# --- what it says


@dataclass(frozen=True, slots=True)
class Sweep:
    """What the sizes say."""

    rows: tuple[Row, ...]
    fit: Fit | None
    unfitted: str
    """Why there is no fit; empty where there is one."""
    advice: Advice

    def of(self, kind: Kind) -> tuple[Row, ...]:
        """The rows of one kind, by size."""
        return tuple(row for row in self.rows if row.cell.kind == kind)


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
            unfitted = "it needs four sizes, each with a throughput above 0"
    points = [
        SizePoint(row.cell.size, row.throughputs, row.p99s, row.wait.p99, row.failed_share) for row in ours
    ]
    advice = recommend(points, cores=options.cores or os.cpu_count() or 1, limit=_limit(ours))
    return Sweep(tuple(rows), law, unfitted, advice)


def _limit(rows: Sequence[Row]) -> str:
    busiest = max(row.client_cpu for row in rows)
    if busiest < _CLIENT_BUSY:
        return ""
    return (
        f"The client was the limit: its one Python process used {busiest:.0%} of a core, so this is the size "
        "for one such process; the server may have room for more of them."
    )


def spike_sentence(rows: Sequence[Row], options: Options) -> str:
    """What the bursts say."""
    growing, full = rows[0].latency.p99, rows[-1].latency.p99
    if len(rows) == 1 or not full or not growing:
        return "The data can't decide: a pool of one connection can't grow, or no request succeeded."
    return (
        f"A burst of {options.burst} requests, {options.connect_delay * 1000:.3g} ms to open a connection: "
        f"in a pool that grows on demand (min_size 1, max_size {rows[0].cell.size}) the p99 is "
        f"{growing * 1000:.0f} ms, {growing / full:.1f} times that of a pool that is full from the start "
        f"({full * 1000:.0f} ms)."
    )
