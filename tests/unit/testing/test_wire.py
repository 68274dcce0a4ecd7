"""PostgreSQL's messages in a stream of bytes, however it was cut on its way."""

from __future__ import annotations

import struct

import pytest

from dbop_raw.testing.wire import ClientFramer, Frame, ServerFramer
from tests.support.protocol import framed

SSL_REQUEST = struct.pack("!II", 8, 80877103)
STARTUP = struct.pack("!II", 17, 196608) + b"user\0me\0\0"
STREAM = (
    SSL_REQUEST
    + STARTUP
    + framed(b"Q", b"SELECT 1\0")
    + framed(b"P", b"s1\0SELECT 2\0\0\0")
    + framed(b"X", b"")
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, len(STREAM)])
class TestAStreamCutAnywhere:
    def frames(self, size: int) -> list[Frame]:
        framer = ClientFramer()
        return [frame for at in range(0, len(STREAM), size) for frame in framer.feed(STREAM[at : at + size])]

    def test_each_message_is_found(self, size: int) -> None:
        assert [frame.type for frame in self.frames(size)] == ["ssl", "startup", "Q", "P", "X"]

    def test_the_sql_of_a_query_and_of_a_parse_is_read(self, size: int) -> None:
        assert [frame.sql for frame in self.frames(size)] == ["", "", "SELECT 1", "SELECT 2", ""]

    def test_no_byte_is_lost(self, size: int) -> None:
        assert b"".join(frame.raw for frame in self.frames(size)) == STREAM


def test_bytes_after_an_agreement_on_tls_are_opaque() -> None:
    framer = ServerFramer()
    framer.asked_for_encryption = True
    assert [(frame.type, frame.raw) for frame in framer.feed(b"S\x16\x03\x01")] == [
        ("ssl-answer", b"S"),
        ("opaque", b"\x16\x03\x01"),
    ]
