"""What a faulty network does, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from dbop_raw.testing.wire import Message, Sender

__all__ = ["Action", "Fault", "Injected", "Side", "When", "message", "nth", "query"]

Action = Literal["cut", "reset", "hang", "delay"]
Side = Literal["before", "after"]
When = Callable[["Message"], bool]


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to a connection, at which message.

    Attributes:
        action: ``cut`` closes both sides in good order (FIN). ``reset`` sends the client a RST and closes the
            server's side. ``hang`` lets nothing more through, in either direction, until ``heal()``; the
            sockets stay open (what ``delay_server`` had on its way by then still arrives). ``delay`` holds
            back this direction for `seconds`.
        when: Asked about each message, in the order in which they pass, until the fault is used up.
        side: ``before``: the message does not reach the other side (with ``hang`` and ``delay``: not yet).
            ``after``: it was delivered in full, and then it happens.
        times: How often; ``None`` means each time.
        seconds: How long a ``delay`` is.

    Raises:
        ValueError: A value that is not one of these.

    """

    action: Action
    when: When
    side: Side = "before"
    times: int | None = 1
    seconds: float = 0.1

    def __post_init__(self) -> None:
        if self.action not in get_args(Action):
            raise ValueError(f"action is one of {', '.join(get_args(Action))}, not {self.action!r}")
        if self.side not in get_args(Side):
            raise ValueError(f"side is before or after, not {self.side!r}")
        if self.times is not None and self.times < 1:
            raise ValueError(f"times is 1 or more, or None, not {self.times}")
        if not self.seconds >= 0:
            raise ValueError(f"seconds is 0 or more, not {self.seconds}")


@dataclass(slots=True, eq=False)
class Injected:
    """A fault in a proxy, and how often it has happened.

    Attributes:
        fault: The fault.
        fired: How often it has happened.

    """

    fault: Fault
    fired: int = 0
    _happened: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    @property
    def used_up(self) -> bool:
        """Whether it will happen no more."""
        return self.fault.times is not None and self.fired >= self.fault.times

    def takes(self, message: Message) -> bool:
        """Tell whether it happens at this message."""
        return not self.used_up and self.fault.when(message)

    def fire(self) -> None:
        """Note that it happened."""
        self.fired += 1
        self._happened.set()

    async def wait(self) -> None:
        """Wait until it has happened once; bound it with a timeout of your own."""
        await self._happened.wait()


def query(containing: str) -> When:
    """Match a client's Query or Parse message whose SQL contains a text, case and all."""
    return lambda message: message.sender == "client" and bool(message.sql) and containing in message.sql


def message(sender: Sender, type: str, nth: int = 1) -> When:  # noqa: A002 - the protocol's word
    """Match the nth message of a type that one side sends, counted from the time that the fault is injected.

    It counts as it is asked: make a new one for each fault.
    """
    numbers = count(1)
    return lambda seen: seen.sender == sender and seen.type == type and next(numbers) == nth


def nth(n: int) -> When:
    """Match the nth message of the proxy since ``reset_counts()``, in whatever direction."""
    return lambda seen: seen.index == n
