"""A TCP proxy that speaks PostgreSQL: it counts round trips on the wire, and fails where it is told to."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Literal, Self
from urllib.parse import urlsplit, urlunsplit

import anyio

from dbop_raw.testing.faults import Fault, Injected
from dbop_raw.testing.line import CHUNK, Line
from dbop_raw.testing.traffic import Traffic

if TYPE_CHECKING:
    from types import TracebackType

    from dbop_raw.testing.wire import Message

__all__ = ["FaultProxy"]

CLOSING_TIMEOUT = 5.0


class FaultProxy:
    """A proxy before a PostgreSQL server, for the time of an ``async with`` block.

    What is encrypted can't be understood: nothing on such a connection is counted, and no fault meets it but
    :meth:`drop_all`. Turn TLS off in the DSN (``?sslmode=disable``) where the server offers it.

    Args:
        server_host: Where the server is. May be changed later, for connections that come after (a failover).
        server_port: Its port.

    Attributes:
        host: Where the proxy listens.
        port: Its port.
        delay_server: Seconds that each byte from the server is late (one way). Asyncio's timers are coarse: 1
            ms asked for becomes about 1.3 ms.
        connections_opened: How many connections came since the start or :meth:`reset_counts`.

    """

    def __init__(self, server_host: str, server_port: int) -> None:
        self.server_host = server_host
        self.server_port = server_port
        self.host = "127.0.0.1"
        self.port = 0
        self.delay_server = 0.0
        self.connections_opened = 0
        self._traffic = Traffic()
        self._numbers = itertools.count(1)
        self._lines: dict[Line, asyncio.Task[None]] = {}
        self._server: asyncio.Server | None = None
        self._broken: Exception | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, self.host, 0, limit=CHUNK)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        with anyio.move_on_after(CLOSING_TIMEOUT, shield=True):
            if self._server is not None:
                self._server.close()
            tasks = list(self._lines.values())
            for line in list(self._lines):
                line.abort()
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            if self._server is not None:
                await self._server.wait_closed()
        if self._broken is not None and exc is None:
            raise self._broken

    @property
    def round_trips(self) -> int:
        """How often the server answered, on all connections, since the start or :meth:`reset_counts`.

        One is counted at the first message of the server after one or more of the client, from the
        connection's first ReadyForQuery on. So startup is not counted, Terminate is not, and neither is what
        a server sends unasked. A COPY is one, with all its data: a client may send that before it has the
        server's consent.
        """
        return self._traffic.round_trips.total()

    @property
    def round_trips_by_connection(self) -> dict[int, int]:
        """The round trips of each connection that made one, by its number."""
        return dict(self._traffic.round_trips)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The messages since the start or :meth:`reset_counts`; the last 10,000 of them."""
        return tuple(self._traffic.messages)

    @property
    def connections(self) -> int:
        """How many connections are open now."""
        return len(self._lines)

    def dsn(self, dsn: str) -> str:
        """Return the same DSN (a URL), pointed at the proxy."""
        parts = urlsplit(dsn)
        account, at, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{account}{at}{self.host}:{self.port}"))

    def reset_counts(self) -> None:
        """Count from nought again: round trips, messages and their index, connections opened."""
        self.connections_opened = 0
        self._traffic.reset()

    def inject(self, fault: Fault) -> Injected:
        """Add a fault; where several match a message, the first that was injected happens."""
        injected = Injected(fault)
        self._traffic.injected.append(injected)
        return injected

    def heal(self) -> None:
        """Remove all faults, and let hung connections go on with what they held back.

        Closed ones stay closed.
        """
        self._traffic.injected.clear()
        for line in self._lines:
            line.flows.set()

    def drop_all(self, action: Literal["cut", "reset", "hang"] = "reset") -> None:
        """Do this to each connection that is open now, between any two messages or inside one."""
        for line in list(self._lines):
            line.suffer(action)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end; a task of the server's, which ends without an exception."""
        self.connections_opened += 1
        line = Line(next(self._numbers), reader, writer, self._traffic, lambda: self.delay_server)
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - for the type checker
        self._lines[line] = task
        try:
            await line.serve(self.server_host, self.server_port)
        except asyncio.CancelledError:
            pass  # only __aexit__ cancels it
        except Exception as exc:  # noqa: BLE001 - a fault's own `when` failed: raised at the end of the block
            self._broken = self._broken or exc
        finally:
            line.abort()
            del self._lines[line]
