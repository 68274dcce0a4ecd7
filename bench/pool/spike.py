"""The spike: a burst of short requests on a pool that was idle, while opening a connection is slow.

A pool that grows on demand opens a connection for each request that finds none idle, and that request waits
until it is open, though one that is open already would have been free much sooner. A pool that is full from
the start has nothing to open.
"""

from __future__ import annotations

import asyncio
import functools
import random
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import asyncpg

from bench.pool.histogram import Histogram
from bench.pool.load import DRAIN, Load, Window
from bench.pool.measure import open_pool, sender
from bench.pool.options import Options
from bench.pool.timedpool import TimedPool
from bench.pool.workloads import Workload
from bench.progress import Progress

__all__ = ["Burst", "Spike", "SpikeRow", "spike"]

# A burst takes about this long, in seconds, beside what opening connections takes: for the time that is left.
BESIDES = 1.0


@dataclass(frozen=True, slots=True)
class Burst:
    """One burst."""

    latencies: Histogram
    waits: Histogram
    seconds: float
    """Until the last request was done."""
    opened: int
    """Connections opened meanwhile."""
    errors: Counter[str]


# Not slotted: the histograms of all bursts are added up once.
@dataclass(frozen=True)
class SpikeRow:
    """One kind of pool, all its bursts."""

    least: int
    size: int
    bursts: tuple[Burst, ...]

    @property
    def name(self) -> str:
        """For a person."""
        return f"{'full' if self.least == self.size else 'grows'}, {self.least} to {self.size}"

    @cached_property
    def latencies(self) -> Histogram:
        """Of all bursts."""
        return Histogram.of_all(one.latencies for one in self.bursts)

    @cached_property
    def waits(self) -> Histogram:
        """Of all bursts."""
        return Histogram.of_all(one.waits for one in self.bursts)

    def mean(self, name: str) -> float:
        """Of a number of each burst: `seconds`, `opened`."""
        return float(sum(getattr(one, name) for one in self.bursts)) / len(self.bursts)


@dataclass(frozen=True, slots=True)
class Spike:
    """What the bursts say."""

    rows: tuple[SpikeRow, ...]
    sentence: str


async def spike(dsn: str, options: Options, workload: Workload, progress: Progress) -> Spike:
    """Send the bursts: for each round one to each kind of pool, in an order by the seed."""
    size = options.sizes[-1]
    kinds = [1, size]
    found: dict[int, list[Burst]] = {least: [] for least in kinds}
    rng = random.Random(f"{options.seed} order")
    for number in range(1, options.rounds + 1):
        rng.shuffle(kinds)
        for least in kinds:
            progress(0.0, f"round {number} of {options.rounds}, min_size {least}, max_size {size}")
            found[least].append(await _burst(dsn, options, workload, least, number))
            progress(planned_seconds(options), "")
    rows = tuple(SpikeRow(least, size, tuple(bursts)) for least, bursts in found.items())
    return Spike(rows, _sentence(rows, options))


def planned_seconds(options: Options) -> float:
    """Of one burst, about."""
    return BESIDES + 2 * options.connect_delay


async def _burst(dsn: str, options: Options, workload: Workload, least: int, number: int) -> Burst:
    size, opened = options.sizes[-1], 0

    async def connect(*args: Any, **kwargs: Any) -> asyncpg.Connection:
        # As a server far away, with TLS and a slow authentication, or one that forks slowly under load.
        nonlocal opened
        await asyncio.sleep(options.connect_delay)
        conn: asyncpg.Connection = await asyncpg.connect(*args, **kwargs)
        opened += 1
        return conn

    async with open_pool(dsn, size, least=least, connect=connect) as plain:
        pool = TimedPool(plain)
        run = sender(pool, "dbop_raw", options)
        # The pool is idle, not cold: what is open has run such a request before.
        rng = random.Random(f"{options.seed} {number}")
        await run(workload.make(rng))
        opened = 0
        clock = asyncio.get_running_loop().time
        start = clock()
        load = Load(Window(start, start + DRAIN + options.acquire_timeout))
        pool.record(start, load.window.end)
        async with asyncio.TaskGroup() as group:
            for _ in range(options.burst):
                send = functools.partial(run, workload.make(rng))
                group.create_task(load.one(send, start, clock))
        return Burst(
            Histogram(load.latencies), Histogram(pool.waits.seconds), clock() - start, opened, load.errors
        )


def _sentence(rows: tuple[SpikeRow, ...], options: Options) -> str:
    growing, full = rows[0].latencies.spread(), rows[-1].latencies.spread()
    if rows[0].size == 1 or not full.p99 or not growing.p99:
        return "The data can't decide: a pool of one connection can't grow, or no request succeeded."
    slow, quick = f"{growing.p99 * 1000:.0f} ms", f"{full.p99 * 1000:.0f} ms"
    return (
        f"A burst of {options.burst} requests, {options.connect_delay * 1000:.3g} ms to open a connection: "
        f"in a pool that grows on demand (min_size 1, max_size {rows[0].size}) the p99 is {slow}, "
        f"{growing.p99 / full.p99:.1f} times that of a pool that is full from the start ({quick})."
    )
