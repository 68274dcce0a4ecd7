"""`Frame`: what holds for one step of a pipeline, handed down to the next one, never changed.

A combinator that limits what is inside of it hands on a narrower frame; what is outside keeps its own, so
there is nothing to put back.
"""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["OUTERMOST", "Frame"]


class Frame(NamedTuple):
    """The deadlines that a step has to keep, and whether anything follows it in its transaction."""

    deadline: float = math.inf
    """The event loop's time at which our tightest timeout or deadline runs out; clean-up goes by it."""
    server_deadline: float = math.inf
    """The event loop's time before which the server is told to end a statement: the same, or that of a
    tighter cancel scope of the caller's own."""
    lock: int | None = None
    """Milliseconds that the server waits for a lock; None: what is set there."""
    total: float = math.inf
    """The event loop's time at which a timeout around the retry whose policy the run has taken for its own
    runs out: one instant for all transactions of the run."""
    more_follows: bool = False
    """May more SQL follow in this transaction, beyond this step? If so, the server's limits are put back."""


OUTERMOST = Frame()
"""No deadline, and nothing follows."""
