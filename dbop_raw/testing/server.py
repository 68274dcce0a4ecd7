"""What every server for a test can do, wherever it runs: make databases, and say clearly what it can't."""

from __future__ import annotations

import asyncio
import threading
import uuid
from typing import TYPE_CHECKING, Any, Literal, NoReturn
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import asyncpg

from dbop_raw.testing.binaries import find_client
from dbop_raw.testing.errors import ServerError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["ExternalServer", "Server", "StopMode", "run_sql"]

StopMode = Literal["smart", "fast", "immediate"]

SQL_TIMEOUT = 30.0


class Server:
    """A PostgreSQL server that a test may use, and in most cases stop, crash and pause.

    Every method blocks the calling thread, for 30 seconds at most, and none needs (or minds) a running event
    loop. They go to the server itself. A method that this kind of server can't do raises
    :class:`ServerError`.

    Attributes:
        host: The address it listens on, for TCP.
        port: Its TCP port; stays the same when the server is stopped and started again.
        user: A superuser of it.
        data_dir: Its data directory, or ``None`` where it is not ours to look at.

    """

    kind = "a server"

    def __init__(self, host: str, port: int, user: str, *, data_dir: Path | None = None) -> None:
        self.host = host
        self.port = port
        self.user = user
        self.data_dir = data_dir

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.host}:{self.port}>"

    @property
    def dsn(self) -> str:
        """A ``postgresql://`` URL over TCP, to the maintenance database of the server."""
        return f"postgresql://{quote(self.user, safe='')}@{self.host}:{self.port}/postgres"

    def create_database(self, name: str | None = None) -> str:
        """Create an empty database and return its DSN.

        Args:
            name: Taken literally (it is quoted); ``None`` makes up a unique one.

        Raises:
            ServerError: The server refused, or did not answer within 30 seconds.

        """
        name = name or f"test_{uuid.uuid4().hex[:16]}"
        self.sql(f"CREATE DATABASE {_identifier(name)}")
        return _with_database(self.dsn, name)

    def drop_database(self, dsn_or_name: str) -> None:
        """Drop a database, whoever is still connected to it; one that does not exist is no error.

        Args:
            dsn_or_name: What :meth:`create_database` returned, or the plain name.

        Raises:
            ServerError: The server refused, or did not answer within 30 seconds.

        """
        name = unquote(urlsplit(dsn_or_name).path[1:]) if "://" in dsn_or_name else dsn_or_name
        self.sql(f"DROP DATABASE IF EXISTS {_identifier(name)} WITH (FORCE)")

    def start(self) -> None:
        """Start it and wait until it takes connections; nothing where it runs already."""
        self._cannot("be started")

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop it and wait until it is gone; nothing where it does not run.

        Args:
            mode: ``smart`` waits for the clients to go, ``fast`` rolls them back, ``immediate`` is a crash.

        """
        self._cannot(f"be stopped ({mode})")

    def crash(self) -> None:
        """Stop it at once, with no checkpoint and no goodbye: its next start recovers from the WAL."""
        self._cannot("be crashed")

    def restart(self) -> None:
        """Stop it (``fast``) and start it again, at the same port."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze every process of it: connections stay open, and nothing answers (a machine that hangs)."""
        self._cannot("be paused")

    def resume(self) -> None:
        """Let a paused server go on."""
        self._cannot("be resumed")

    def kill_backend(self, pid: int, signal: int) -> None:
        """Send a signal to one process of the server.

        Args:
            pid: As ``pg_backend_pid()`` gives it; a process of something else is refused.
            signal: Such as ``signal.SIGTERM`` (57P01), or ``SIGKILL`` (the whole server recovers).

        """
        self._cannot(f"signal {signal} to process {pid}")

    def log_tail(self, n: int = 20) -> str:
        """Return the last `n` lines of the server's log."""
        self._cannot(f"show the last {n} lines of its log")

    def bin(self, name: str) -> Path:
        """Return the path of a client program, such as ``psql`` or ``pgbench``.

        Raises:
            ServerError: There is none here.

        """
        return find_client(name)

    def sql(self, statement: str) -> Any:
        """Run one statement in the maintenance database, as superuser, and return its first value.

        Raises:
            ServerError: It failed, or took longer than 30 seconds.

        """
        try:
            return run_sql(self.dsn, statement)
        except Exception as exc:
            raise ServerError(self._told(f"{statement!r} failed: {type(exc).__name__}: {exc}")) from exc

    def _told(self, what: str) -> str:
        """Put the end of the server's log under `what` went wrong."""
        try:
            return f"{what}\nthe server's log ends:\n{self.log_tail()}"
        except (ServerError, OSError):
            return what

    def _cannot(self, what: str) -> NoReturn:
        raise ServerError(f"{self.kind} at {self.host}:{self.port} can't {what}")


class ExternalServer(Server):
    """A server that was there before us, known by its DSN: it can be given databases, and nothing else."""

    kind = "a server given by its DSN"

    def __init__(self, dsn: str) -> None:
        parts = urlsplit(dsn)
        if parts.scheme not in {"postgresql", "postgres"} or not parts.hostname:
            raise ValueError(f"a postgresql://user@host:port/database URL is needed, not {dsn!r}")
        super().__init__(parts.hostname, parts.port or 5432, unquote(parts.username or "postgres"))
        self._dsn = dsn

    @property
    def dsn(self) -> str:
        """The DSN as it was given."""
        return self._dsn


def run_sql(dsn: str, statement: str, *, wait: float = SQL_TIMEOUT) -> Any:
    """Run one statement and return its first value, from any thread, with or without a running event loop.

    Args:
        dsn: Where to.
        statement: Without arguments; outside any transaction.
        wait: Seconds, for everything.

    """
    # A thread of its own: asyncio.run() is not allowed where a loop runs already.
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(asyncio.run(_fetchval(dsn, statement, wait)))
        except BaseException as exc:  # noqa: BLE001 - carried to the caller's thread
            outcome.append(exc)

    thread = threading.Thread(target=work, name="dbop_raw-testing-sql", daemon=True)
    thread.start()
    thread.join(wait + 5)
    if not outcome:
        raise TimeoutError(f"no answer within {wait + 5:g} s")
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


async def _fetchval(dsn: str, statement: str, wait: float) -> Any:
    async with asyncio.timeout(wait):
        connection = await asyncpg.connect(dsn, timeout=wait)
        try:
            return await connection.fetchval(statement)
        finally:
            # Not close(): it waits for the server, which may be what doesn't answer.
            connection.terminate()


def _identifier(name: str) -> str:
    """Quote a name as SQL does."""
    if not name or "\0" in name:
        raise ValueError(f"not a name for a database: {name!r}")
    return '"' + name.replace('"', '""') + '"'


def _with_database(dsn: str, name: str) -> str:
    """Return the same DSN, for another database."""
    return urlunsplit(urlsplit(dsn)._replace(path="/" + quote(name, safe="")))
