"""Messages of PostgreSQL's protocol, as bytes on the wire and as a proxy shows them."""

from __future__ import annotations

import struct

from dbop_raw.testing import Message

__all__ = ["answer_to_commit", "framed"]


def framed(kind: bytes, body: bytes) -> bytes:
    """Return a message with its type byte and its length."""
    return kind + struct.pack("!I", 4 + len(body)) + body


def answer_to_commit(message: Message) -> bool:
    """Match the server's CommandComplete after a COMMIT: held back, the COMMIT is in doubt."""
    return message.sender == "server" and message.type == "C" and message.body.startswith(b"COMMIT")
