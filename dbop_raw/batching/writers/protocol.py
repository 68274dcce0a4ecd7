"""What the batch and its writers say to each other: the protocol `Writer`, and what it gives and raises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from dbop_raw.session.scope import Scope

__all__ = ["RowFailure", "Tried", "Unsupported", "WriteFailed", "Writer", "Written"]

Item_contra = TypeVar("Item_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)


class WriteFailed(Exception):
    """A span could not be written.

    A signal to the batch, which never leaves it: what is raised in the end is the error in it.

    Args:
        index: The item that the error is about; None where that is not known.
        error: The driver's error, or that of the user's code.
        client: It was raised before anything reached the server: surely the item's fault, if `index` is
            known.
        stale: It is about what the driver remembers of the schema, and not about any item.
    """

    def __init__(
        self, index: int | None, error: Exception, *, client: bool = False, stale: bool = False
    ) -> None:
        super().__init__(index, error)
        self.index = index
        self.error = error
        self.client = client
        self.stale = stale


class Unsupported(Exception):
    """The server can't try these rows one by one: spans are left.

    Args:
        of_rows: It is the rows' fault, and others can be tried; else no rows of this batch can.
    """

    def __init__(self, *, of_rows: bool = False) -> None:
        super().__init__()
        self.of_rows = of_rows


@dataclass(frozen=True, slots=True)
class Written(Generic[R_co]):
    """What came of a span that was written."""

    results: Sequence[R_co] = ()
    """One an item, where the writer is `per_item`; else none."""
    dropped: int = 0
    """How many of its items were accepted, but not stored: a trigger dropped them."""


@dataclass(frozen=True, slots=True)
class RowFailure:
    """The row at `index` failed in the server, with what would have been raised."""

    index: int
    error: Exception


@dataclass(frozen=True, slots=True)
class Tried:
    """What came of rows that the server tried one by one."""

    failures: Sequence[RowFailure]
    """In order."""
    seconds: float
    """What it took, without what is done only once; 0 where that can't be told."""
    dropped: int = 0
    """How many of the others were accepted, but not stored: a trigger dropped them."""

    def moved(self, number: int) -> Tried:
        """Return the same for a longer list, in which `number` other rows come first."""
        moved = [RowFailure(number + one.index, one.error) for one in self.failures]
        return Tried(moved, self.seconds, self.dropped)


class Writer(Protocol[Item_contra, R_co]):
    """What `batch` takes. A writer may be used by several batches, and on several connections at once."""

    @property
    def name(self) -> str:
        """What it is called in events and in `repr`."""
        ...

    @property
    def per_item(self) -> bool:
        """Is each item written by an operation of its own?

        Then a failure always names its item, results are kept, and `write_rows` is never called.
        """
        ...

    @property
    def columns(self) -> Sequence[str] | None:
        """The columns that an item's values are written to, in order; None where the writer knows of none."""
        ...

    async def write(self, scope: Scope, items: Sequence[Item_contra], lo: int, hi: int) -> Written[R_co]:
        """Write the items `lo` up to but not including `hi`.

        Raises:
            WriteFailed: None of them counts as written, and the caller undoes what was done.
        """
        ...

    async def write_rows(
        self, scope: Scope, items: Sequence[Item_contra], lo: int, hi: int, failure_rate: float
    ) -> Tried:
        """Have the server try the items `lo` up to but not including `hi` one by one.

        Args:
            scope: Where to.
            items: All items.
            lo: The first one.
            hi: The one behind the last.
            failure_rate: The share of items that were bad in earlier batches, 0 to 1.

        Returns:
            The failures, by the places in `items`; all other items of the span are written.

        Raises:
            WriteFailed: The server can't do that, and the caller undoes what was done.
        """
        ...

    async def refresh(self, scope: Scope, failed: WriteFailed) -> bool:
        """Make the driver forget what it remembers of the schema, where that may be why a span failed.

        Called once the span is undone, and at most once a run.

        Returns:
            True where the span is to be tried again: what the driver remembered is not so any more.
        """
        ...
