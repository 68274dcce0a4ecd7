"""PostgreSQL's protocol, version 3, as far as a proxy needs it: where a message ends, and what it is.

Source: PostgreSQL's documentation, "Frontend/Backend Protocol", chapter "Message Formats".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ClientFramer", "Frame", "Message", "Sender", "ServerFramer"]

Sender = Literal["client", "server"]

SHOWN = 200

# Messages without a type byte: only the first ones of a connection, told apart by the number after their
# length.
_UNTYPED = {80877102: "cancel", 80877103: "ssl", 80877104: "gssenc"}
_HEADER = struct.Struct("!cI")
_LENGTH = struct.Struct("!I")


@dataclass(frozen=True, slots=True)
class Message:
    """One message that came by.

    Attributes:
        connection: Which connection of the proxy, counted from 1.
        sender: Who sent it.
        type: Its type byte, such as ``Q`` or ``Z``. What has none is called ``startup``, ``ssl``, ``gssenc``,
            ``cancel``, ``ssl-answer``, or ``opaque`` for bytes that TLS hides.
        index: Which message of the proxy since the last ``reset_counts()``, counted from 1, both directions
            together.
        body: What follows the length; its first 200 bytes.
        sql: The whole SQL text of a Query or Parse message, else "".

    """

    connection: int
    sender: Sender
    type: str
    index: int
    body: bytes
    sql: str = ""


class Frame(NamedTuple):
    """One whole message, as it was on the wire."""

    type: str
    raw: bytes
    header: int

    @property
    def body(self) -> bytes:
        """The first bytes of what follows type and length."""
        return self.raw[self.header : self.header + SHOWN]

    @property
    def sql(self) -> str:
        """The SQL text of a client's Query or Parse message."""
        if self.type == "Q":
            return self.raw[5:-1].decode("utf-8", "replace")
        if self.type == "P":
            return self.raw[5:].split(b"\0", 2)[1].decode("utf-8", "replace")
        return ""


class _Framer:
    """Cuts a stream of bytes into messages, however it was split on the way."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.opaque = False

    @property
    def pending(self) -> bytes:
        """What came since the last whole message."""
        return bytes(self._buffer)

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Take bytes, and give the messages that are whole by now. Consume it fully, or lose the rest.

        Raises:
            ValueError: This is not PostgreSQL's protocol.

        """
        self._buffer += data
        while self._buffer:
            frame = Frame("opaque", bytes(self._buffer), 0) if self.opaque else self._next()
            if frame is None:
                return
            del self._buffer[: len(frame.raw)]
            yield frame

    def _next(self) -> Frame | None:
        return self._typed()

    def _typed(self) -> Frame | None:
        if len(self._buffer) < _HEADER.size:
            return None
        kind, length = _HEADER.unpack_from(self._buffer)
        if length < _LENGTH.size:
            raise ValueError(f"a message {kind!r} of length {length} is not PostgreSQL's protocol")
        size = 1 + length
        if len(self._buffer) < size:
            return None
        return Frame(kind.decode("latin-1"), bytes(self._buffer[:size]), _HEADER.size)


class ClientFramer(_Framer):
    """What a client sends: first messages without a type byte, then typed ones."""

    def __init__(self) -> None:
        super().__init__()
        self._started = False

    def _next(self) -> Frame | None:
        return self._typed() if self._started else self._untyped()

    def _untyped(self) -> Frame | None:
        if len(self._buffer) < 2 * _LENGTH.size:
            return None
        length, code = struct.unpack_from("!II", self._buffer)
        if length < 2 * _LENGTH.size:
            raise ValueError(f"a first message of length {length} is not PostgreSQL's protocol")
        if len(self._buffer) < length:
            return None
        kind = _UNTYPED.get(code, "startup")
        self._started = kind == "startup"
        return Frame(kind, bytes(self._buffer[:length]), _LENGTH.size)


class ServerFramer(_Framer):
    """What a server sends: typed messages, and one bare byte in answer to a wish for encryption."""

    def __init__(self) -> None:
        super().__init__()
        self.asked_for_encryption = False

    def _next(self) -> Frame | None:
        if not self.asked_for_encryption:
            return self._typed()
        self.asked_for_encryption = False
        answer = bytes(self._buffer[:1])
        # S or G: what follows is encrypted, and can only be passed on. (An old server may answer with an
        # error, E.)
        if answer == b"E":
            return self._typed()
        self.opaque = answer in {b"S", b"G"}
        return Frame("ssl-answer", answer, 0)
