"""What went through a proxy: messages in order, round trips, and the faults that are still to meet them.

It knows no sockets, so that counting and matching can be told from carrying: a line reports each message here
and asks what is to happen to it.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING

from dbop_raw.testing.faults import Fault, Injected
from dbop_raw.testing.wire import Message

if TYPE_CHECKING:
    from dbop_raw.testing.wire import Frame, Sender

__all__ = ["Traffic"]

REMEMBERED = 10_000


class Traffic:
    """The messages of all lines of one proxy, and the faults in it.

    Attributes:
        messages: The last 10,000 messages since the start or :meth:`reset`.
        round_trips: How many round trips each line made since then, by the line's number.
        injected: The faults, in the order in which they were injected.

    """

    def __init__(self) -> None:
        self.messages: deque[Message] = deque(maxlen=REMEMBERED)
        self.round_trips: Counter[int] = Counter()
        self.injected: list[Injected] = []
        self._index = 0

    def reset(self) -> None:
        """Count from nought again: messages, their index, and round trips. The faults stay."""
        self.messages.clear()
        self.round_trips.clear()
        self._index = 0

    def note(self, line: int, sender: Sender, frame: Frame) -> Message:
        """Remember that a message came by, and return it with its index.

        Args:
            line: The number of the line that it came by.
            sender: Which side sent it.
            frame: What was on the wire.

        """
        self._index += 1
        sql = frame.sql if sender == "client" else ""
        seen = Message(line, sender, frame.type, self._index, frame.body, sql)
        self.messages.append(seen)
        return seen

    def fault_at(self, message: Message) -> Fault | None:
        """Return the fault that happens at a message, if one does; it counts as having happened."""
        for injected in self.injected:
            if injected.takes(message):
                injected.fire()
                return injected.fault
        return None
