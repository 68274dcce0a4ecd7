"""In which order items are written, and which of them only together: `Layout`, and the groups of `together`.

Pure, no I/O. The chooser (`spans.py`) knows units only; a unit is an item, or a group of them.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

__all__ = ["Layout", "group_by"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Items in the order in which they are written, cut into units."""

    indexes: Sequence[int]
    """The items' places in the batch, in the order of writing; a `range` where that is all, as given."""
    starts: Sequence[int] | None = None
    """Where in `indexes` each unit begins, and in the end where the last one ends. None: each item is a unit
    of its own.
    """

    @staticmethod
    def of_groups(groups: Iterable[Sequence[int]]) -> Layout:
        """Lay groups out one after another."""
        groups = list(groups)
        indexes = [index for group in groups for index in group]
        if len(indexes) == len(groups):
            return Layout(indexes)
        return Layout(indexes, [0, *accumulate(map(len, groups))])

    @property
    def units(self) -> int:
        """The number of units."""
        return len(self.indexes) if self.starts is None else len(self.starts) - 1

    def span(self, lo: int, hi: int) -> tuple[int, int]:
        """Return the places in `indexes` of the units `lo` up to but not including `hi`."""
        return (lo, hi) if self.starts is None else (self.starts[lo], self.starts[hi])

    def unit_of(self, place: int) -> int:
        """Return the unit that a place in `indexes` is in."""
        return place if self.starts is None else bisect.bisect_right(self.starts, place) - 1

    def members(self, unit: int) -> Sequence[int]:
        """Return the items of a unit by their places in the batch."""
        lo, hi = self.span(unit, unit + 1)
        return self.indexes[lo:hi]


def group_by(items: Sequence[Any], key: Callable[[Any], Any]) -> tuple[list[list[int]], dict[int, Exception]]:
    """Group items by an equal key.

    Returns:
        The groups by their items' places, in the order of their first ones; and what `key` raised for the
        items that have none, or a `TypeError` where theirs can't be hashed.
    """
    groups: dict[Any, list[int]] = {}
    failed: dict[int, Exception] = {}
    for index, item in enumerate(items):
        try:
            groups.setdefault(key(item), []).append(index)
        except Exception as exc:  # noqa: BLE001 - user code: whatever it is, it is this item's
            failed[index] = exc
    return list(groups.values()), failed
