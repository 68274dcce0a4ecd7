"""One measurement: a pool of one size, by an engine or by plain asyncpg code, for a few seconds or one burst.

What the server does meanwhile is seen in pg_stat_activity, over a connection of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import anyio
import asyncpg

from dbop_raw.sizing.contenders import Bare, Contender, Ours
from dbop_raw.sizing.load import DRAIN, Load, Send, Window, burst, closed_loop, open_loop
from dbop_raw.sizing.options import BadOption, Options
from dbop_raw.sizing.workloads import BUILT_IN, Workload, prepare_schema, remove_schema

__all__ = ["KINDS", "Cell", "Kind", "Means", "Measured", "Sample", "measure", "ready", "summarise"]

Kind = Literal["dbop_raw", "asyncpg"]
KINDS: tuple[Kind, ...] = ("dbop_raw", "asyncpg")

# The application_name of the connections that are measured: only they are looked at.
_APPLICATION = "dbop-raw pool-size"
_CONNECT_SECONDS, _CLOSE_SECONDS = 15.0, 5.0
# For the first request, which shows whether the workload works at all.
_FIRST_SECONDS = 60.0
# Connections that the server needs beyond the largest pool: the watcher, and one for whoever has to look.
_SPARE = 2


@dataclass(frozen=True, slots=True)
class Cell:
    """What is measured."""

    size: int
    kind: Kind
    least: int | None = None
    """Connections that are open from the start. None: all."""


class Sample(NamedTuple):
    """One look at the pool and at the server."""

    at: float
    """Seconds from the start of the window."""
    in_use: int
    waiting: int
    """Callers that wait for a connection of the pool."""
    active: int
    """Backends that work on a statement, waiting ones too."""
    blocked: int
    """Of these, those that wait for something inside the server."""
    events: tuple[tuple[str, int], ...]
    """What the backends in a transaction or a statement do: (`CPU` or `type:event`, how many)."""


@dataclass(frozen=True, slots=True)
class Means:
    """Means over all samples, of the pool and of the server; 0 where there were none."""

    samples: int
    in_use: float
    """Connections that were taken from the pool."""
    queue: float
    """Callers that waited for one."""
    active: float
    blocked: float
    events: dict[str, float]
    """Mean number of backends by what they did, most first. `CPU`: none of the server's own waits (it ran, or
    wanted to); `Client:ClientRead`: in a transaction, and waiting for the client's next statement.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What came out of one measurement; times in seconds."""

    cell: Cell
    load: Load
    throughput: float
    """Requests a second."""
    waits: array[float]
    """For a connection; those that waited for nothing count too."""
    asked: int
    """How many asked for a connection."""
    queued: int
    """How many of them had to wait, more than 0.1 ms."""
    hold: float
    """That a request held its connection, on average."""
    opened: int = 0
    """Of a burst: connections opened meanwhile. What follows is of the others."""
    client_cpu: float = 0.0
    """Of one core, that this process used: near 1 it is the limit, and not the server."""
    samples: Sequence[Sample] = ()


# --- the server is ready


@contextlib.asynccontextmanager
async def ready(dsn: str, options: Options, workload: Workload) -> AsyncIterator[Any]:
    """Make the workload's tables and try one request; gives a connection to watch the server with.

    Raises:
        BadOption: The server, or the workload on it, can't be used; the message says why.
    """
    watcher = await _connect(dsn)
    made = False
    try:
        await _check_room(watcher, options.sizes[-1])
        try:
            if workload.name in BUILT_IN:
                await prepare_schema(watcher)
                made = True
                await watcher.execute(workload.setup)
            async with asyncio.timeout(_FIRST_SECONDS), _open_pool(dsn, Cell(1, "dbop_raw"), 0.0) as pool:
                await Ours(pool, options).send(workload.make(random.Random(options.seed)))
        except BadOption:
            raise
        except Exception as exc:
            # The SQL or the code is the user's own: whatever it raises is theirs to read.
            raise BadOption(f"{workload.name}: a first request failed: {type(exc).__name__}: {exc}") from exc
        yield watcher
    finally:
        with anyio.move_on_after(_CONNECT_SECONDS, shield=True):
            # An error of the run itself is what a person wants to read, not what it did to the cleaning up.
            with contextlib.suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
                if made:
                    await remove_schema(watcher)
            await watcher.close()


async def _connect(dsn: str) -> Any:
    try:
        return await asyncpg.connect(dsn, timeout=_CONNECT_SECONDS)
    except TimeoutError:
        raise BadOption(f"--dsn: no answer within {_CONNECT_SECONDS:g} s") from None
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
    room = row["most"] - row["kept"] - row["taken"] - _SPARE
    if size > room:
        raise BadOption(
            f"--sizes: {size} connections are more than the server has room for: {room} (max_connections is "
            f"{row['most']}, {row['taken']} are taken)"
        )


# --- a measurement


@contextlib.asynccontextmanager
async def _open_pool(dsn: str, cell: Cell, connect_delay: float) -> AsyncIterator[asyncpg.Pool]:
    """A pool for a cell; each connection takes `connect_delay` seconds more to open than it takes anyway."""

    async def connect(*args: Any, **kwargs: Any) -> asyncpg.Connection:
        # As a server far away, with TLS and a slow authentication, or one that forks slowly under load.
        await asyncio.sleep(connect_delay)
        conn: asyncpg.Connection = await asyncpg.connect(*args, **kwargs)
        return conn

    pool = await asyncpg.create_pool(
        dsn,
        min_size=cell.least or cell.size,
        max_size=cell.size,
        max_inactive_connection_lifetime=0,
        server_settings={"application_name": _APPLICATION},
        connect=connect,
    )
    try:
        yield pool
        with anyio.move_on_after(_CLOSE_SECONDS, shield=True):
            await pool.close()
    finally:
        pool.terminate()


async def measure(
    dsn: str, options: Options, workload: Workload, cell: Cell, *, round_number: int, watcher: Any
) -> Measured:
    """Measure a cell once.

    Args:
        dsn: The server's.
        options: How long, and with what load.
        workload: What the requests are.
        cell: The pool, and who uses it.
        round_number: Of it and the seed come the requests and the arrivals: a round's cells get the same.
        watcher: The connection that `ready` gave.
    """
    if workload.clear:
        await watcher.execute(workload.clear)
    rng = random.Random(f"{options.seed} {round_number} requests")
    async with _open_pool(dsn, cell, options.connect_delay if options.spike else 0.0) as pool:
        who = Ours(pool, options) if cell.kind == "dbop_raw" else Bare(pool)
        if options.spike:
            # The pool is idle, not cold: what is open has run such a request before.
            await who.send(workload.make(rng))
            opened, (held, count) = pool.get_size(), who.holds()
            who.waits.window = Window(asyncio.get_running_loop().time(), float("inf"))
            load = await burst([partial(who.send, workload.make(rng)) for _ in range(options.burst)])
            held, count = who.holds()[0] - held, who.holds()[1] - count
            seen: dict[str, Any] = {"opened": pool.get_size() - opened, "hold": held / max(1, count)}
        else:
            arrivals = random.Random(f"{options.seed} {round_number} arrivals")
            load, seen = await _watched(who, lambda: who.send(workload.make(rng)), options, arrivals, watcher)
    waits = who.waits
    return Measured(
        cell=cell,
        load=load,
        throughput=load.completed / load.window.seconds,
        waits=waits.seconds,
        asked=waits.asked,
        queued=waits.queued,
        **seen,
    )


async def _watched(
    who: Contender, send: Send, options: Options, arrivals: random.Random, watcher: Any
) -> tuple[Load, dict[str, Any]]:
    """The load of one window, and what was seen meanwhile."""
    start = asyncio.get_running_loop().time() + options.warmup
    who.waits.window = window = Window(start, start + options.seconds)
    async with asyncio.TaskGroup() as group:
        looking = group.create_task(_look(watcher, who))
        metering = group.create_task(_meter(who))
        if options.rate is None:
            load = await closed_loop(send, window, clients=options.clients)
        else:
            drain = max(DRAIN, options.acquire_timeout + 1)
            load = await open_loop(send, window, rate=options.rate, rng=arrivals, drain=drain)
    return load, {"samples": looking.result(), **metering.result()}


async def _meter(who: Contender) -> dict[str, float]:
    """Means over the window: of a hold, and this process's share of a core."""
    clock, window = asyncio.get_running_loop().time, who.waits.window
    await asyncio.sleep(window.start - clock())
    began, cpu, (held, count) = clock(), time.process_time(), who.holds()
    await asyncio.sleep(window.end - clock())
    held_then, count_then = who.holds()
    return {
        "hold": (held_then - held) / max(1, count_then - count),
        "client_cpu": (time.process_time() - cpu) / (clock() - began),
    }


# --- the server meanwhile

# At most so many looks, and no more than one in so many seconds: one costs the server about a millisecond.
_LOOKS, _LOOK_PAUSE = 50, 0.05
_QUERY = """
SELECT state, wait_event_type AS type, wait_event AS event, count(*) AS backends
FROM pg_catalog.pg_stat_activity
WHERE application_name = $1 AND pid <> pg_catalog.pg_backend_pid() GROUP BY 1, 2, 3
"""
_ON_CPU, _OUTSIDE = "CPU", "Client:ClientRead"


async def _look(conn: Any, who: Contender) -> list[Sample]:
    """Look at the server over `conn` and at the pool, evenly over the window."""
    clock, window = asyncio.get_running_loop().time, who.waits.window
    step = max(_LOOK_PAUSE, window.seconds / _LOOKS)
    samples: list[Sample] = []
    moment = window.start + step / 2
    while moment < window.end:
        await asyncio.sleep(max(0.0, moment - clock()))
        at, (in_use, waiting) = clock() - window.start, who.gauge()
        samples.append(_sample(at, in_use, waiting, await conn.fetch(_QUERY, _APPLICATION)))
        # A look that came late leaves out those it ran into.
        while (moment := moment + step) < clock():
            pass
    return samples


def _sample(at: float, in_use: int, waiting: int, rows: Iterable[Any]) -> Sample:
    events: Counter[str] = Counter()
    active = blocked = 0
    for row in rows:
        state, count = row["state"] or "", int(row["backends"])
        name = f"{row['type']}:{row['event']}" if row["type"] else _ON_CPU
        if state == "active":
            active += count
            # A backend that is handed its next statement still shows the wait for the client for a moment.
            blocked += count if row["type"] and name != _OUTSIDE else 0
        if state == "active" or state.startswith("idle in transaction"):
            events[name] += count
    return Sample(at, in_use, waiting, active, blocked, tuple(events.most_common()))


def summarise(samples: Iterable[Sample]) -> Means:
    """Means of samples, of one window or of several."""
    looks = list(samples)
    count, events = len(looks) or 1, Counter[str]()
    for look in looks:
        events.update(dict(look.events))
    return Means(
        samples=len(looks),
        in_use=sum(look.in_use for look in looks) / count,
        queue=sum(look.waiting for look in looks) / count,
        active=sum(look.active for look in looks) / count,
        blocked=sum(look.blocked for look in looks) / count,
        events={name: total / count for name, total in events.most_common()},
    )
