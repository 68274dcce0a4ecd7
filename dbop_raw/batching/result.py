"""What a batch gives back: `BatchResult`, and `Failed` for each item that was set aside.

Data only, frozen: the caller looks at `failed` and decides what to do with it. Nothing here is raised.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from dbop_raw.failure.sqlstate import Verdict

__all__ = ["BatchResult", "Failed"]

Item_co = TypeVar("Item_co", covariant=True)
R_co = TypeVar("R_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Failed(Generic[Item_co]):
    """An item that was set aside."""

    index: int
    """Its place in the batch, from 0."""
    item: Item_co = field(repr=False)
    """The item as it was given. Not in the repr: it may hold a secret."""
    error: Exception
    """What refused it: the driver's error, unchanged, or `RetriesExhausted` of the item's own `retry`."""
    verdict: Verdict
    """Its `transient` is true where the item outlasted its retries: try it again later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult(Generic[Item_co, R_co]):
    """What became of each item: written once, or in `failed` once."""

    total: int
    """The number of items given."""
    written: int
    """The number of items written. A row that a trigger drops on its way is neither written nor failed: COPY
    tells how many rows it stored. (A statement of the user's own is executed; what it does is its own.)
    """
    failed: tuple[Failed[Item_co], ...]
    """The items that were set aside, in the order of the input."""
    results: tuple[R_co | None, ...]
    """For `each`: the operations' results by the items' index, None where an item failed. For the other
    writers: empty.
    """
    retries: int
    """Starts after the first, of items or spans, for passing reasons."""
