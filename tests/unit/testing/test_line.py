"""What a line counts: a round trip is each turn of the traffic from the client to the server and back."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from dbop_raw.testing.line import Line
from dbop_raw.testing.traffic import Traffic
from dbop_raw.testing.wire import Frame, Sender
from tests.support.protocol import framed

STARTUP = "c:startup s:R s:S s:K s:Z"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ("c:Q s:C s:Z", 1),
        ("c:P c:D c:H s:1 s:T c:B c:E c:S s:2 s:C s:Z", 2),
        ("c:P c:B c:E c:H s:1 s:2 s:G c:d c:d c:c c:S s:C s:Z", 1),  # a COPY with its data
        ("c:Q c:d s:G c:d c:c s:C s:Z c:Q s:C s:Z", 2),
        ("c:Q s:G c:d s:E s:Z c:d c:c c:Q s:C s:Z", 2),  # it failed while data was still on its way
        ("s:N s:A s:S c:X", 0),
        ("c:P s:N c:S s:1 s:Z", 1),  # a notice between two halves of a question is no answer
        ("c:Q s:A s:C s:Z", 1),
    ],
)
async def test_a_turn_of_the_traffic_is_a_round_trip(messages: str, expected: int) -> None:
    traffic = Traffic()
    line = Line(1, asyncio.StreamReader(), cast("asyncio.StreamWriter", None), traffic, lambda: 0.0)
    senders: dict[str, Sender] = {"c": "client", "s": "server"}
    for part in f"{STARTUP} {messages}".split():
        sender, _, kind = part.partition(":")
        line._note(senders[sender], Frame(kind, framed(b"?", b"\0\0"), 5))
    assert traffic.round_trips[1] == expected
