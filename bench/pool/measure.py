"""One measurement: one size of pool, with the engine or with plain asyncpg, for a few seconds."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

import anyio
import asyncpg

from bench.pool.histogram import Histogram
from bench.pool.load import DRAIN, Load, Send, Window, closed_loop, open_loop
from bench.pool.options import Options
from bench.pool.sampler import APPLICATION, Sample, sample
from bench.pool.timedpool import TimedPool
from bench.pool.workloads import Request, Workload
from dbop_raw import Engine

__all__ = ["KINDS", "Cell", "Kind", "Measured", "measure", "open_pool", "run_once"]

Kind = Literal["dbop_raw", "asyncpg"]
KINDS: tuple[Kind, ...] = ("dbop_raw", "asyncpg")

CLOSING = 5.0


@dataclass(frozen=True, slots=True)
class Cell:
    """What is measured."""

    size: int
    kind: Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What came out of it; times in seconds."""

    cell: Cell
    seconds: float
    completed: int
    latencies: Histogram
    waits: Histogram
    """For a connection; those that waited for nothing count too."""
    asked: int
    """How many asked for a connection."""
    queued: int
    """How many had to wait."""
    errors: Counter[str]
    shed: int
    unfinished: int
    hold: float
    """That a request held its connection, on average."""
    in_use: float
    """Connections, on average over the time."""
    queue: float
    """Callers that waited for one, on average over the time."""
    client_cpu: float
    """Of one core, that this process used: near 1 it is the limit, and not the server."""
    samples: tuple[Sample, ...]

    @property
    def throughput(self) -> float:
        """Requests a second."""
        return self.completed / self.seconds

    @property
    def failed(self) -> int:
        """Errors, sheds and what was not finished."""
        return sum(self.errors.values()) + self.shed + self.unfinished


@contextlib.asynccontextmanager
async def open_pool(
    dsn: str, size: int, *, least: int | None = None, **more: Any
) -> AsyncIterator[asyncpg.Pool]:
    """A pool of `size` connections, all open from the start, or at `least` so many."""
    pool = await asyncpg.create_pool(
        dsn,
        min_size=size if least is None else least,
        max_size=size,
        max_inactive_connection_lifetime=0,
        server_settings={"application_name": APPLICATION},
        **more,
    )
    try:
        yield pool
        with anyio.move_on_after(CLOSING, shield=True):
            await pool.close()
    finally:
        pool.terminate()


def sender(pool: TimedPool, cell_kind: Kind, options: Options) -> Callable[[Request], Awaitable[object]]:
    """How a request is sent: by an engine, or as plain asyncpg code would."""
    if cell_kind == "dbop_raw":
        engine = Engine(
            pool.as_pool(), acquire_timeout=options.acquire_timeout, max_waiting=options.max_waiting
        )
        return lambda request: engine.run(request.operation, autocommit=not request.transaction)

    async def bare(request: Request) -> None:
        conn = await pool.acquire()
        try:
            if request.transaction:
                async with conn.transaction():
                    await request.bare(conn)
            else:
                await request.bare(conn)
        finally:
            await pool.release(conn)

    return bare


async def run_once(dsn: str, options: Options, workload: Workload) -> None:
    """Try one request, so that what can't work is an error before the measuring begins."""
    async with open_pool(dsn, 1) as pool:
        await sender(TimedPool(pool), "dbop_raw", options)(workload.make(random.Random(options.seed)))


async def measure(
    dsn: str, options: Options, workload: Workload, cell: Cell, *, round_number: int, watcher: Any
) -> Measured:
    """Measure a cell; `watcher` is a connection to look at the server with."""
    await workload.clear(watcher)
    async with open_pool(dsn, cell.size) as plain:
        pool = TimedPool(plain)
        # The same requests, at the same moments in an open loop, for all cells of a round.
        rng = random.Random(f"{options.seed} {round_number} requests")
        run = sender(pool, cell.kind, options)
        start = asyncio.get_running_loop().time() + options.warmup
        window = Window(start, start + options.seconds)
        pool.record(window.start, window.end)
        async with asyncio.TaskGroup() as group:
            looking = group.create_task(sample(watcher, pool, window))
            metering = group.create_task(_meter(pool, window))
            load = await _load(lambda: run(workload.make(rng)), window, options, round_number)
    return _measured(cell, load, pool, looking.result(), metering.result())


async def _load(send: Send, window: Window, options: Options, round_number: int) -> Load:
    if options.rate is None:
        return await closed_loop(send, window, clients=options.clients)
    rng = random.Random(f"{options.seed} {round_number} arrivals")
    drain = max(DRAIN, options.acquire_timeout + 1)
    return await open_loop(send, window, rate=options.rate, rng=rng, drain=drain)


@dataclass(frozen=True, slots=True)
class _Meter:
    in_use: float
    queue: float
    client_cpu: float


async def _meter(pool: TimedPool, window: Window) -> _Meter:
    """Means over the window: read at its start and at its end."""
    clock = asyncio.get_running_loop().time
    await asyncio.sleep(window.start - clock())
    began, (used, queued), cpu = clock(), pool.totals(), time.process_time()
    await asyncio.sleep(window.end - clock())
    passed, (used_then, queued_then) = clock() - began, pool.totals()
    cpu = time.process_time() - cpu
    return _Meter((used_then - used) / passed, (queued_then - queued) / passed, cpu / passed)


def _measured(cell: Cell, load: Load, pool: TimedPool, samples: list[Sample], meter: _Meter) -> Measured:
    waits = pool.waits
    return Measured(
        cell=cell,
        seconds=load.window.seconds,
        completed=load.completed,
        latencies=Histogram(load.latencies),
        waits=Histogram(waits.seconds),
        asked=len(waits.seconds) + waits.given_up,
        queued=waits.queued,
        errors=load.errors,
        shed=load.shed,
        unfinished=load.unfinished,
        hold=waits.held / waits.given_back if waits.given_back else 0.0,
        in_use=meter.in_use,
        queue=meter.queue,
        client_cpu=meter.client_cpu,
        samples=tuple(samples),
    )
