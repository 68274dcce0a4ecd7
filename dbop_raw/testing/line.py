"""One connection through the fault proxy: two pumps, what they count, and what befalls them.

A line knows nothing of the other lines: what came by, and which fault is due, it tells and asks the traffic.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

from dbop_raw.testing.wire import ClientFramer, ServerFramer

if TYPE_CHECKING:
    from collections.abc import Callable

    from dbop_raw.testing.faults import Fault
    from dbop_raw.testing.traffic import Traffic
    from dbop_raw.testing.wire import Frame, Message, Sender

__all__ = ["CHUNK", "Line"]

CHUNK = 256 * 1024

# What a server may send at any time, unasked: NoticeResponse, NotificationResponse, ParameterStatus.
UNASKED = frozenset("NAS")
# What a client sends without asking for an answer: CopyData, CopyDone, CopyFail, Terminate.
NO_QUESTION = frozenset("dcfX")


class Line:
    """One client's connection, and the one to the server behind it.

    Args:
        number: Which connection of its proxy, counted from 1.
        reader: What the client sends.
        writer: To the client.
        traffic: What each message is told to, and what tells which fault meets it.
        delay: Asked for the seconds that bytes from the server are late, as they come.

    Attributes:
        number: As above.
        flows: Set unless the line hangs.

    """

    def __init__(
        self,
        number: int,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        traffic: Traffic,
        delay: Callable[[], float],
    ) -> None:
        self.number = number
        self.flows = asyncio.Event()
        self.flows.set()
        self._reader = reader
        self._traffic = traffic
        self._delay = delay
        self._writers = {"client": writer}
        self._from_client = ClientFramer()
        self._from_server = ServerFramer()
        self._dead = False
        self._counting = False
        self._copying = False
        self._asked = False
        # When the last of the bytes that are late leaves, by the loop's clock.
        self._last_due = 0.0

    async def serve(self, host: str, port: int) -> None:
        """Connect to the server, and carry messages both ways until both sides have closed.

        Args:
            host: Where the server is.
            port: Its port.

        """
        try:
            server_reader, server_writer = await asyncio.open_connection(host, port, limit=CHUNK)
        except OSError:
            self._reset_client()  # the nearest thing to a refused connection, once it was accepted
            return
        self._writers["server"] = server_writer
        for each in self._writers.values():
            # drain() then means: it is all with the kernel.
            each.transport.set_write_buffer_limits(0)
        await asyncio.gather(self._carry("client", self._reader), self._carry("server", server_reader))

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
            fault = self._traffic.fault_at(seen)
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
        return self._traffic.note(self.number, sender, frame)

    def _answered(self, kind: str) -> None:
        if self._asked:
            self._asked = False
            self._traffic.round_trips[self.number] += 1
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
        delay = self._delay() if sender == "server" else 0.0
        if sender == "server" and (delay > 0 or self._last_due > loop.time()):
            # By timer, so that the next bytes are read meanwhile: late, not slow. Never two at one moment,
            # since the order of timers that are due together is not promised.
            self._last_due = max(loop.time() + delay, self._last_due + 1e-6)
            loop.call_at(self._last_due, self._write_late, writer, data)
            return
        writer.write(data)
        await writer.drain()

    def _write_late(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        if not self._dead and not writer.is_closing():
            writer.write(data)

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
        if writer.is_closing():
            return  # uvloop has no socket any more to ask for
        raw = writer.get_extra_info("socket")
        with suppress(OSError):
            # Linger for no time: close() then sends a RST.
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()


def _half_close(writer: asyncio.StreamWriter) -> None:
    """Say that nothing more comes, and still read what does."""
    with suppress(OSError, RuntimeError):
        if not writer.is_closing():
            writer.write_eof()
