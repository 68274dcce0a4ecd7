"""One run from the first connection to the report."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import anyio
import asyncpg

from bench.pool import spike as bursts
from bench.pool import sweep as sizes
from bench.pool.about import about, load_now, server_settings, unquiet
from bench.pool.chart import draw_spike, draw_sweep
from bench.pool.data import spike_data, sweep_data
from bench.pool.errors import BadOption
from bench.pool.measure import run_once
from bench.pool.options import Options
from bench.pool.report import Report
from bench.pool.tables import spike_tables, sweep_tables
from bench.pool.workloads import BUILT_IN, Workload, prepare_schema, remove_schema
from bench.progress import progress_bar

__all__ = ["run_spike", "run_sweep"]

CONNECT_SECONDS = 15.0
# For the first request, which shows whether the workload works at all.
FIRST_SECONDS = 60.0
# The watcher, and one for whoever else has to look.
SPARE = 2


async def run_sweep(dsn: str, options: Options, workload: Workload) -> Report:
    """Measure all sizes. Raises `BadOption` for a server or a workload that can't be used."""
    load = load_now()
    async with _ready(dsn, options, workload) as watcher:
        header = about(options, await server_settings(watcher), load)
        total = options.rounds * len(options.sizes) * 2 * sizes.planned_seconds(options)
        with progress_bar(total) as progress:
            found = await sizes.sweep(dsn, options, workload, watcher, progress)
    title = f"Pool size: {workload.name}, {_load(options)}"
    return Report(
        name="pool",
        title=title,
        sentences=(found.advice.sentence, found.advice.formula, _what(workload), *unquiet(load)),
        tables=sweep_tables(found),
        about=header,
        data=sweep_data(found),
        png=draw_sweep(found, title),
        picture="throughput, 99th percentile, wait share and the server's waits over the size of the pool",
    )


async def run_spike(dsn: str, options: Options, workload: Workload) -> Report:
    """Send the bursts. Raises `BadOption` for a server or a workload that can't be used."""
    load = load_now()
    async with _ready(dsn, options, workload) as watcher:
        header = about(options, await server_settings(watcher), load)
        with progress_bar(options.rounds * 2 * bursts.planned_seconds(options)) as progress:
            found = await bursts.spike(dsn, options, workload, progress)
    title = f"A burst of {options.burst} requests: {workload.name}"
    return Report(
        name="pool-spike",
        title=title,
        sentences=(found.sentence, _what(workload), *unquiet(load)),
        tables=spike_tables(found),
        about=header,
        data=spike_data(found),
        png=draw_spike(found, title),
        picture="how many requests of a burst were answered within a time, for both kinds of pool",
    )


def _what(workload: Workload) -> str:
    return f"Workload: {workload.description}."


def _load(options: Options) -> str:
    if options.rate is None:
        return f"closed loop of {options.clients} clients"
    return f"open loop of {options.rate:g} requests/s"


@contextlib.asynccontextmanager
async def _ready(dsn: str, options: Options, workload: Workload) -> AsyncIterator[Any]:
    """A connection to watch the server with; the workload's tables are there, and a request was tried."""
    watcher = await _connect(dsn)
    made = False
    try:
        await _check_room(watcher, options.sizes[-1])
        try:
            if workload.name in BUILT_IN:
                await prepare_schema(watcher)
                made = True
            await workload.setup(watcher)
            async with asyncio.timeout(FIRST_SECONDS):
                await run_once(dsn, options, workload)
        except BadOption:
            raise
        except Exception as exc:
            # The SQL or the code is the user's own: whatever it raises is theirs to read.
            raise BadOption(f"{workload.name}: a first request failed: {type(exc).__name__}: {exc}") from exc
        yield watcher
    finally:
        with anyio.move_on_after(CONNECT_SECONDS, shield=True):
            if made and not watcher.is_closed():
                await _remove(watcher)
            await watcher.close()


async def _remove(watcher: Any) -> None:
    # An error of the run itself is what a person wants to read, not what it did to the cleaning up.
    with contextlib.suppress(asyncpg.PostgresError, asyncpg.InterfaceError, BadOption):
        await remove_schema(watcher)


async def _connect(dsn: str) -> Any:
    try:
        return await asyncpg.connect(dsn, timeout=CONNECT_SECONDS)
    except TimeoutError:
        raise BadOption(f"--dsn: no answer within {CONNECT_SECONDS:g} s") from None
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as exc:
        raise BadOption(f"--dsn: can't connect: {type(exc).__name__}: {exc}") from None
    except ValueError:
        # Its text may quote a part of the password.
        raise BadOption(
            "--dsn: it can't be read: give postgresql://user:password@host:port/database"
        ) from None


async def _check_room(watcher: Any, size: int) -> None:
    row = await watcher.fetchrow(
        "SELECT pg_catalog.current_setting('max_connections')::int AS most, "
        "pg_catalog.current_setting('superuser_reserved_connections')::int AS kept, "
        "(SELECT count(*) FROM pg_catalog.pg_stat_activity WHERE backend_type = 'client backend') AS taken"
    )
    room = row["most"] - row["kept"] - row["taken"] - SPARE
    if size > room:
        raise BadOption(
            f"--sizes: {size} connections are more than the server has room for: {room} (max_connections is "
            f"{row['most']}, {row['taken']} are taken)"
        )
