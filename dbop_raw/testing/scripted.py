"""A connection and a pool by script: for what a server won't do on demand."""

from __future__ import annotations

# ruff: noqa: ARG002 - asyncpg's signatures, of which a script needs little
import asyncio
import re
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import asyncpg

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping, Sequence
    from types import TracebackType

__all__ = ["ScriptedConnection", "ScriptedPool", "Step"]

_STARTS = re.compile(r"\s*(BEGIN|START\s+TRANSACTION)\b", re.IGNORECASE)
_ENDS = re.compile(r"\s*(COMMIT|END|ABORT|ROLLBACK(?!\s+((WORK|TRANSACTION)\s+)?TO\b))\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Step:
    """What a scripted connection expects next, and what it answers.

    Attributes:
        match: The SQL to expect: a text that it contains, a pattern that is found in it, or ``None`` for
            anything. A COPY is shown as ``COPY "table" ("column", …) FROM STDIN``.
        result: What the call returns; for ``execute``, ``None`` means the last statement's own first word,
            such as ``COMMIT``.
        error: Raised instead.
        delay: Seconds before either; ``math.inf`` never answers.
        closes: The connection is closed after this step.

    """

    match: str | re.Pattern[str] | None
    result: Any = None
    error: BaseException | None = None
    delay: float = 0
    closes: bool = False

    def fits(self, sql: str) -> bool:
        """Tell whether this is what was expected."""
        if self.match is None:
            return True
        if isinstance(self.match, str):
            return self.match in sql
        return self.match.search(sql) is not None


class ScriptedConnection:
    """A double of ``asyncpg.Connection`` that answers by script, one step a call.

    Args:
        script: The steps, used in order.
        settings: What :meth:`get_settings` shows; change :attr:`settings` while it runs.

    Attributes:
        sent: The SQL of each call.
        terminated: Whether :meth:`terminate` was called.
        settings: As above.

    """

    def __init__(self, script: Iterable[Step] = (), *, settings: Mapping[str, str] | None = None) -> None:
        self.sent: list[str] = []
        self.terminated = False
        self.settings = dict(settings or {})
        self._script = deque(script)
        self._in_transaction = False
        self._closed = False

    async def execute(self, query: str, *args: object, timeout: float | None = None) -> Any:  # noqa: ASYNC109
        """Answer the next step; see :class:`Step` for a result of ``None``."""
        result = await self._next(query, timeout)
        return _statements(query)[-1].split()[0].upper() if result is None else result

    async def fetch(self, query: str, *args: object, timeout: float | None = None) -> Any:  # noqa: ASYNC109
        """Answer the next step; a result of ``None`` means no rows."""
        result = await self._next(query, timeout)
        return [] if result is None else result

    async def fetchrow(self, query: str, *args: object, timeout: float | None = None) -> Any:  # noqa: ASYNC109
        """Answer the next step."""
        return await self._next(query, timeout)

    async def fetchval(
        self,
        query: str,
        *args: object,
        column: int = 0,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> Any:
        """Answer the next step; the result is the value itself."""
        return await self._next(query, timeout)

    async def executemany(self, command: str, args: Iterable[object], *, timeout: float | None = None) -> Any:  # noqa: ASYNC109
        """Answer the next step, once for all the rows."""
        return await self._next(command, timeout)

    async def copy_records_to_table(
        self,
        table_name: str,
        *,
        records: Any,
        columns: Sequence[str] | None = None,
        schema_name: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
        where: str | None = None,
    ) -> Any:
        """Answer the next step; a result of ``None`` means ``COPY``."""
        return await self._next(_copy_sql(table_name, columns, schema_name), timeout) or "COPY"

    async def copy_to_table(
        self,
        table_name: str,
        *,
        source: Any,
        columns: Sequence[str] | None = None,
        schema_name: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
        **options: Any,
    ) -> Any:
        """Answer the next step; a result of ``None`` means ``COPY``."""
        return await self._next(_copy_sql(table_name, columns, schema_name), timeout) or "COPY"

    async def prepare(self, query: str, *, name: str | None = None, timeout: float | None = None) -> Any:  # noqa: ASYNC109
        """Answer the next step: its result is the prepared statement."""
        return await self._next(query, timeout)

    def is_in_transaction(self) -> bool:
        """Tell what BEGIN, COMMIT and ROLLBACK in the SQL so far say."""
        return self._in_transaction

    def is_closed(self) -> bool:
        """Tell whether it was closed, by either side."""
        return self._closed

    def terminate(self) -> None:
        """Close it at once."""
        self.terminated = True
        self._close()

    async def close(self, *, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """Close it in good order."""
        self._close()

    def get_settings(self) -> Any:
        """Return :attr:`settings`, as attributes."""
        return SimpleNamespace(**self.settings)

    def assert_finished(self) -> None:
        """Fail unless every step was used.

        Raises:
            AssertionError: Some were not; the message names them.

        """
        if self._script:
            raise AssertionError(f"{len(self._script)} steps were never reached: {list(self._script)}")

    async def _next(self, sql: str, timeout: float | None) -> Any:  # noqa: ASYNC109
        if self._closed:
            raise asyncpg.InterfaceError("connection is closed")
        self.sent.append(sql)
        if not self._script:
            raise AssertionError(
                f"nothing more was expected, but got {sql!r} (after {len(self.sent) - 1} calls)"
            )
        step = self._script.popleft()
        if not step.fits(sql):
            raise AssertionError(f"call {len(self.sent)}: expected {step.match!r}, got {sql!r}")
        if step.delay:
            async with asyncio.timeout(timeout):
                await asyncio.sleep(step.delay)
        self._track(sql, failed=step.error is not None)
        if step.closes:
            self._close()
        if step.error is not None:
            raise step.error
        return step.result

    def _track(self, sql: str, *, failed: bool) -> None:
        """Follow the transaction: of statements that fail, the last is taken to be the one that did."""
        statements = _statements(sql)
        for position, statement in enumerate(statements, start=1):
            if _ENDS.match(statement):
                self._in_transaction = False  # a COMMIT that fails ends it, too
            elif _STARTS.match(statement) and not (failed and position == len(statements)):
                self._in_transaction = True

    def _close(self) -> None:
        self._closed = True
        self._in_transaction = False


class ScriptedPool:
    """A double of ``asyncpg.Pool`` over scripted connections, taken in order; one given back is taken next.

    Args:
        connections: The connections; an exception among them is raised by the ``acquire`` whose turn it is.
        max_size: What :meth:`get_max_size` says; as many as the connections by default.

    Attributes:
        acquired: How often a connection was handed out.
        released: How often one was given back.
        terminated: How many of those were closed by then.
        expired: How often :meth:`expire_connections` was called.

    """

    def __init__(
        self, connections: Iterable[ScriptedConnection | BaseException], *, max_size: int | None = None
    ) -> None:
        self.acquired = self.released = self.terminated = self.expired = 0
        self._idle: deque[ScriptedConnection | BaseException] = deque(connections)
        self._max_size = max_size or max(1, sum(isinstance(each, ScriptedConnection) for each in self._idle))
        self._used: list[ScriptedConnection] = []
        self._opened: list[ScriptedConnection] = []
        self._stale: list[ScriptedConnection] = []
        self._changed = asyncio.Event()
        self._closing = False

    def acquire(self, *, timeout: float | None = None) -> _Acquire:
        """Take a connection, by ``await`` or ``async with``, as asyncpg does.

        Raises:
            TimeoutError: None was free for `timeout` seconds.
            AssertionError: None is free, and none is left that could become so.

        """
        return _Acquire(self, timeout)

    async def release(self, connection: ScriptedConnection, *, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """Give a connection back; one that is closed, or was expired, is dropped.

        Raises:
            asyncpg.InterfaceError: It is not one that this pool handed out.

        """
        if connection not in self._used:
            raise asyncpg.InterfaceError("this connection was not acquired from this pool")
        self._used.remove(connection)
        self.released += 1
        if connection in self._stale:
            await connection.close()
        if connection.is_closed():
            self.terminated += 1
        else:
            self._idle.appendleft(connection)
        self._changed.set()

    async def expire_connections(self) -> None:
        """Let every connection of now be closed: the free ones at once, the others when they are given back.

        One that was never taken is not open yet, so it stays.
        """
        self.expired += 1
        self._stale = list(self._used)
        for each in list(self._idle):
            if isinstance(each, ScriptedConnection) and each in self._opened:
                self._idle.remove(each)
                await each.close()

    def get_size(self) -> int:
        """Return how many connections are open."""
        return self.get_idle_size() + len(self._used)

    def get_idle_size(self) -> int:
        """Return how many connections are open and free."""
        return sum(isinstance(each, ScriptedConnection) and not each.is_closed() for each in self._idle)

    def get_min_size(self) -> int:
        """Return 0."""
        return 0

    def get_max_size(self) -> int:
        """Return how many connections there may be."""
        return self._max_size

    def is_closing(self) -> bool:
        """Tell whether :meth:`close` or :meth:`terminate` was called."""
        return self._closing

    async def close(self) -> None:
        """Close what is free; nothing is handed out from now on."""
        self.terminate()

    def terminate(self) -> None:
        """Close what is free; nothing is handed out from now on."""
        self._closing = True
        self._changed.set()

    async def take(self, timeout: float | None) -> ScriptedConnection:  # noqa: ASYNC109
        """Take a connection: what :meth:`acquire` awaits."""
        async with asyncio.timeout(timeout):
            while True:
                if self._closing:
                    raise asyncpg.InterfaceError("pool is closing")
                if self._idle and len(self._used) < self._max_size:
                    return self._hand_out(self._idle.popleft())
                if not self._used:
                    raise AssertionError("no connection is left in this script's pool")
                self._changed.clear()
                await self._changed.wait()

    def _hand_out(self, each: ScriptedConnection | BaseException) -> ScriptedConnection:
        if isinstance(each, BaseException):
            raise each
        self.acquired += 1
        self._used.append(each)
        self._opened.append(each)
        return each


class _Acquire:
    """What ``acquire`` returns: to be awaited, or entered."""

    def __init__(self, pool: ScriptedPool, timeout: float | None) -> None:
        self._pool = pool
        self._timeout = timeout
        self._connection: ScriptedConnection | None = None

    def __await__(self) -> Generator[Any, None, ScriptedConnection]:
        return self._pool.take(self._timeout).__await__()

    async def __aenter__(self) -> ScriptedConnection:
        self._connection = await self._pool.take(self._timeout)
        return self._connection

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._connection is not None:
            await self._pool.release(self._connection)


def _statements(sql: str) -> list[str]:
    """Split SQL at its semicolons: good enough for the control SQL that is followed here, not for any SQL."""
    return [part.strip() for part in sql.split(";") if part.strip()] or [sql]


def _copy_sql(table: str, columns: Sequence[str] | None, schema: str | None) -> str:
    name = ".".join(f'"{part}"' for part in (schema, table) if part)
    listed = f" ({', '.join(f'{chr(34)}{column}{chr(34)}' for column in columns)})" if columns else ""
    return f"COPY {name}{listed} FROM STDIN"
