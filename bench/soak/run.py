"""The soak: a mixed load and one trouble after another, and then the account."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anyio
import asyncpg

from bench.soak.books import TABLE, Books
from bench.soak.load import JOBS, How
from bench.soak.trouble import LINE, SERVER, Trouble, note_complaints, until
from dbop_raw import CommitTokens, Engine, RetryBudget, RetryPolicy
from dbop_raw.testing import FaultProxy, Server

__all__ = ["Figures", "soak"]

_WORKERS, _CONNECTIONS = 12, 8
_CALM = 0.4
"""Seconds: the longest pause between two troubles."""
_SAID_EVERY = 5.0
"""Seconds between two lines of progress."""
_LAST_CALLS = 60.0
"""Seconds that the calls under way may take when the troubles are over: what is left then has leaked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a soak found."""

    seconds: float
    operations: int
    rows: int
    faults: dict[str, int]
    errors: dict[str, int]
    """What the calls raised, by type: allowed, as long as the rows agree."""
    retries: int
    commits_in_doubt: int
    found_committed: int
    found_aborted: int
    unknown: int
    """Transactions of which nobody was told whether they are in."""
    lost: int
    doubled: int
    ghosts: int
    """Rows that are there though an error said that they are not."""
    torn: int
    """Transactions that are there in part."""
    surprises: list[str]
    """Answers that can't be right."""
    leaked: int
    """Connections in use, tasks and sessions that are left at the end."""
    overrun: float
    """Seconds: the most that a call took beyond its deadline."""

    @property
    def clean(self) -> bool:
        """Does all hold?"""
        return not (
            self.lost or self.doubled or self.ghosts or self.torn or self.leaked or len(self.surprises)
        )


@dataclass(slots=True)
class _Soak:
    """One soak on its way."""

    seed: int
    say: Callable[[str], None]
    books: Books
    trouble: Trouble
    engines: tuple[Engine, ...]
    stop_at: float
    cancelled: int = 0

    async def work(self, rng: random.Random) -> None:
        """Calls, one after another, each of a kind and with options by chance."""
        while time.monotonic() < self.stop_at:
            job = JOBS[rng.choice(list(JOBS))]
            how = How(
                retry=RetryPolicy(attempts=5, max_delay=0.5) if rng.random() < 0.8 else None,
                resolve=rng.random() < 0.6,
                deadline=rng.uniform(1, 5),
                timeout=rng.uniform(0.3, 1) if rng.random() < 0.5 else None,
            )
            patience = rng.uniform(0, 0.05) if rng.random() < 0.1 else None
            with anyio.CancelScope() as scope:
                if patience is not None:
                    scope.deadline = anyio.current_time() + patience
                # An error is in the books.
                with contextlib.suppress(Exception):
                    await job(rng.choice(self.engines), self.books, how, rng)
            self.cancelled += scope.cancelled_caught

    async def strike(self, rng: random.Random) -> None:
        """Troubles, one after another; the heavy ones are rarer."""
        kinds = [*LINE * 4, *SERVER[:3] * 3, *SERVER[3:]]
        while time.monotonic() < self.stop_at:
            await anyio.sleep(rng.uniform(0, _CALM))
            await self.trouble.strike(rng.choice(kinds))

    async def tell(self) -> None:
        """A line of progress now and then."""
        while (left := self.stop_at - time.monotonic()) > 0:
            await anyio.sleep(min(_SAID_EVERY, left))
            faults = sum(self.trouble.struck.values()) + self.cancelled
            self.say(
                f"{max(0.0, self.stop_at - time.monotonic()):.0f} s to go: {self.books.calls:,} operations, "
                f"{faults} faults, longest overrun {self.books.overrun:.2f} s"
            )

    async def run(self) -> int:
        """All of it; gives how many tasks did not come to their end."""
        rng = random.Random(self.seed)
        tasks = [asyncio.ensure_future(self.work(random.Random(rng.random()))) for _ in range(_WORKERS)]
        tasks += [
            asyncio.ensure_future(self.strike(random.Random(rng.random()))),
            asyncio.ensure_future(self.tell()),
        ]
        await asyncio.wait(tasks, timeout=self.stop_at - time.monotonic() + _LAST_CALLS)
        stuck = [task for task in tasks if not task.done()]
        for task in stuck:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        return len(stuck)


async def soak(server: Server, minutes: float, seed: int, say: Callable[[str], None]) -> Figures:
    """Run for so many minutes against `server`, which is paused, crashed and restarted on the way."""
    # Each trouble makes asyncpg's pool warn of the connections that it can't make.
    logging.getLogger("asyncpg.pool").setLevel(logging.ERROR)
    before, started = asyncio.all_tasks(), time.monotonic()
    dsn = await asyncio.to_thread(server.create_database)
    conn = await asyncpg.connect(dsn)
    tokens, books = CommitTokens(), Books()
    note_complaints(books.surprises)
    await conn.execute(TABLE)
    await tokens.install(conn)
    await conn.close()
    budget = RetryBudget(capacity=1000, per_call=1.0)
    async with (
        FaultProxy(server.host, server.port) as proxy,
        asyncpg.create_pool(f"{proxy.dsn(dsn)}?sslmode=disable", min_size=0, max_size=_CONNECTIONS) as pool,
    ):
        engines = (
            Engine(pool, acquire_timeout=2.0, commit_tokens=tokens, budget=budget),
            Engine(pool, acquire_timeout=2.0, budget=budget),
        )
        trouble = Trouble(server, dsn, proxy, random.Random(seed))
        stop_at = started + minutes * 60
        one = _Soak(seed, say, books, trouble, engines, stop_at)
        leaked = await one.run()
        proxy.heal()
        stats = [engine.stats() for engine in engines]
        leaked += sum(found.in_use for found in stats)
        with anyio.move_on_after(10):
            await pool.close()
    if not await until(lambda: asyncio.all_tasks() <= before, 10):
        leaked += len(asyncio.all_tasks() - before)
    conn = await asyncpg.connect(dsn)
    leaked += await _sessions_left(conn)
    audit = await books.audit(conn, whole_table=True)
    await conn.close()
    return Figures(
        seconds=time.monotonic() - started,
        operations=books.calls,
        rows=audit.rows,
        faults={**trouble.struck, "cancelled": one.cancelled},
        errors=dict(books.errors),
        retries=sum(found.retries for found in stats),
        commits_in_doubt=sum(found.commits_in_doubt for found in stats),
        found_committed=sum(found.commits_found_committed for found in stats),
        found_aborted=sum(found.commits_found_aborted for found in stats),
        unknown=len(books.unknown),
        lost=len(audit.lost),
        doubled=len(audit.doubled),
        ghosts=len(audit.ghosts),
        torn=len(audit.torn),
        surprises=books.surprises[:20],
        leaked=leaked,
        overrun=books.overrun,
    )


async def _sessions_left(conn: Any) -> int:
    """Sessions that the closed pool left behind; each has some seconds to see that it is alone."""
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    left = 0
    for _ in range(100):
        left = await conn.fetchval(query)
        if left == 0:
            break
        await anyio.sleep(0.1)
    return int(left)
