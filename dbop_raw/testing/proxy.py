"""A TCP proxy that speaks PostgreSQL: it counts round trips on the wire, and fails where it is told to."""

from __future__ import annotations

import asyncio
import itertools
import socket
import struct
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Literal, Self
from urllib.parse import urlsplit, urlunsplit

import anyio

from dbop_raw.testing.faults import Fault, Injected
from dbop_raw.testing.wire import ClientFramer, Message, ServerFramer

if TYPE_CHECKING:
    from types import TracebackType

    from dbop_raw.testing.wire import Frame, Sender

__all__ = ["FaultProxy"]

CHUNK = 256 * 1024
REMEMBERED = 10_000
CLOSING_TIMEOUT = 5.0

# What a server may send at any time, unasked: NoticeResponse, NotificationResponse, ParameterStatus.
UNASKED = frozenset("NAS")
# What a client sends without asking for an answer: CopyData, CopyDone, CopyFail, Terminate.
NO_QUESTION = frozenset("dcfX")


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
        round_trips: How often the server answered: one is counted at the first message of the server after
            one or more of the client, on any connection, from the connection's first ReadyForQuery on. So
            startup is not counted, Terminate is not, and neither is what a server sends unasked. A COPY is
            one, with all its data: a client may send that before it has the server's consent.

    """

    def __init__(self, server_host: str, server_port: int) -> None:
        self.server_host = server_host
        self.server_port = server_port
        self.host = "127.0.0.1"
        self.port = 0
        self.delay_server = 0.0
        self.connections_opened = 0
        self.round_trips = 0
        self._round_trips_of: dict[int, int] = {}
        self._messages: deque[Message] = deque(maxlen=REMEMBERED)
        self._index = 0
        self._injected: list[Injected] = []
        self._numbers = itertools.count(1)
        self._lines: dict[_Line, asyncio.Task[None]] = {}
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
    def round_trips_by_connection(self) -> dict[int, int]:
        """The round trips of each connection that made one, by its number."""
        return dict(self._round_trips_of)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The messages since the start or :meth:`reset_counts`; the last 10,000 of them."""
        return tuple(self._messages)

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
        self.connections_opened = self.round_trips = self._index = 0
        self._round_trips_of.clear()
        self._messages.clear()

    def inject(self, fault: Fault) -> Injected:
        """Add a fault; where several match a message, the first that was injected happens."""
        injected = Injected(fault)
        self._injected.append(injected)
        return injected

    def heal(self) -> None:
        """Remove all faults, and let hung connections go on with what they held back.

        Closed ones stay closed.
        """
        self._injected.clear()
        for line in self._lines:
            line.flows.set()

    def drop_all(self, action: Literal["cut", "reset", "hang"] = "reset") -> None:
        """Do this to each connection that is open now, between any two messages or inside one."""
        for line in list(self._lines):
            line.suffer(action)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end; a task of the server's, which ends without an exception."""
        self.connections_opened += 1
        line = _Line(self, next(self._numbers), reader, writer)
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - for the type checker
        self._lines[line] = task
        try:
            await line.serve()
        except asyncio.CancelledError:
            pass  # only __aexit__ cancels it
        except Exception as exc:  # noqa: BLE001 - a fault's own `when` failed: raised at the end of the block
            self._broken = self._broken or exc
        finally:
            line.abort()
            del self._lines[line]

    def saw(self, line: int, sender: Sender, frame: Frame) -> Message:
        """Remember a message."""
        self._index += 1
        sql = frame.sql if sender == "client" else ""
        seen = Message(line, sender, frame.type, self._index, frame.body, sql)
        self._messages.append(seen)
        return seen

    def count_round_trip(self, line: int) -> None:
        """Count one."""
        self.round_trips += 1
        self._round_trips_of[line] = self._round_trips_of.get(line, 0) + 1

    def fault_at(self, message: Message) -> Fault | None:
        """Return the fault that happens at a message, if one does."""
        for injected in self._injected:
            if injected.takes(message):
                injected.fire()
                return injected.fault
        return None


class _Line:
    """One client's connection, and the one to the server behind it."""

    def __init__(
        self, proxy: FaultProxy, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.number = number
        self.flows = asyncio.Event()
        self.flows.set()
        self._proxy = proxy
        self._client = (reader, writer)
        self._writers = {"client": writer}
        self._from_client = ClientFramer()
        self._from_server = ServerFramer()
        self._dead = False
        self._counting = False
        self._copying = False
        self._asked = False
        # When the last of the bytes that are late leaves, by the loop's clock.
        self._last_due = 0.0

    async def serve(self) -> None:
        """Connect to the server, and carry messages both ways until both sides have closed."""
        reader, _ = self._client
        try:
            server_reader, server_writer = await asyncio.open_connection(
                self._proxy.server_host, self._proxy.server_port, limit=CHUNK
            )
        except OSError:
            self._reset_client()  # the nearest thing to a refused connection, once it was accepted
            return
        self._writers["server"] = server_writer
        for each in self._writers.values():
            # drain() then means: it is all with the kernel.
            each.transport.set_write_buffer_limits(0)
        await asyncio.gather(self._carry("client", reader), self._carry("server", server_reader))

    def abort(self) -> None:
        """Drop both sockets at once."""
        for writer in self._writers.values():
            writer.transport.abort()

    def suffer(self, action: Literal["cut", "reset", "hang"]) -> None:
        """Let it happen, now."""
        if action == "hang":
            self.flows.clear()
            return
        self._dead = True
        self.flows.set()
        if action == "reset":
            self._reset_client()
        # Half-closed, and then read to the end: close() with unread bytes would send a RST, and the server
        # could lose a message that was delivered.
        for writer in self._writers.values():
            _half_close(writer)

    async def _carry(self, sender: Sender, reader: asyncio.StreamReader) -> None:
        """Carry what one side sends to the other, to its end."""
        try:
            while data := await reader.read(CHUNK):
                await self.flows.wait()
                if not self._dead:
                    await self._pass_on(sender, data)
            await self.flows.wait()
            await self._delivered(sender)
            _half_close(self._other(sender))
        except (OSError, ValueError):
            # A side was reset, or doesn't speak the protocol: the other learns it the hard way, too, and not
            # while the line hangs.
            await self.flows.wait()
            if not self._dead:
                self.suffer("reset")
                self.abort()

    async def _pass_on(self, sender: Sender, data: bytes) -> None:
        """Pass on the whole messages in what came, up to a fault."""
        framer = self._from_client if sender == "client" else self._from_server
        out: list[bytes] = []
        for frame in framer.feed(data):
            seen = self._note(sender, frame)
            fault = self._proxy.fault_at(seen)
            if fault is None or fault.side == "after":
                out.append(frame.raw)
            if fault is not None:
                await self._send(sender, b"".join(out))
                await self._delivered(sender)
                out.clear()
                await self._happen(fault)
                if self._dead:
                    return
                if fault.side == "before":
                    out.append(frame.raw)
        await self._send(sender, b"".join(out))

    async def _happen(self, fault: Fault) -> None:
        if fault.action == "delay":
            await asyncio.sleep(fault.seconds)
        else:
            self.suffer(fault.action)
        await self.flows.wait()

    def _note(self, sender: Sender, frame: Frame) -> Message:
        """Remember a message and count the round trip that it ends, if it does."""
        if sender == "client":
            self._from_server.asked_for_encryption |= frame.type in {"ssl", "gssenc"}
            self._asked |= self._counting and not self._copying and frame.type not in NO_QUESTION
        elif frame.type == "ssl-answer":
            self._from_client.opaque = self._from_server.opaque
        elif frame.type not in UNASKED:
            self._answered(frame.type)
        return self._proxy.saw(self.number, sender, frame)

    def _answered(self, kind: str) -> None:
        if self._asked:
            self._asked = False
            self._proxy.count_round_trip(self.number)
        if kind == "G":
            self._copying = True
        elif kind == "Z":
            self._copying = False
            self._counting = True

    def _other(self, sender: Sender) -> asyncio.StreamWriter:
        return self._writers["server" if sender == "client" else "client"]

    async def _send(self, sender: Sender, data: bytes) -> None:
        writer = self._other(sender)
        if not data or writer.is_closing():
            return
        loop = asyncio.get_running_loop()
        delay = self._proxy.delay_server if sender == "server" else 0.0
        if sender == "server" and (delay > 0 or self._last_due > loop.time()):
            # By timer, so that the next bytes are read meanwhile: late, not slow. Never two at one moment,
            # since the order of timers that are due together is not promised.
            self._last_due = max(loop.time() + delay, self._last_due + 1e-6)
            loop.call_at(self._last_due, _write, writer, data)
            return
        writer.write(data)
        await writer.drain()

    async def _delivered(self, sender: Sender) -> None:
        """Wait until all that was sent is with the kernel, late bytes too."""
        writer = self._other(sender)
        loop = asyncio.get_running_loop()
        if sender == "server" and self._last_due > loop.time():
            await asyncio.sleep(self._last_due - loop.time())
        if not writer.is_closing():
            await writer.drain()

    def _reset_client(self) -> None:
        writer = self._writers["client"]
        raw = writer.get_extra_info("socket")
        with suppress(OSError):
            # Linger for no time: close() then sends a RST.
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()


def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    if not writer.is_closing():
        writer.write(data)


def _half_close(writer: asyncio.StreamWriter) -> None:
    """Say that nothing more comes, and still read what does."""
    with suppress(OSError, RuntimeError):
        if not writer.is_closing():
            writer.write_eof()
