"""The chooser: which span of a batch to try next, and in which way.

Pure, no I/O: it is told what happened, and how long it took.

A batch is a row of items of which some, unknown, can't be written. Writing a span of them is one attempt that
succeeds or fails as a whole. So the question is always the same: how long a span to try, and after a failure,
how to find the bad ones. There are four ways, and none always wins:

- the whole span at once: best as long as nothing fails;
- *jump*: the error names the item; write what is before it, leave it out, go on behind it;
- *bisect*: the error names nobody; halve until one is left;
- *rows*: let the server try row by row, in one round trip; it costs more for each row and less for each bad
  one.

Which is cheaper follows from four numbers: the share of bad items, the price of an attempt, of a row in an
attempt, and of a row that the server tries alone. All four are measured as work goes on and kept in `Memory`
from one batch to the next: on one server a row alone costs twice what it costs in a span; on a distributed
one, a hundred times.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

__all__ = ["Memory", "Spans", "Step"]

# Where the estimates begin (seconds), before anything was measured: one server on the same machine.
_ATTEMPT, _ROW, _ROW_ALONE = 3e-4, 3e-6, 6e-6
# How much a new measurement counts against what was known.
_WEIGHT = 0.3
# How much of what earlier batches told is kept with each new one: about ten of them count.
_KEEP = 0.9
# Knowledge of earlier batches counts like so many items of this one.
_PRIOR_ITEMS = 200.0
# A span of so many items or fewer tells the price of an attempt, one of more tells the price of a row.
_SMALL = 4
_LARGE = 64
# The first time that the server is to try row by row, it is given so many at the most: it may turn out to be
# dear.
_TRIAL = 256
# A price that was not paid for a while is believed less and less, by this factor for each time that it was
# too high: the first measurement may have had one-off costs in it, and a server may change.
_FADE = 0.98
# A clean batch opens at most so many spans: PostgreSQL caches 64 subtransactions of a backend, and RELEASE
# gives none back.
_MOST_SPANS = 60
_LEAST_SPAN = 64


def _blend(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT * (new - old)


@dataclass(slots=True)
class Memory:
    """What one batch learned for the next: measured, never assumed; None is not measured yet."""

    seen: float = 0.0
    """Items of the last batches: the older the batch, the less it counts."""
    found: float = 0.0
    """How many of these were bad."""
    attempt: float | None = None
    """Seconds for an attempt, whatever its length: the round trips."""
    row: float | None = None
    """Seconds for each item of a span."""
    row_alone: float | None = None
    """Seconds for each row that the server tries by itself."""
    rows_possible: bool = True
    """Can the server try row by row at all: the privilege, the language, the types?"""
    located: float = 0.5
    """The share of failures whose item was named."""

    @property
    def density(self) -> float:
        """The share of items that were bad."""
        return self.found / self.seen if self.seen else 0.0

    def learn_batch(self, total: int, bad: int) -> None:
        """A batch of `total` items had `bad` bad ones."""
        self.seen = _KEEP * self.seen + total
        self.found = _KEEP * self.found + bad

    def learn_write(self, length: int, seconds: float) -> None:
        """A span of `length` was written in `seconds`."""
        if seconds <= 0:
            return
        if length <= _SMALL:
            self.attempt = _blend(self.attempt, seconds)
        elif length >= _LARGE:
            self.row = _blend(self.row, seconds / length)

    def fade_rows(self) -> None:
        """Rows were not tried alone, because that was too dear when last measured."""
        if self.row_alone is not None:
            self.row_alone *= _FADE

    def learn_rows(self, length: int, seconds: float) -> None:
        """The server tried `length` rows one by one in `seconds`."""
        if seconds > 0 and length:
            self.row_alone = _blend(self.row_alone, seconds / length)


@dataclass(frozen=True, slots=True)
class Step:
    """Items `lo` up to but not including `hi`, to be written as one span, or by the server row by row."""

    way: Literal["write", "rows"]
    lo: int
    hi: int


@dataclass(slots=True)
class _Span:
    lo: int
    hi: int
    bad: bool = False
    """It is known that at least one item here is bad: trying the whole again would be in vain."""
    whole: bool = False
    """To be tried as it is: most likely good."""
    rows: bool = True
    """May the server try this one row by row? Not again where that failed."""
    if_clean: bool = False
    """The right half of a bad span: bad itself if the left half turns out clean."""


class Spans:
    """Chooses the steps of one batch of `total` items.

    Call `next()` for a step and tell what came of it with exactly one of `wrote`, `failed`, `again`, `rows`
    and `rows_failed`; until `next()` gives None. Then each item was written once or is in `bad`.

    `opaque`: the items are operations, so a failure always names its item, and what was done before it has to
    be done again.
    """

    def __init__(self, total: int, memory: Memory, *, opaque: bool = False) -> None:
        self.total = total
        self.bad: set[int] = set()
        self.memory = memory
        self._opaque = opaque
        self._resolved = 0
        self._todo: list[_Span] = [_Span(0, total)] if total else []
        self._now: _Span | None = None
        self._step: Step | None = None

    # --- estimates

    def _density(self) -> float:
        known = self.memory.density * _PRIOR_ITEMS + len(self.bad)
        return min(1.0, known / (_PRIOR_ITEMS + self._resolved))

    def _attempt(self) -> float:
        return self.memory.attempt or _ATTEMPT

    def _row(self) -> float:
        return self.memory.row or _ROW

    def _rows_cost(self, length: int) -> float:
        alone = self.memory.row_alone
        if alone is None:
            alone = max(_ROW_ALONE, 2 * self._row())
        return self._attempt() + length * alone

    def _search_cost(self, length: int, bad: float, located: float) -> float:
        """Seconds to find `bad` items among `length`: jumping where they are named, else halving."""
        bad = max(1.0, min(bad, length))
        jump = 2 * bad * self._attempt() + 2 * length * self._row()
        depth = math.log2(max(2.0, length / bad)) + 1
        halve = 2 * bad * depth * self._attempt() + length * (math.log2(bad) + 2) * self._row()
        return located * jump + (1 - located) * halve

    def _limit(self) -> int:
        """The longest span worth trying as a whole."""
        density = self._density()
        if self._opaque:
            # Each span costs one more message, each bad item the half of a span again: least in all at the
            # root of 2 / density. But not before something has failed: this batch may be clean.
            longest = max(_LEAST_SPAN, math.ceil(self.total / _MOST_SPANS))
            return max(1, min(longest, round(math.sqrt(2 / density)))) if self.bad else longest
        return self.total if density * self.total <= 1 else max(1, round(1 / density))

    def _rows_now(self, length: int) -> bool:
        """Is it cheaper to let the server try row by row at once than to try the whole first?"""
        density = self._density()
        if density <= 0:
            return False
        fails = 1 - (1 - density) ** length
        alone = self._rows_cost(length)
        after = min(self._search_cost(length, density * length, self.memory.located), alone)
        return alone < self._attempt() + length * self._row() + fails * after

    def _may_use_rows(self, span: _Span) -> bool:
        return span.rows and self.memory.rows_possible and not self._opaque and span.hi - span.lo > 1

    # --- the next step

    def next(self) -> Step | None:
        """The next step; None when all items are accounted for."""
        if not self._todo:
            return None
        span = self._todo.pop()
        length = span.hi - span.lo
        may_use_rows = self._may_use_rows(span)
        if length == 1 or span.whole:
            return self._write(span)
        if span.bad:
            search = self._search_cost(length, self._density() * length, 0.0)
            if may_use_rows:
                if self._rows_cost(length) < search:
                    return self._rows(span)
                self.memory.fade_rows()
            return self._halve(span)
        if may_use_rows and self._rows_now(length):
            return self._rows(span)
        # Without a server that tries rows, a span longer than the usual distance between bad items would only
        # fail.
        if self._opaque or not may_use_rows:
            span = self._cut(span, self._limit())
        return self._write(span)

    def _cut(self, span: _Span, limit: int) -> _Span:
        if span.hi - span.lo <= limit:
            return span
        middle = span.lo + limit
        self._todo.append(_Span(middle, span.hi, rows=span.rows))
        return _Span(span.lo, middle, rows=span.rows)

    def _halve(self, span: _Span) -> Step:
        middle = (span.lo + span.hi) // 2
        self._todo.append(_Span(middle, span.hi, rows=span.rows, if_clean=True))
        return self._write(_Span(span.lo, middle, rows=span.rows, whole=True))

    def _write(self, span: _Span) -> Step:
        self._now = span
        self._step = Step("write", span.lo, span.hi)
        return self._step

    def _rows(self, span: _Span) -> Step:
        if self.memory.row_alone is None:
            span = self._cut(span, _TRIAL)
        self._now = span
        self._step = Step("rows", span.lo, span.hi)
        return self._step

    def _take(self) -> _Span:
        if self._now is None:
            message = "tell the chooser of a step once, after next()"
            raise RuntimeError(message)
        span, self._now = self._now, None
        return span

    # --- what came of it

    def _settle_right(self, *, clean: bool) -> None:
        """The left half of a bad span is done: if it was clean, the right half is the bad one."""
        if self._todo and self._todo[-1].if_clean:
            right = self._todo[-1]
            right.if_clean = False
            right.bad = clean and right.hi - right.lo > 1

    def wrote(self, seconds: float = 0.0) -> None:
        """The span was written."""
        span = self._take()
        self._resolved += span.hi - span.lo
        self.memory.learn_write(span.hi - span.lo, seconds)
        self._settle_right(clean=True)

    def failed(self, culprit: int | None) -> int | None:
        """The span could not be written; `culprit` is the item that the error names, if any.

        Gives the item that is set aside for this error, or None when the search goes on.
        """
        span = self._take()
        self._settle_right(clean=False)
        length = span.hi - span.lo
        if culprit is not None and not span.lo <= culprit < span.hi:
            culprit = None
        if length > 1 and not self._opaque:
            self.memory.located = _blend(self.memory.located, 0.0 if culprit is None else 1.0)
        if length == 1:
            culprit = span.lo
        if culprit is None:
            self._todo.append(_Span(span.lo, span.hi, bad=True, rows=span.rows))
            return None
        if length > 1 and self._may_use_rows(span):
            bad = self._density() * length
            if self._rows_cost(length) < self._search_cost(length, bad, 1.0):
                self._todo.append(_Span(span.lo, span.hi, bad=True, rows=True))
                return None
            self.memory.fade_rows()
        self._split(span, culprit, culprit + 1)
        self.bad.add(culprit)
        self._resolved += 1
        return culprit

    def again(self, culprit: int | None) -> None:
        """Try the span again: it failed for a passing reason. What is before `culprit` is made safe first."""
        span = self._take()
        self._settle_right(clean=False)
        if culprit is None or not span.lo <= culprit < span.hi:
            culprit = span.lo
        self._split(span, culprit, culprit)

    def _split(self, span: _Span, end: int, start: int) -> None:
        if start < span.hi:
            self._todo.append(_Span(start, span.hi, rows=span.rows))
        if span.lo < end:
            # Once more, and most likely in vain to look inside: it was written before the culprit was met.
            self._todo.append(_Span(span.lo, end, whole=True, rows=span.rows))

    def rows(self, bad: Collection[int], seconds: float = 0.0) -> None:
        """The server has tried row by row: all but `bad` are written."""
        span = self._take()
        self.bad.update(bad)
        self._resolved += span.hi - span.lo
        self.memory.learn_rows(span.hi - span.lo, seconds)
        self._settle_right(clean=not bad)

    def rows_failed(self, *, possible: bool) -> None:
        """The server could not try row by row: not here, or (`possible=False`) not at all."""
        span = self._take()
        self.memory.rows_possible = self.memory.rows_possible and possible
        self._todo.append(
            _Span(span.lo, span.hi, bad=span.bad, whole=False, rows=False, if_clean=span.if_clean)
        )

    def finish(self) -> None:
        """Keep what this batch taught."""
        self.memory.learn_batch(self.total, len(self.bad))
