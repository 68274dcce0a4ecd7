"""A COMMIT in doubt, on demand: how its answer is lost, and the world that a test of it looks at."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal

import asyncpg
import pytest

from dbop_raw import CommitTokens, Engine, Event
from dbop_raw.events import CommitResolved
from dbop_raw.testing import Fault, FaultProxy, Server, query
from dbop_raw.testing.server import run_sql
from tests.support.observing import Seen
from tests.support.pools import pool_on
from tests.support.protocol import answer_to_commit

__all__ = ["ACTIONS", "PLACES", "TOKENS", "WAYS", "Action", "Place", "Way", "World", "at_commit", "world_on"]

Action = Literal["cut", "reset", "hang"]
Place = Literal["before the server", "before the client"]
Way = Literal["xid", "token"]

ACTIONS = ["cut", "reset", pytest.param("hang", marks=pytest.mark.slow)]
PLACES: tuple[Place, ...] = ("before the server", "before the client")
WAYS: tuple[Way, ...] = ("xid", "token")
"""How it is looked up: by the transaction's id, or by a row that it wrote."""
TOKENS = CommitTokens()


def at_commit(action: Action, place: Place, *, times: int | None = 1) -> Fault:
    """Return a fault at a COMMIT: before it reaches the server, or before its answer reaches the client."""
    when = query("COMMIT") if place == "before the server" else answer_to_commit
    return Fault(action, when=when, side="before", times=times)


class World:
    """A pool of two connections behind a proxy, engines on it, and a body that is counted.

    Attributes:
        proxy: Where faults are injected.
        pool: Behind the proxy.
        dsn: Past the proxy.
        starts: How often the body was started.
        seen: What the engines of this world have told.
        engine: One that looks a COMMIT up by the transaction's id.

    """

    def __init__(self, proxy: FaultProxy, pool: asyncpg.Pool, dsn: str) -> None:
        self.proxy = proxy
        self.pool = pool
        self.dsn = dsn
        self.starts = 0
        self.seen = Seen()
        self.engine = self.new_engine()

    def new_engine(
        self, tokens: CommitTokens | None = None, *, on_event: Callable[[Event], None] | None = None
    ) -> Engine:
        """Return another engine on the pool.

        Args:
            tokens: What it looks a COMMIT up by; ``None`` means the transaction's id.
            on_event: Called with each event, after `seen` has it.

        """
        observers: list[Callable[[Event], None]] = [self.seen, *([on_event] if on_event else [])]

        def observer(event: Event) -> None:
            for each in observers:
                each(event)

        return Engine(self.pool, observer=observer, commit_tokens=tokens)

    async def engine_by(self, way: Way, *, on_event: Callable[[Event], None] | None = None) -> Engine:
        """Return an engine that looks a COMMIT up in this way, whose table is there."""
        if way == "token":
            await Engine(self.pool).run(TOKENS.install)
        return self.new_engine(TOKENS if way == "token" else None, on_event=on_event)

    async def body(self, conn: Any, n: int = 1) -> str:
        """Write the row `n` of ``t``, and tell which start this was."""
        self.starts += 1
        await conn.execute("INSERT INTO t VALUES ($1)", n)
        return f"result of start {self.starts}"

    def rows(self) -> int:
        """Count the committed rows with the number 1."""
        found: int = run_sql(self.dsn, "SELECT count(*) FROM t WHERE n = 1")
        return found

    def outcomes(self) -> list[str]:
        """Return what became of each COMMIT that was looked up."""
        return [event.outcome for event in self.seen.of(CommitResolved)]

    def make_unreachable(self) -> None:
        """Drop every line, and let none be made."""
        self.proxy.drop_all()
        self.proxy.server_port = 1


@asynccontextmanager
async def world_on(server: Server, dsn: str) -> AsyncIterator[World]:
    """Give a world on a database of `server`."""
    async with FaultProxy(server.host, server.port) as proxy, pool_on(proxy.dsn(dsn), max_size=2) as pool:
        yield World(proxy, pool, dsn)
