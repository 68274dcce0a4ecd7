"""What an ingest did: the report that a caller gets, and the counters that it is made of.

The counters are one small mutable object, which only the event loop's thread touches; what leaves it is
frozen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio

from dbop_raw.batching.result import BatchResult, Failed

__all__ = ["IngestReport", "Tally", "by_sqlstate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestReport:
    """What an ingest did; the same type is handed to `progress` on the way."""

    read: int
    """Items taken from the source, in chunks that were finished or found in the ledger."""
    written: int
    """Items that are in the table, by this call."""
    rejected: int
    """Items that could not be written, in chunks that are committed."""
    by_sqlstate: Mapping[str, int]
    """Rejected items by SQLSTATE, or by the Python exception's name where the client found them."""
    retries: int
    """Starts after the first: of chunks, and of items or spans inside of them."""
    chunks: int
    """Chunks committed by this call."""
    skipped: int
    """Chunks that the ledger had already."""
    rolled_back: int
    """Chunks that were in flight when the ingest was stopped, and are not in."""
    seconds: float
    """From the start to the moment of this report; of a sum, those of all."""
    finished: bool
    """Was the whole source read and written?"""

    def __add__(self, other: object) -> IngestReport:
        """Add up the reports of two parts of a job, or of two runs of it."""
        if not isinstance(other, IngestReport):
            return NotImplemented
        numbers = {name: getattr(self, name) + getattr(other, name) for name in _ADDED}
        return IngestReport(
            **numbers,
            by_sqlstate=dict(Counter(self.by_sqlstate) + Counter(other.by_sqlstate)),
            finished=self.finished and other.finished,
        )

    def __radd__(self, other: object) -> IngestReport:
        """Let `sum(reports)` begin with its 0."""
        return self if other == 0 else NotImplemented

    @property
    def rows_per_second(self) -> float:
        """Items written or rejected a second."""
        return (self.written + self.rejected) / self.seconds if self.seconds > 0 else 0.0


_ADDED = ("read", "written", "rejected", "retries", "chunks", "skipped", "rolled_back", "seconds")


def by_sqlstate(failed: Iterable[Failed[Any]]) -> Counter[str]:
    """Count what failed by SQLSTATE, or by the Python exception's name where the client found it."""
    return Counter(one.verdict.sqlstate or one.verdict.condition for one in failed)


@dataclass(slots=True)
class Tally:
    """What is counted on the way."""

    since: float = field(default_factory=anyio.current_time)
    """When the ingest began, by the event loop's clock."""
    read: int = 0
    written: int = 0
    rejected: int = 0
    by_sqlstate: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    chunks: int = 0
    skipped: int = 0
    in_flight: int = 0
    """Chunks that a worker has begun, and not finished."""
    finished: bool = False

    def skip(self, items: int) -> None:
        """Count a chunk that the ledger had already."""
        self.skipped += 1
        self.read += items

    def add(self, result: BatchResult[Any, Any], attempts: int) -> None:
        """Count a chunk that is committed.

        Args:
            result: What became of its items.
            attempts: How often its transaction was started.
        """
        self.chunks += 1
        self.read += result.total
        self.written += result.written
        self.rejected += len(result.failed)
        self.retries += result.retries + attempts - 1
        self.by_sqlstate.update(by_sqlstate(result.failed))

    def report(self) -> IngestReport:
        """Give the numbers as they are now."""
        return IngestReport(
            read=self.read,
            written=self.written,
            rejected=self.rejected,
            by_sqlstate=dict(self.by_sqlstate),
            retries=self.retries,
            chunks=self.chunks,
            skipped=self.skipped,
            rolled_back=0 if self.finished else self.in_flight,
            seconds=anyio.current_time() - self.since,
            finished=self.finished,
        )
