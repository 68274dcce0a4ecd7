"""The soak: the workload while the nemesis strikes, and then the checker."""

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

from bench import connected
from bench.results import Result
from dbop_raw import CommitTokens, Engine, RetryBudget, RetryPolicy
from dbop_raw.testing import FaultProxy, Server
from tests.support.soak.checker import TABLE, Books
from tests.support.soak.nemesis import LINE, SERVER, Nemesis, note_complaints, until
from tests.support.soak.workload import JOBS, How

_WORKERS, _CONNECTIONS = 12, 8
_CALM = 0.4
"""Seconds: the longest pause between two faults."""
_SAID_EVERY = 5.0
"""Seconds between two lines of progress."""
_LAST_CALLS = 60.0
"""Seconds that the calls under way may take when the faults are over: what is left then has leaked."""


@dataclass(slots=True)
class _Soak:
    seed: int
    say: Callable[[str], None]
    books: Books
    nemesis: Nemesis
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
            # An error is in the books.
            with anyio.move_on_after(patience) as scope, contextlib.suppress(Exception):
                await job(rng.choice(self.engines), self.books, how, rng)
            self.cancelled += scope.cancelled_caught

    async def strike(self, rng: random.Random) -> None:
        """Faults, one after another; the heavy ones are rarer."""
        kinds = [*LINE * 4, *SERVER[:3] * 3, *SERVER[3:]]
        while time.monotonic() < self.stop_at:
            await anyio.sleep(rng.uniform(0, _CALM))
            await self.nemesis.strike(rng.choice(kinds))

    async def tell(self) -> None:
        """A line of progress now and then."""
        while (left := self.stop_at - time.monotonic()) > 0:
            await anyio.sleep(min(_SAID_EVERY, left))
            faults = sum(self.nemesis.struck.values()) + self.cancelled
            self.say(
                f"{max(0.0, self.stop_at - time.monotonic()):.0f} s to go: {self.books.calls:,} operations, "
                f"{faults} faults, longest overrun {self.books.overrun:.2f} s"
            )

    async def run(self) -> int:
        """All of it; gives how many tasks did not come to their end."""
        rng = random.Random(self.seed)
        jobs = [self.work(random.Random(rng.random())) for _ in range(_WORKERS)]
        tasks = list(
            map(asyncio.ensure_future, [*jobs, self.strike(random.Random(rng.random())), self.tell()])
        )
        await asyncio.wait(tasks, timeout=self.stop_at - time.monotonic() + _LAST_CALLS)
        stuck = [task for task in tasks if not task.done()]
        for task in stuck:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        return len(stuck)


async def soak(
    server: Server, minutes: float, seed: int, say: Callable[[str], None], about: dict[str, Any]
) -> Result:
    """Run for so many minutes against `server`, which is paused, crashed and restarted on the way."""
    # Each fault makes asyncpg's pool warn of the connections that it can't make.
    logging.getLogger("asyncpg.pool").setLevel(logging.ERROR)
    before, started = asyncio.all_tasks(), time.monotonic()
    dsn = await asyncio.to_thread(server.create_database)
    tokens, books = CommitTokens(), Books()
    note_complaints(books.surprises)
    async with connected(dsn) as conn:
        await conn.execute(TABLE)
        await tokens.install(conn)
    budget = RetryBudget(capacity=1000, per_call=1.0)
    async with (
        FaultProxy(server.host, server.port) as proxy,
        asyncpg.create_pool(f"{proxy.dsn(dsn)}?sslmode=disable", min_size=0, max_size=_CONNECTIONS) as pool,
    ):
        engines = (
            Engine(pool, acquire_timeout=2.0, commit_tokens=tokens, budget=budget),
            Engine(pool, acquire_timeout=2.0, budget=budget),
        )
        nemesis = Nemesis(server, dsn, proxy, random.Random(seed))
        one = _Soak(seed, say, books, nemesis, engines, started + minutes * 60)
        leaked = await one.run()
        proxy.heal()
        stats = [engine.stats() for engine in engines]
        leaked += sum(found.in_use for found in stats)
        with anyio.move_on_after(10):
            await pool.close()
    if not await until(lambda: asyncio.all_tasks() <= before, 10):
        leaked += len(asyncio.all_tasks() - before)
    async with connected(dsn) as conn:
        leaked += await _sessions_left(conn)
        audit = await books.audit(conn, whole_table=True)

    result = Result("soak", about)
    result.header["surprises"] = books.surprises[:20]
    must_be_none = {
        "lost": len(audit.lost),
        "doubled": len(audit.doubled),
        "there though an error said that they are not": len(audit.ghosts),
        "transactions that are there in part": len(audit.torn),
        "leaked connections, tasks and sessions": leaked,
        "answers that can't be right": len(books.surprises),
    }
    for name, number in must_be_none.items():
        result.figure(name, "≤", 0, [number])
    numbers = {
        "operations": books.calls,
        "rows": audit.rows,
        "retries": sum(found.retries for found in stats),
        "COMMITs in doubt": sum(found.commits_in_doubt for found in stats),
        "found committed": sum(found.commits_found_committed for found in stats),
        "found aborted": sum(found.commits_found_aborted for found in stats),
        "transactions of which nobody was told": len(books.unknown),
    }
    times = {"whole run": time.monotonic() - started, "longest overrun of a deadline": books.overrun}
    faults = {**nemesis.struck, "cancelled": one.cancelled}
    for case, found in (("numbers", numbers), ("times", times), ("faults", faults), ("errors", books.errors)):
        for name, value in found.items():
            result.add(case, name, None, {UNITS[case]: value})
    return result


UNITS = {"numbers": "number", "times": "s", "faults": "faults", "errors": "calls"}
"""The sections of the report, and what they count."""


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
