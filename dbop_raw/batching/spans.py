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
attempt, and of a row that the server tries alone. The cost model (`costs.py`) keeps them from one batch to
the next.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from dbop_raw.batching.costs import CostModel

__all__ = ["Spans", "Step"]

# Knowledge of earlier batches counts like so many items of this one.
_PRIOR_ITEMS = 200.0
# The first time that the server is to try row by row, it is given so many at the most: it may turn out to be
# dear.
_TRIAL = 256
# A clean batch opens at most so many spans: PostgreSQL caches 64 subtransactions of a backend, and RELEASE
# gives none back.
_MOST_SPANS = 60
_LEAST_SPAN = 64


@dataclass(frozen=True, slots=True)
class Step:
    """Items `lo` up to but not including `hi`, and how they are to be written."""

    way: Literal["write", "rows"]
    """`write`: as one span. `rows`: by the server, row by row."""
    lo: int
    hi: int


@dataclass(slots=True)
class _Span:
    """Items `lo` up to but not including `hi` that are still to be done, and what is known of them."""

    lo: int
    hi: int
    bad: bool = False
    """It is known that at least one item here is bad: trying the whole again would be in vain."""
    likely_good: bool = False
    """To be tried as it is, whatever the failure rate says."""
    may_try_rows: bool = True
    """May the server try this one row by row? Not again where that failed."""
    bad_if_left_is_clean: bool = False
    """The right half of a bad span: bad itself if the left half turns out clean."""


class Spans:
    """Chooses the steps of one batch.

    Call `next()` for a step and tell what came of it with exactly one of `wrote`, `failed`, `again`, `rows`
    and `rows_failed`; until `next()` gives None. Then each item was written once or is in `bad`.

    Args:
        total: The number of items.
        costs: What earlier batches measured; it learns from this one.
        per_item: The items are operations. A failure then always names its item, and what was done before it
            in its span has to be done again.
        rows: May the server try items one by one? Not where some stand or fall together.
        cut: May a span be cut because a shorter one has better chances? Not where items may need each other.
    """

    def __init__(
        self, total: int, costs: CostModel, *, per_item: bool = False, rows: bool = True, cut: bool = True
    ) -> None:
        self.total = total
        self.bad: set[int] = set()
        """The items that can't be written, as far as they are found."""
        self._costs = costs
        self._per_item = per_item
        # Of this batch: the next may be on another server, or of other rows.
        self._rows_possible = costs.rows_possible
        self._rows_allowed = rows
        self._cuts = cut
        # How many items are written or in `bad`.
        self._done = 0
        # A stack: the next span is the last one.
        self._todo: list[_Span] = [_Span(0, total)] if total else []
        self._current: _Span | None = None

    # --- estimates

    def _failure_rate(self) -> float:
        known = self._costs.failure_rate * _PRIOR_ITEMS + len(self.bad)
        return min(1.0, known / (_PRIOR_ITEMS + self._done))

    def _longest(self) -> int:
        """The longest span worth trying as a whole."""
        rate = self._failure_rate()
        if self._per_item:
            # Each span costs one more message, each bad item the half of a span again: least in all at the
            # root of 2 / rate. But not before something has failed: this batch may be clean.
            longest = max(_LEAST_SPAN, math.ceil(self.total / _MOST_SPANS))
            return max(1, min(longest, round(math.sqrt(2 / rate)))) if self.bad else longest
        return self.total if rate * self.total <= 1 else max(1, round(1 / rate))

    def _rows_are_cheaper(self, length: int) -> bool:
        """Is it cheaper to let the server try row by row at once than to try the whole first?"""
        rate, costs = self._failure_rate(), self._costs
        if rate <= 0:
            return False
        fails = 1 - (1 - rate) ** length
        alone = costs.rows_cost(length)
        after = min(costs.search_cost(length, rate * length, costs.located), alone)
        return alone < costs.span_cost(length) + fails * after

    def _may_try_rows(self, span: _Span) -> bool:
        return (
            self._rows_allowed
            and self._rows_possible
            and span.may_try_rows
            and not self._per_item
            and span.hi - span.lo > 1
        )

    # --- the next step

    def next(self) -> Step | None:
        """Return the next step; None when all items are accounted for."""
        if not self._todo:
            return None
        span = self._todo.pop()
        length = span.hi - span.lo
        may_try_rows = self._may_try_rows(span)
        if length == 1 or span.likely_good:
            return self._write(span)
        if span.bad:
            search = self._costs.search_cost(length, self._failure_rate() * length, 0.0)
            if may_try_rows:
                if self._costs.rows_cost(length) < search:
                    return self._rows(span)
                self._costs.fade_rows()
            return self._halve(span)
        if may_try_rows and self._rows_are_cheaper(length):
            return self._rows(span)
        # Without a server that tries rows, a span longer than the usual distance between bad items would only
        # fail.
        if self._cuts and (self._per_item or not may_try_rows):
            span = self._cut(span, self._longest())
        return self._write(span)

    def _cut(self, span: _Span, longest: int) -> _Span:
        """Return the first `longest` items of `span`; the rest stays to be done."""
        if span.hi - span.lo <= longest:
            return span
        middle = span.lo + longest
        self._todo.append(_Span(middle, span.hi, may_try_rows=span.may_try_rows))
        return _Span(span.lo, middle, may_try_rows=span.may_try_rows)

    def _halve(self, span: _Span) -> Step:
        middle = (span.lo + span.hi) // 2
        self._todo.append(_Span(middle, span.hi, may_try_rows=span.may_try_rows, bad_if_left_is_clean=True))
        return self._write(_Span(span.lo, middle, may_try_rows=span.may_try_rows, likely_good=True))

    def _write(self, span: _Span) -> Step:
        self._current = span
        return Step("write", span.lo, span.hi)

    def _rows(self, span: _Span) -> Step:
        if self._costs.row_alone is None:
            span = self._cut(span, _TRIAL)
        self._current = span
        return Step("rows", span.lo, span.hi)

    def _take_current(self) -> _Span:
        if self._current is None:
            raise RuntimeError("the chooser is told of a step once, after next()")
        span, self._current = self._current, None
        return span

    # --- what came of it

    def _left_half_is_done(self, *, clean: bool) -> None:
        """Where the step was the left half of a bad span and `clean`, the right half is the bad one."""
        if self._todo and self._todo[-1].bad_if_left_is_clean:
            right = self._todo[-1]
            right.bad_if_left_is_clean = False
            right.bad = clean and right.hi - right.lo > 1

    def wrote(self, seconds: float = 0.0) -> None:
        """Take in that the span was written, in `seconds` (0: not measured)."""
        span = self._take_current()
        self._done += span.hi - span.lo
        self._costs.learn_write(span.hi - span.lo, seconds)
        self._left_half_is_done(clean=True)

    def failed(self, culprit: int | None) -> int | None:
        """Take in that the span could not be written.

        Args:
            culprit: The item that the error names, if any. One that is not in the span is taken for none.

        Returns:
            The item that is bad by this error, now in `bad`; None when the search goes on.
        """
        span = self._take_current()
        self._left_half_is_done(clean=False)
        length = span.hi - span.lo
        if culprit is not None and not span.lo <= culprit < span.hi:
            culprit = None
        if length > 1 and not self._per_item:
            self._costs.learn_location(named=culprit is not None)
        if length == 1:
            culprit = span.lo
        if culprit is None:
            self._todo.append(_Span(span.lo, span.hi, bad=True, may_try_rows=span.may_try_rows))
            return None
        if length > 1 and self._may_try_rows(span):
            bad = self._failure_rate() * length
            if self._costs.rows_cost(length) < self._costs.search_cost(length, bad, 1.0):
                self._todo.append(_Span(span.lo, span.hi, bad=True))
                return None
            self._costs.fade_rows()
        self._split(span, culprit, culprit + 1)
        self.bad.add(culprit)
        self._done += 1
        return culprit

    def again(self, culprit: int | None) -> None:
        """Take in that the span failed for a passing reason: it is tried again.

        Args:
            culprit: The item that the error names, if any. What is before it is written first, by itself.
        """
        span = self._take_current()
        self._left_half_is_done(clean=False)
        if culprit is None or not span.lo <= culprit < span.hi:
            culprit = span.lo
        self._split(span, culprit, culprit)

    def _split(self, span: _Span, end: int, start: int) -> None:
        """Leave the items of `span` before `end`, and those from `start` on, to be done."""
        if start < span.hi:
            self._todo.append(_Span(start, span.hi, may_try_rows=span.may_try_rows))
        if span.lo < end:
            # They were written once, before the culprit was met: most likely they will be again.
            self._todo.append(_Span(span.lo, end, likely_good=True, may_try_rows=span.may_try_rows))

    def rows(self, bad: Collection[int], seconds: float = 0.0) -> None:
        """Take in that the server has tried row by row, in `seconds` (0: not measured).

        Args:
            bad: The items that it could not write; all others of the span are written.
            seconds: What it took.
        """
        span = self._take_current()
        self.bad.update(bad)
        self._done += span.hi - span.lo
        self._costs.learn_rows(span.hi - span.lo, seconds)
        self._left_half_is_done(clean=not bad)

    def rows_failed(self, *, possible: bool) -> None:
        """Take in that the server could not try row by row: not here, or (`possible=False`) not at all."""
        span = self._take_current()
        self._rows_possible = self._rows_possible and possible
        self._todo.append(
            _Span(
                span.lo,
                span.hi,
                bad=span.bad,
                may_try_rows=False,
                bad_if_left_is_clean=span.bad_if_left_is_clean,
            )
        )
