"""The nemesis: what goes wrong, by a seed, one fault after another, at a random moment or message."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import anyio
import asyncpg

from dbop_raw.testing import Fault, FaultProxy, Message, Server, ServerError

__all__ = ["LINE", "SERVER", "Nemesis", "note_complaints", "until"]

Line = Literal["cut", "reset", "hang"]

LINE: tuple[Line, ...] = ("cut", "reset", "hang")
"""What befalls the line, at one message."""
SERVER = ("drop all", "terminate", "pause", "restart", "crash", "kill -9")
"""What befalls all lines, some backends, or the server."""

_SOON = 200
"""A line fault comes at one of so many messages that follow."""
_LONGEST_HANG = 2.0
"""Seconds, of a line or a server."""


class Nemesis:
    """Strikes a server and the proxy before it; counts what came about."""

    def __init__(self, server: Server, dsn: str, proxy: FaultProxy, rng: random.Random) -> None:
        self.struck: Counter[str] = Counter()
        self._server, self._dsn, self._proxy, self._rng = server, dsn, proxy, rng

    async def strike(self, kind: str) -> None:
        """One of `LINE` or `SERVER`, to its end: what hung goes on again, what was stopped is started."""
        if kind in LINE:
            await self._line(kind)
            return
        strikes: dict[str, Callable[[], Awaitable[None]]] = {
            "drop all": self._drop,
            "terminate": self._terminate,
            "pause": self._pause,
            "restart": self._restart,
            "crash": self._crash,
            "kill -9": self._kill,
        }
        self.struck[kind] += 1
        await strikes[kind]()

    async def _line(self, kind: Line) -> None:
        left = self._rng.randrange(_SOON)

        def soon(_: Message) -> bool:
            nonlocal left
            left -= 1
            return left < 0

        injected = self._proxy.inject(Fault(kind, soon, self._rng.choice(("before", "after"))))
        with anyio.move_on_after(5):
            await injected.wait()
            self.struck[kind] += 1
        if kind == "hang":
            await anyio.sleep(self._rng.uniform(0, _LONGEST_HANG))
        self._proxy.heal()

    async def _drop(self) -> None:
        self._proxy.drop_all(self._rng.choice(("cut", "reset")))

    async def _terminate(self) -> None:
        await self._ask(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
            f"AND pid <> pg_backend_pid() ORDER BY random() LIMIT {self._rng.randrange(1, 4)}"
        )

    async def _kill(self) -> None:
        pid = await self._ask(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
            "ORDER BY random() LIMIT 1"
        )
        if pid is not None:
            await asyncio.to_thread(self._server.kill_backend, pid, signal.SIGKILL)

    async def _ask(self, query: str) -> int | None:
        try:
            conn = await asyncpg.connect(self._dsn, timeout=5)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return None  # it still recovers from the fault before
        try:
            found: int | None = await conn.fetchval(query)
        finally:
            conn.terminate()
        return found

    async def _pause(self) -> None:
        await asyncio.to_thread(self._server.pause)
        try:
            await anyio.sleep(self._rng.uniform(0, _LONGEST_HANG))
        finally:
            await asyncio.to_thread(self._server.resume)

    async def _restart(self) -> None:
        try:
            await asyncio.to_thread(self._server.restart)
        except ServerError:
            # In PostgreSQL 18.6 a fast stop during crash recovery (after "kill -9") may never end: the io
            # workers and the checkpointer stay.
            self.struck["stop that took too long"] += 1
            await asyncio.to_thread(self._server.crash)
            await asyncio.to_thread(self._server.start)

    async def _crash(self) -> None:
        await asyncio.to_thread(self._server.crash)
        await anyio.sleep(self._rng.uniform(0, _LONGEST_HANG / 2))
        await asyncio.to_thread(self._server.start)


async def until(done: Callable[[], bool], seconds: float = 2.0) -> bool:
    """Wait until `done()`, at most so long; gives what it said last."""
    give_up = anyio.current_time() + seconds
    while not done():
        if anyio.current_time() >= give_up:
            return False
        await anyio.sleep(0.005)
    return True


def note_complaints(complaints: list[str]) -> None:
    """Note what reaches the running loop's exception handler, but for what asyncpg 0.32 is known to leave.

    A connect that is cancelled in its handshake, or a COPY that is cancelled while the line is lost, leaves a
    future with the error of the line behind, which nobody reads.
    """

    def handle(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        exc = context.get("exception")
        unread = str(context["message"]).startswith("Future exception was never retrieved")
        if not (unread and isinstance(exc, (ConnectionError, asyncpg.ConnectionDoesNotExistError))):
            complaints.append(f"{context['message']}: {exc!r}")

    asyncio.get_running_loop().set_exception_handler(handle)
