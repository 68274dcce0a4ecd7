"""`ControlBuffer`: control SQL that has gathered and was not sent, the savepoints it opens, and the limits.

It knows no connection: it is told what is wanted, and gives messages. What gathers is sent as *one* message
just before the next body, so BEGIN, SAVEPOINT and SET LOCAL cost one round trip together, the end of one span
travels with the start of the next, and what COMMIT does anyway is never sent.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dbop_raw.driver import sql
from dbop_raw.session.frame import Frame

__all__ = ["ControlBuffer", "Mark", "State", "Told"]


class State(enum.Enum):
    """How far the transaction is."""

    NONE = "none"
    """None of ours: autocommit, or a transaction that somebody else began."""
    UNBEGUN = "unbegun"
    """BEGIN waits with the other SQL; the server knows of nothing yet."""
    OPEN = "open"
    """BEGIN was sent."""
    RESTARTING = "restarting"
    """In an open transaction, ROLLBACK and BEGIN wait to be sent."""


# A member of an enum is dear to look up.
_UNBEGUN, _OPEN, _RESTARTING = State.UNBEGUN, State.OPEN, State.RESTARTING


class Told(NamedTuple):
    """The limits that the server was told."""

    deadline: float
    """The instant that they are for."""
    limits: sql.Limits
    expires: float
    """The event loop's time at which a statement that was sent with them is ended, if it starts at once."""
    tracked: bool
    """Does the server know what to put back?"""


@dataclass(slots=True, eq=False)
class Mark:
    """An open savepoint, and the limits in force when it was set: ROLLBACK TO undoes SET LOCAL."""

    depth: int
    told: Told | None
    root: bool = False
    """It stands where the transaction begins: BEGIN does for it, and no subtransaction is needed."""
    there: bool = True
    """False: the server refused to set it, because the transaction had failed before."""


class ControlBuffer:
    """The control SQL of one connection's transaction.

    Args:
        begin: The statement that begins the transaction; None where each statement is its own, or where
            somebody else has begun one.
    """

    __slots__ = (
        "_begin",
        "_marks",
        "_opened",
        "_released",
        "_statements",
        "must_send",
        "state",
        "told",
        "told_last",
        "waiting",
    )

    def __init__(self, begin: str | None = None) -> None:
        self._begin = begin
        self.state = State.NONE if begin is None else _UNBEGUN
        # What waits behind BEGIN, where that waits too.
        self._statements: list[str] = []
        self._marks: list[Mark] = []
        # What the SQL that waits opens and releases.
        self._opened: list[Mark] = []
        self._released: list[Mark] = []
        self.waiting = begin is not None
        """Is there SQL that has not been sent?"""
        self.must_send = False
        """Is there SQL that COMMIT does not make needless: a ROLLBACK TO?"""
        self.told: Told | None = None
        """The server's limits by what was sent; None: the session's own."""
        self.told_last: Told | None = None
        """The limits that were sent last, whatever was undone since: those that ended a statement."""

    @property
    def begins(self) -> bool:
        """Does what waits begin the transaction, for the first time or again?"""
        return self.state is _UNBEGUN or self.state is _RESTARTING

    @property
    def begun(self) -> bool:
        """Has BEGIN been sent? Until a body needs the connection it has not, and there is nothing to end."""
        return self.state is _OPEN or self.state is _RESTARTING

    def push(self, statement: str) -> None:
        """Leave `statement` to be sent before the next body."""
        self._statements.append(statement)
        self.waiting = True

    # --- savepoints

    def savepoint(self, *, or_begin: bool = False) -> None:
        """Open a savepoint before the next body.

        Args:
            or_begin: Open none where nothing has been done since BEGIN, for ROLLBACK and BEGIN undo the same.
                That spares the server a subtransaction with a transaction id of its own; but what is tried
                again begins a new transaction, with another time and snapshot.
        """
        at_begin = or_begin and self.begins and not self._statements
        mark = Mark(len(self._marks) + 1, self.told, root=at_begin)
        if not at_begin:
            self.push(sql.savepoint(mark.depth))
            self._opened.append(mark)
        self._marks.append(mark)

    def rollback_to(self) -> None:
        """Undo all since the newest savepoint, which stays open."""
        mark = self._marks[-1]
        if mark.there:
            self._back_to(mark)

    def _back_to(self, mark: Mark) -> None:
        if not mark.root:
            self.push(sql.rollback_to(mark.depth))
        elif self.begins and not self._statements:
            # Nothing has been done since BEGIN, so there is nothing to undo.
            return
        else:
            # The transaction begins again, so what waits to follow in this one is moot.
            self._statements = []
            self._opened, self._released = [], []
            if self.state is _UNBEGUN:
                return
            self.state = _RESTARTING
            self.waiting = True
        self.told = mark.told
        self.must_send = True

    def release(self) -> None:
        """Close the newest savepoint, and keep what was done since."""
        mark = self._marks.pop()
        if mark.there:
            if not mark.root:
                self.push(sql.release(mark.depth))
            self._released.append(mark)

    def abandon(self) -> None:
        """Undo all since the newest savepoint and close it: the depth is what it was before."""
        self.rollback_to()
        self.release()

    # --- messages

    def stale(self, frame: Frame, clock: Callable[[], float]) -> bool:
        """Does the server have to be told other limits, for a statement of `frame` that is sent now?"""
        told = self.told
        if math.isinf(frame.server_deadline) and frame.lock is None:
            return told is not None and told.tracked
        if told is None or told.deadline != frame.server_deadline or told.limits[1] != frame.lock:
            return True
        # A statement that starts only now must end before the deadline too.
        statement = told.limits[0]
        return statement is not None and clock() + statement / 1000 >= told.deadline

    def take(self, frame: Frame, clock: Callable[[], float], *, limited: bool = True) -> str:
        """Give all SQL that waits as one message, with the limits where they change; "" when there is none.

        Args:
            frame: What the next body has to keep.
            clock: Gives the event loop's time.
            limited: False outside of a transaction, where SET LOCAL means nothing.
        """
        limits = self._limits(frame, clock()) if limited and self.stale(frame, clock) else ""
        parts = self._statements
        if self.state is _UNBEGUN and self._begin is not None:
            parts = [self._begin, *parts]
        elif self.state is _RESTARTING and self._begin is not None:
            parts = [sql.ROLLBACK, self._begin, *parts]
        if limits:
            parts = [*parts, limits]
        message = sql.join(*parts)
        self.sent()
        return message

    def sent(self) -> None:
        """What waited is on its way."""
        if self.begins:
            self.state = _OPEN
        self._forget()

    def drop(self) -> None:
        """Forget what was not sent: the transaction is over, or never began."""
        if self.state is _RESTARTING:
            self.state = _OPEN
        self._forget()

    def _forget(self) -> None:
        self._statements = []
        self._opened, self._released = [], []
        self.waiting = self.must_send = False

    def _limits(self, frame: Frame, now: float) -> str:
        wanted = sql.limits(frame.server_deadline - now, frame.lock)
        told = self.told
        tracked = frame.more_follows or (told is not None and told.tracked)
        if wanted == sql.UNLIMITED:
            self.told = None
        else:
            statement = wanted[0]
            expires = math.inf if statement is None else now + statement / 1000
            self.told = self.told_last = Told(
                frame.server_deadline, (statement, frame.lock), expires, tracked
            )
        if tracked:
            return sql.track_limits(wanted, sql.UNLIMITED if told is None else told.limits)
        return sql.set_limits(wanted)

    # --- a message that was refused from its first word on

    def marks_on_their_way(self) -> tuple[Sequence[Mark], Sequence[Mark]]:
        """Give the savepoints that what waits opens, and those that it releases."""
        return self._opened, self._released

    def nothing_done(self, opened: Sequence[Mark], released: Sequence[Mark]) -> None:
        """Take in that a body had swallowed an error, so the server refused the whole message.

        What it was to open is not there, and what it was to release is: that is undone instead.
        """
        for mark in opened:
            mark.there = False
        kept = [mark for mark in released if mark.there]
        if kept:
            outermost = min(kept, key=lambda mark: mark.depth)
            self._back_to(outermost)
            if not outermost.root:
                self.push(sql.release(outermost.depth))
