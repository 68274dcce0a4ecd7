"""The cost model: what an attempt, a row and a bad row cost on this server, measured as work goes on.

The chooser (`spans.py`) compares the ways of writing a span by these prices. They differ too much from one
server to the next to be constants: on one, a row that the server tries alone costs twice what it costs in a
span; on a distributed one, a hundred times. So a batch keeps one `CostModel`, and what one of its runs
measured serves the next.

Pure: it is told what happened and how long it took.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["CostModel", "blend"]

# Where the estimates begin (seconds), before anything was measured: one server on the same machine.
_ATTEMPT, _ROW, _ROW_ALONE = 3e-4, 3e-6, 6e-6
# How much a new measurement counts against what was known.
_WEIGHT = 0.3
# How much of what earlier batches told is kept with each new one: about ten of them count.
_KEEP = 0.9
# A span of so many items or fewer tells the price of an attempt, one of more tells the price of a row.
_SMALL = 4
_LARGE = 64
# A price that was not paid for a while is believed less and less, by this factor for each time that it was
# too high: the first measurement may have had one-off costs in it, and a server may change.
_FADE = 0.98


def blend(old: float | None, new: float) -> float:
    """Return a moving average: `old`, moved towards the measurement `new`; `new` where there was none."""
    return new if old is None else old + _WEIGHT * (new - old)


@dataclass(slots=True)
class CostModel:
    """What the runs of one batch have measured; None is not measured yet."""

    seen: float = 0.0
    """Items of the last batches: the older the batch, the less it counts."""
    bad: float = 0.0
    """How many of these were bad, weighted alike."""
    attempt: float | None = None
    """Seconds for an attempt to write a span, whatever its length: the round trips."""
    row: float | None = None
    """Seconds for each item of a span."""
    row_alone: float | None = None
    """Seconds for each row that the server tries by itself."""
    rows_possible: bool = True
    """Can the server try row by row at all? That takes the privilege, the language, and types that fit."""
    located: float = 0.5
    """The share of failed spans whose error named the item."""

    @property
    def failure_rate(self) -> float:
        """The share of items that were bad, 0 to 1."""
        return self.bad / self.seen if self.seen else 0.0

    # --- what it is told

    def learn_batch(self, total: int, bad: int) -> None:
        """Take in that a batch of `total` items had `bad` bad ones."""
        self.seen = _KEEP * self.seen + total
        self.bad = _KEEP * self.bad + bad

    def learn_write(self, length: int, seconds: float) -> None:
        """Take in that a span of `length` items was written in `seconds`."""
        if seconds <= 0:
            return
        if length <= _SMALL:
            self.attempt = blend(self.attempt, seconds)
        elif length >= _LARGE:
            self.row = blend(self.row, seconds / length)

    def learn_rows(self, length: int, seconds: float) -> None:
        """Take in that the server tried `length` rows one by one in `seconds`; 0 seconds: not measured."""
        if seconds > 0 and length:
            self.row_alone = blend(self.row_alone, seconds / length)

    def learn_location(self, *, named: bool) -> None:
        """Take in whether the error of a failed span named its item."""
        self.located = blend(self.located, 1.0 if named else 0.0)

    def fade_rows(self) -> None:
        """Believe the price of a row alone a little less: it was too dear to be paid, and so not measured."""
        if self.row_alone is not None:
            self.row_alone *= _FADE

    # --- what it estimates

    def span_cost(self, length: int) -> float:
        """Seconds to write a span of `length` items in one attempt."""
        return (self.attempt or _ATTEMPT) + length * (self.row or _ROW)

    def rows_cost(self, length: int) -> float:
        """Seconds for the server to try `length` rows one by one."""
        alone = self.row_alone
        if alone is None:
            alone = max(_ROW_ALONE, 2 * (self.row or _ROW))
        return (self.attempt or _ATTEMPT) + length * alone

    def search_cost(self, length: int, bad: float, located: float) -> float:
        """Seconds to find `bad` items among `length`, of whose failures the share `located` is named.

        Where an item is named, the search jumps to it: two attempts. Where it is not, the span is halved
        until the item is left.
        """
        attempt, row = self.attempt or _ATTEMPT, self.row or _ROW
        bad = max(1.0, min(bad, length))
        jump = 2 * bad * attempt + 2 * length * row
        depth = math.log2(max(2.0, length / bad)) + 1
        halve = 2 * bad * depth * attempt + length * (math.log2(bad) + 2) * row
        return located * jump + (1 - located) * halve
