"""What the server does meanwhile, by pg_stat_activity, and how full the pool is: sampled now and then."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from bench.pool.load import Window
from bench.pool.timedpool import TimedPool

__all__ = ["APPLICATION", "Sample", "ServerSide", "sample", "summarise"]

APPLICATION = "dbop_raw bench pool"
"""The application_name of the connections that are measured: the sampler sees only them."""

_QUERY = """
SELECT state, wait_event_type AS type, wait_event AS event, count(*) AS backends
FROM pg_catalog.pg_stat_activity
WHERE application_name = $1 AND pid <> pg_catalog.pg_backend_pid() GROUP BY 1, 2, 3
"""
ON_CPU = "CPU"
OUTSIDE = "Client:ClientRead"


@dataclass(frozen=True, slots=True)
class Sample:
    """One look."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSide:
    """Means over all samples; 0 where there were none."""

    samples: int
    active: float
    blocked: float
    events: dict[str, float] = field(default_factory=dict)
    """Mean number of backends by what they did, most first. `CPU`: none of the server's own waits (it ran, or
    wanted to); `Client:ClientRead`: in a transaction, and waiting for the client's next statement.
    """


async def sample(conn: Any, pool: TimedPool, window: Window, *, looks: int = 50) -> list[Sample]:
    """Look at the server over `conn` and at the pool, evenly over the window, `looks` times or fewer.

    At most 20 times a second: a look costs the server about a millisecond. Never raises for a server that
    does not answer in time: then there are fewer samples.
    """
    clock = asyncio.get_running_loop().time
    step = max(0.05, window.seconds / looks)
    samples: list[Sample] = []
    moment = window.start + step / 2
    while moment < window.end:
        await asyncio.sleep(max(0.0, moment - clock()))
        in_use, waiting = pool.in_use, pool.waiting
        at = clock() - window.start
        rows = await conn.fetch(_QUERY, APPLICATION)
        samples.append(_sample(at, in_use, waiting, rows))
        moment += step
        # A look that came late leaves out those it ran into.
        while moment < clock():
            moment += step
    return samples


def _sample(at: float, in_use: int, waiting: int, rows: Iterable[Any]) -> Sample:
    events: Counter[str] = Counter()
    active = blocked = 0
    for row in rows:
        state, count = row["state"] or "", int(row["backends"])
        name = f"{row['type']}:{row['event']}" if row["type"] else ON_CPU
        if state == "active":
            active += count
            # A backend that is handed its next statement still shows the wait for the client for a moment.
            blocked += count if row["type"] and name != OUTSIDE else 0
        if state == "active" or state.startswith("idle in transaction"):
            events[name] += count
    return Sample(at, in_use, waiting, active, blocked, tuple(events.most_common()))


def summarise(samples: Iterable[Sample]) -> ServerSide:
    """Means of samples, of one window or of several."""
    looks = list(samples)
    if not looks:
        return ServerSide(samples=0, active=0.0, blocked=0.0)
    events: Counter[str] = Counter()
    for look in looks:
        events.update(dict(look.events))
    count = len(looks)
    return ServerSide(
        samples=count,
        active=sum(look.active for look in looks) / count,
        blocked=sum(look.blocked for look in looks) / count,
        events={name: total / count for name, total in events.most_common()},
    )
